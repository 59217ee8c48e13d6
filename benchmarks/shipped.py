"""Six networks cut, repaired or trained, in int8, in ONNX Runtime, beside the dense network with floats in ONNX Runtime: MACs, bytes, milliseconds, and what is still right

    python benchmarks/shipped.py [resnet18 resnet50 mobilenet_v2 vgg16_bn reader classifier]

torchvision's networks learn Fashion-MNIST for an epoch of 20,000 images of 32 pixels (vgg16_bn: 10,000), lose half of their channels by magnitude, and learn for another epoch; accuracy is that of 2,000 other images,
and time that of an image of 224 pixels. The text reader and the ImageNet classifier (see `trained.py`) lose channels by `obs` and are repaired with a few inputs without labels; of the reader, it is the convolutions that
are exported and timed, and 500 words that are read. Times are medians of plain calls, in turn, with as many threads as PyTorch has."""
import sys, tempfile, warnings
from copy import deepcopy
import torch, torchvision
from torch import nn
from torch.nn import functional as F
from fasterai.analyze.all import latency, n_macs, speedup
from fasterai.export.runtimes import Job
from fasterai.misc.all import BN_Folder
from fasterai.prune.all import Pruner
from trained import CHARS, classifier, crops, reader, words
from targets import learn, wide_images

WIDE = 420 # pixels of a word in a file, whose width is fixed
BLOCK = 16 # channels that ONNX Runtime takes at a time

@torch.no_grad()
def share(right): return f'{100*right.float().mean():.1f} %'

class Case:
    "A dense network and the small one; inputs that ranges are found with, an input to time, and a function that tells what is right of what is called as the network is"
    def __init__(self, dense, small, seen, x, score): self.dense,self.small,self.seen,self.x,self.score = dense,small,seen,x,score

def of_torchvision(name):
    deep = name=='vgg16_bn'
    images,lr = wide_images(10000 if deep else 20000),.02 if deep else .1  # without shortcuts, larger steps lead nowhere
    dense = learn(torchvision.models.get_model(name, weights=None, num_classes=10), *images.train, lr=lr)
    small = Pruner(deepcopy(dense), 50, example_inputs=images.seen[0][:1], round_to=BLOCK).prune_model()
    learn(small.train(), *images.train, lr=lr)
    x,y = images.held
    def score(m): return share(torch.cat([m(o).argmax(1) for o in x.split(200)])==y)
    return Case(dense, small, images.seen, torch.randn(1, 3, 224, 224), score)

def text(scores):
    best = scores.argmax(-1).tolist()
    return ''.join(CHARS[c-1] for last,c in zip([0]+best, best) if c and c!=last)

def batch(pairs): return torch.cat([F.pad(x, (0,WIDE-x.shape[-1]), value=1.) for _,x in pairs])

def of_reader():
    dense,few = reader(),words(40, 1, slice(0, None, 2))
    pairs = words(500, 2, slice(1, None, 2), (str.lower,str.upper,str.title))
    small = deepcopy(dense)
    Pruner(small, 50, example_inputs=few[0][1], round_to=BLOCK, criteria='obs', data=[x for _,x in few], repair=True).prune_model()
    seen = batch(few)
    xs,rest = batch(pairs),{id(m.FeatureExtraction):m for m in (dense,small)}
    def score(m, of):
        "Words that the whole network reads if `m` are its convolutions"
        whole = rest[id(of)]
        def read(x): return whole.Prediction(whole.SequenceModeling(m(x).mean(2).mT))
        return f'{sum(text(o)==t for b,ts in zip(xs.split(50), [pairs[i:i+50] for i in range(0, len(pairs), 50)]) for o,(t,_) in zip(read(b), ts))} of {len(pairs)} words'
    return Case(dense.FeatureExtraction, small.FeatureExtraction, [*seen.split(8)], seen[:1], score)

def of_classifier():
    dense,(seen,_),(xs,_) = classifier(),crops(8, 1, slice(0, 10)),crops(25, 2)
    small = deepcopy(dense)
    Pruner(small, macs='70%', example_inputs=seen[:1], round_to=BLOCK, data=[*seen.split(8)], repair=True).prune_model()
    with torch.no_grad(): best = torch.cat([dense(o).argmax(1) for o in xs.split(50)])
    def score(m): return f'{share(torch.cat([m(o).argmax(1) for o in xs.split(50)])==best)} as dense'
    return Case(dense, small, [*seen.split(8)], seen[:1], score)

MADE = dict(reader=of_reader, classifier=of_classifier)
NAMES = 'resnet18','resnet50','mobilenet_v2','vgg16_bn','reader','classifier'

@torch.no_grad()
def main():
    warnings.simplefilter('ignore')
    print('| network | MACs | file | ms: dense, small, small int8 | faster | right: dense, small, small int8 |\n|---|---|---|---|---|---|', flush=True)
    for name in sys.argv[1:] or NAMES:
        with torch.enable_grad(): case = MADE[name]() if name in MADE else of_torchvision(name)
        folded = BN_Folder().fold(case.small, case.seen[0])
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, tempfile.TemporaryDirectory() as c, tempfile.TemporaryDirectory() as d:
            def three(x, *folders):
                jobs = [Job(m, x, folder, case.seen if x.shape[-1]==case.seen[0].shape[-1] else [F.interpolate(case.seen[0], x.shape[2:])]) for m,folder in zip((case.dense,folded), folders)]
                return jobs[0].run('onnx'),jobs[1].run('onnx'),jobs[1].run('onnx_static')
            runs,small = three(case.x, a, b),case.seen[0][:1]
            ms = latency(*runs, example_inputs=case.x, repeats=25, progress=False)
            judged = runs if small.shape==case.x.shape else three(small, c, d)
            more = [(case.dense,),(case.small,),(case.small,)] if name=='reader' else [()]*3
            right = [case.score(m, *o) for m,o in zip(judged, more)]
            macs = [n_macs(m, case.x)/1e9 for m in (case.dense,folded)]
            sizes = [o.n_bytes/1e6 for o in (runs[0],runs[2])]
        s = speedup(ms[0], ms[2])
        print(f'| {name} | {macs[0]:.2f} → {macs[1]:.2f} G | {sizes[0]:.1f} → {sizes[1]:.1f} MB | {", ".join(f"{o:.1f}" for o in ms.mean(1))} | ×{s.median:.2f} ({s.low:.2f} to {s.high:.2f}) | {", ".join(right)} |', flush=True)

if __name__=='__main__': main()
