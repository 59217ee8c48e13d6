"""From a trained network to a small one, stage by stage: `python examples/walkthrough.py [PICTURE]`

A VGG-like network on Fashion-MNIST (the digits of scikit-learn where Debian's package dataset-fashion-mnist is missing): trained, 40 % of its filters zeroed while it trains on, these removed, BatchNorm folded, linear layers
decomposed, fine-tuned, and once more with the first network as a teacher. Then the same stages on the full vgg16_bn with random weights, for parameters and latency. Under three minutes on two cores, no network."""
import sys,time,warnings
from copy import deepcopy
from pathlib import Path
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)  # both on fastai's import
warnings.filterwarnings('ignore', message="The 'mode.chained_assignment' option is deprecated")
import torch
from torch import nn
from fastai.callback.schedule import fit_one_cycle
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torchvision.models import vgg16_bn
from fasterai.sparse.all import *
from fasterai.prune.all import *
from fasterai.misc.all import *
from fasterai.distill.all import *
from fasterai.report.all import *
sys.path.append(str(Path(__file__).resolve().parent.parent/'tools'))
from data import best_there_is,loaders

def network(size, classes): # Height of an image, number of classes
    "VGG for small gray images: convolutions with BatchNorm, three halvings, linear layers"
    def conv(ni, nf): return nn.Conv2d(ni, nf, 3, padding=1), nn.BatchNorm2d(nf), nn.ReLU()
    def half(): return nn.MaxPool2d(2)
    return nn.Sequential(*conv(1,16), half(), *conv(16,32), half(), *conv(32,64), *conv(64,64), half(), nn.Flatten(),
                         nn.Linear(64*(size//8)**2, 256), nn.ReLU(), nn.Linear(256,256), nn.ReLU(), nn.Linear(256,classes))

def learner(dls, model):
    "A Learner that shows no bar"
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    learn.remove_cbs([learn.progress])
    learn.logger = lambda o: None
    return learn

def road(learn, epochs, lr=5e-3):
    "Each stage from a fresh network to a small one, by name"
    learn.fit_one_cycle(epochs, lr)
    stages = dict(baseline=deepcopy(learn.model))
    learn.fit_one_cycle(epochs, lr/2, cbs=SparsifyCallback(40, 'filter', 'local', large_final, one_cycle))
    stages['sparse'] = learn.model
    stages['pruned'] = Pruner().prune_model(stages['sparse'])
    stages['folded'] = BN_Folder().fold(stages['pruned'])
    stages['decomposed'] = FC_Decomposer().decompose(stages['folded'], percent_removed=.5)
    stages['tuned'] = deepcopy(stages['decomposed'])
    learner(learn.dls, stages['tuned']).fit_one_cycle(epochs, lr/5)
    stages['distilled'] = deepcopy(stages['decomposed'])
    learner(learn.dls, stages['distilled']).fit_one_cycle(epochs, lr/5, cbs=KnowledgeDistillationCallback(stages['baseline']))
    return stages

def vgg16_road(x): # An image, [1, 3, 224, 224]
    """The same stages for torchvision's vgg16_bn with 10 classes. Its weights are random, so nothing is trained, and the linear layers are decomposed without values, on the
    meta device: which sizes come out does not depend on these"""
    set_seed(0)
    stages = dict(baseline=vgg16_bn(num_classes=10).eval())
    stages['sparse'] = deepcopy(stages['baseline'])
    Sparsifier(stages['sparse'], 'filter', 'local', 'large_final').sparsify_model(40)
    stages['pruned'] = Pruner().prune_model(stages['sparse'], x)
    stages['folded'] = BN_Folder().fold(stages['pruned'])
    small = FC_Decomposer().decompose(deepcopy(stages['folded']).to('meta'), percent_removed=.5, example_inputs=x.to('meta')).to_empty(device='cpu')
    for p in small.parameters(): nn.init.normal_(p, std=.01)
    return {**stages, 'decomposed':small}

def main(path='walkthrough.png', n=6_000, epochs=2, vgg=True): # Picture to write, training images, epochs of each training, also vgg16_bn?
    import matplotlib
    matplotlib.use('agg')
    start = time.time()
    name,train,valid,classes = best_there_is(n)
    print(f'Data: {name}, {len(train[0][:n]):,} images to train on, {len(valid[0]):,} to validate\n')
    set_seed(0)
    learn = learner(loaders(tuple(o[:n] for o in train), valid), network(train[0].shape[1], len(classes)))
    rep = report(road(learn, epochs), learn.dls, channels_last=True)
    print(f'{rep}\n')
    show_report(rep)[0].figure.savefig(path, dpi=100)
    print(f'Picture: {Path(path).resolve()}')
    if vgg:
        x = torch.randn(1, 3, 224, 224)
        print(f'\nvgg16_bn, 10 classes, random weights\n{report(vgg16_road(x), example_inputs=x)}')
    print(f'\n{time.time()-start:.0f} seconds')
    return rep

if __name__=='__main__': main(*sys.argv[1:])
