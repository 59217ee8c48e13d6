"""Deep Compression (Han et al., arXiv 1510.00149) of LeNet-300-100 and LeNet-5 on Fashion-MNIST: prune, share, write a file; accuracy and bytes of each stage.

For each seed a dense network is trained. It is the start, and the mean of the logits of the seeds' dense networks, on the training images, is what pruned networks
learn from beside the labels. A second dense network is trained for as many epochs as all stages take together. Accuracy is on the 10,000 test images, of the network
that is loaded from the file; nothing is chosen by it. The reference is the float32 state dict as safetensors, the file what `save_compressed` writes.
More than one sparsity or number of bits tells how far it goes: each pair is a row of the table at the end. With `--ratio`, `compress` chooses zeros and values for a file so many times smaller, in place
of k-means, and then the values are trained as those of k-means are. Dense and pruned networks are kept in the user's cache (`fasterai-trained/lenets`): another run takes them from there. Delete them to train them again.

    python benchmarks/deep_compression.py 300 --sparsity 91 94 --bits 4 3
    python benchmarks/deep_compression.py 300 --sparsity 93 --ratio 65
"""
import argparse, copy, math, os, sys, tempfile, time
from functools import partial
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
import pandas as pd
import torch
from torch import nn
import torch.nn.functional as F
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from safetensors.torch import save
from data import best_there_is
from trained import CACHE
from fasterai.quantize.all import KMeansCallback, compression_report, load_compressed, save_compressed
from fasterai.quantize.compress import compress
from fasterai.sparse.all import KeepSparsity, Schedule, SparsifyCallback, agp, large_final, sched_agp

def lenet_300_100(): return nn.Sequential(nn.Flatten(), nn.Linear(784,300), nn.ReLU(), nn.Linear(300,100), nn.ReLU(), nn.Linear(100,10))
def lenet_5(): return nn.Sequential(nn.Conv2d(1,20,5), nn.MaxPool2d(2), nn.Conv2d(20,50,5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800,500), nn.ReLU(), nn.Linear(500,10))

nets = {  # epochs of each stage; sparsity in percent of all weights; bits of the weights of linear layers
    '300': dict(make=lenet_300_100, dense=20, prune=40, share=10, sparsity=91., bits=3),
    '5':   dict(make=lenet_5, dense=8, prune=12, share=4, sparsity=92.5, bits=3)}

def bits_of(linear): return lambda n,p: 5 if p.dim()>2 else linear if p.dim()>1 else 5 if p.numel()>50 else None

MOST_BITS = 8 # of a code book

def bits_there(n, p):
    "As many as the values that there are take, so that each is a cluster, or as a code book has at most"
    return min(math.ceil(math.log2(max(len(p[p!=0].unique()), 2))), MOST_BITS)

def plain_bytes(model):
    "Of the state dict as safetensors"
    return len(save(model.state_dict()))

class Batches(DataLoader):
    "Batches of rows of tensors"
    n_inp = 1
    def __init__(self, *ts, **kwargs):
        super().__init__(range(len(ts[0])), **kwargs)
        self.ts = ts
    def create_batches(self, samps): yield from (tuple(t[i] for t in self.ts) for i in torch.tensor(list(samps)).split(self.bs))

def loss(pred, y, teacher=None, T=3.):
    "Cross-entropy; with a teacher's logits, half of it and half of the soft targets' (Hinton et al., arXiv 1503.02531)"
    if teacher is None: return F.cross_entropy(pred, y)
    return .5*F.cross_entropy(pred, y)+.5*T**2*F.kl_div(F.log_softmax(pred/T, 1), F.log_softmax(teacher/T, 1), log_target=True, reduction='batchmean')

def fit(model, data, n, lr, wd, cbs=None):
    dls = DataLoaders(Batches(*data, bs=256, shuffle=True), Batches(*(t[:1] for t in data), bs=256))  # nothing is validated on the way
    learn = Learner(dls, model, loss_func=loss, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, lr, wd=wd, cbs=cbs)

@torch.no_grad()
def logits(model, x): model.eval(); return torch.cat([model(o) for o in x.split(1000)])
def accuracy(model, x, y): return 100*(logits(model, x).argmax(1)==y).float().mean().item()

def images():
    "What they are called, images and labels to train with, and to test with; pixels have mean 0 and variance 1"
    what,(x,y),(vx,vy),_ = best_there_is()
    x,y,vx,vy = (torch.from_numpy(t.copy()) for t in (x,y,vx,vy))
    mean,std = x.mean(),x.std()
    x,vx = ((t[:,None]-mean)/std for t in (x,vx))
    return what,(x,y),(vx,vy)

def kept(name, model, train):
    "`model` after `train`, or as an earlier run left it under `name`"
    file = CACHE/'lenets'/f'{name}.pt'
    if file.exists(): model.load_state_dict(torch.load(file))
    else:
        train(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), part := file.with_suffix('.part'))
        part.rename(file)
    return model

def dense_net(name, seed, data):
    set_seed(seed)
    n = nets[name]['dense']
    return kept(f'{name}-dense-{n}-epochs-seed-{seed}', nets[name]['make'](), lambda m: fit(m, data, n, 3e-3, .1))

def taught(models, data):
    "`data` with the mean of what `models` give"
    return (*data,torch.stack([logits(m, data[0]) for m in models]).mean(0))

def pruned_net(name, seed, sparsity, dense, data):
    "The network of `seed` among `dense`, by seed, pruned; the others teach it, too"
    n,prune = nets[name]['prune'],SparsifyCallback(sparsity, 'weight', 'global', large_final, Schedule(sched_agp, .05, .8), layer_type=(nn.Linear,nn.Conv2d))
    set_seed(seed)
    seeds = '-'.join(map(str, dense))
    return kept(f'{name}-zeros-{sparsity:g}-{n}-epochs-seed-{seed}-of-{seeds}', copy.deepcopy(dense[seed]), lambda m: fit(m, data, n, 3e-3, .1, prune))

def run(name, seeds, sparsities, bits, ratios):
    o,(what,data,(vx,vy)) = nets[name],images()
    start,rows = time.time(),[]
    def tell(stage, seed, model, **kwargs):
        rows.append(dict(stage=stage, seed=seed, accuracy=accuracy(model, vx, vy), **kwargs))
        print(f'{what}, {o["make"].__name__},', ', '.join(f'{k} {v:,.2f}' if isinstance(v, float) else f'{k} {v}' for k,v in rows[-1].items()), f'({time.time()-start:.0f} s)', flush=True)
    def filed(stage, seed, model):
        with tempfile.TemporaryDirectory() as d:
            save_compressed(model, f'{d}/small')
            after = os.path.getsize(f'{d}/small')
            tell(stage, seed, load_compressed(f'{d}/small', o['make']()), bytes=after, ratio=plain_bytes(model)/after)
            if seed==seeds[0]: print(compression_report(f'{d}/small').to_string(), flush=True)
    dense = {}
    for s in seeds:
        dense[s] = dense_net(name, s, data)
        tell('dense', s, dense[s])
    with_teacher = taught(dense.values(), data)
    for sparsity in sparsities or [o['sparsity']]:
        for s in seeds:
            pruned = pruned_net(name, s, sparsity, dense, with_teacher)
            tell(f'{sparsity:g} % zero', s, pruned)
            def shared(stage, model, bits):
                set_seed(s)
                fit(model, with_teacher, o['share'], 5e-4, .1, [cb := KMeansCallback(bits), KeepSparsity()])
                filed(stage, s, model)
                if s==seeds[0]: print(cb.quantizer.report().to_string(), flush=True)
            for b in bits or ([] if ratios else [o['bits']]): shared(f'{sparsity:g} % zero, {b} bits', copy.deepcopy(pruned), bits_of(b))
            for ratio in ratios:
                stage,model = f'{sparsity:g} % zero, ×{ratio:g}',copy.deepcopy(pruned)
                compress(model, [*data[0][:4000].split(1000)], bytes=int(plain_bytes(model)/ratio), progress=False)
                filed(stage, s, model)
                shared(stage+', trained', model, bits_there)
    for s in seeds:
        set_seed(s)
        long = o['make']()
        fit(long, data, o['dense']+o['prune']+o['share'], 3e-3, .3)
        tell('dense, as many epochs', s, long)
    print(pd.DataFrame(rows).groupby('stage', sort=False).agg({'accuracy':['mean','min','max'], 'bytes':'mean', 'ratio':['mean','min']}).round(2).to_string())

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('net', choices=nets, nargs='?', default='300')
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--sparsity', type=float, nargs='+', help='percent of all weights')
    p.add_argument('--bits', type=int, nargs='+', help='of the weights of linear layers')
    p.add_argument('--ratio', type=float, nargs='+', default=[], help='how many times smaller `compress` makes the file, before values are trained')
    o = p.parse_args()
    run(o.net, o.seeds, o.sparsity, o.bits, o.ratio)
