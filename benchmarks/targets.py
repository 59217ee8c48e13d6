"""`Pruner(model, latency=…)` beside the same share of each layer's channels in the same time: what is still right. Both choose by `obs`, are repaired, and see the same inputs.

A text reader as it was trained (see `trained.py`), and residual networks that are trained here, on 20,000 images of Fashion-MNIST.
Times are medians of plain calls, in turn with the dense network; of equal shares, the smallest is taken that is no slower.

    python benchmarks/targets.py [reader resnet18 resnet50]
"""
import statistics, sys, time, warnings
from collections import namedtuple
from copy import deepcopy
from pathlib import Path
import torch, torchvision
from torch.nn import functional as F
from fasterai.analyze.all import n_macs
from fasterai.prune.all import Pruner
from trained import read, reader, words
sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
from data import fashion_mnist

ASKED,CALLS = ('1.5x','2x'),40

Images = namedtuple('Images', 'train seen held') # Images and labels; batches of 512 of these images; images and labels that are not among them

def wide_images(n):
    "`n` images of Fashion-MNIST, of 32 pixels and three colours"
    (x,y),(tx,ty) = ([torch.from_numpy(o) for o in part] for part in fashion_mnist()[:2])
    def wide(x): return F.pad(x.view(-1, 1, 28, 28), (2,2,2,2)).expand(-1, 3, -1, -1)
    x,tx = wide(x[:n]),wide(tx[:2000])
    return Images((x,y[:n]), [*x[:512].split(64)], (tx,ty[:2000]))

def learn(model, x, y, bs=64, lr=.1):
    "`model` after an epoch"
    torch.manual_seed(0)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=.9, nesterov=True, weight_decay=5e-4)
    batches = torch.randperm(len(x)).split(bs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, len(batches))
    for i in batches:
        F.cross_entropy(model(x[i]), y[i]).backward()
        opt.step(), opt.zero_grad(), schedule.step()
    return model.eval()

@torch.no_grad()
def accuracy(model, x, y): return f'{100*torch.cat([model(o).argmax(1) for o in x.split(200)]).eq(y).float().mean():.1f} %'
def right(model, pairs): return f'{sum(read(model, x)==word for word,x in pairs)} of {len(pairs)}'

def the_reader():
    seen = [x for _,x in words(40, 1, slice(0, None, 2))]
    pairs = words(500, 2, slice(1, None, 2), (str.lower,str.upper,str.title))
    return reader(), seen, lambda m: right(m, pairs)

def a_resnet(name):
    torch.manual_seed(0)
    images = wide_images(20000)
    model = learn(getattr(torchvision.models, name)(num_classes=10), *images.train)
    return model, images.seen, lambda m: accuracy(m, *images.held)

@torch.no_grad()
def faster(dense, model, x):
    "How many times"
    times = [],[]
    for _ in range(CALLS):
        for m,ts in zip((dense,model), times):
            start = time.perf_counter()
            m(x)
            ts.append(time.perf_counter()-start)
    a,b = (statistics.median(ts[5:]) for ts in times)
    return a/b

def pruned(dense, x, **kwargs):
    new = deepcopy(dense)
    Pruner(new, example_inputs=x, **kwargs).prune_model()
    return new

def equal_share(dense, x, times):
    "The least percentage of each layer's channels without which the network is `times` as fast"
    low,high = 0,95
    while high-low>1:
        mid = (low+high)//2
        low,high = (low,mid) if faster(dense, pruned(dense, x, pruning_ratio=mid), x)>=times else (mid,high)
    return high

def main():
    warnings.simplefilter('ignore')
    for name in sys.argv[1:] or ('reader','resnet18','resnet50'):
        dense,seen,score = the_reader() if name=='reader' else a_resnet(name)
        x = seen[0][:1]
        print(f'{name}, {torch.get_num_threads()} threads: {score(dense)}', flush=True)
        for asked in ASKED:
            ours = pruned(dense, x, latency=asked, criteria='obs', data=seen, repair=True)
            times = faster(dense, ours, x)
            share = equal_share(dense, x, times)
            alike = pruned(dense, x, pruning_ratio=share, criteria='obs', data=seen, repair=True)
            for how,m,t in (f'latency={asked!r}',ours,times),(f'{share} % of each',alike,faster(dense, alike, x)):
                print(f'    {how}: ×{t:.2f} faster, {n_macs(m, x)/n_macs(dense, x):.0%} of the multiply-accumulates, {score(m)}', flush=True)

if __name__=='__main__': main()
