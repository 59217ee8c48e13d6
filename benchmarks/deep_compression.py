"""Deep Compression (Han et al., arXiv 1510.00149) of LeNet-300-100 and LeNet-5 on Fashion-MNIST: prune, share, write a file; accuracy and bytes of each stage.

For each seed a dense network is trained. It is the start, and the mean of the logits of the seeds' dense networks, on the training images, is what pruned networks
learn from beside the labels. A second dense network is trained for as many epochs as all stages take together. Accuracy is on the 10,000 test images, of the network
that is loaded from the file; nothing is chosen by it. The reference is the float32 state dict as safetensors, the file what `save_compressed` writes.

    python benchmarks/deep_compression.py [300 | 5] [seeds …]      default: 300, seeds 0 1 2
"""
import copy, os, sys, tempfile, time
from functools import partial
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
import torch
from torch import nn
import torch.nn.functional as F
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from safetensors.torch import save_file
from data import best_there_is
from fasterai.quantize.all import KMeansCallback, compression_report, load_compressed, save_compressed
from fasterai.sparse.all import KeepSparsity, Schedule, SparsifyCallback, agp, large_final, sched_agp

def lenet_300_100(): return nn.Sequential(nn.Flatten(), nn.Linear(784,300), nn.ReLU(), nn.Linear(300,100), nn.ReLU(), nn.Linear(100,10))
def lenet_5(): return nn.Sequential(nn.Conv2d(1,20,5), nn.MaxPool2d(2), nn.Conv2d(20,50,5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800,500), nn.ReLU(), nn.Linear(500,10))

nets = {  # epochs of each stage; sparsity in percent of all weights; bits by parameter
    '300': dict(make=lenet_300_100, dense=20, prune=40, share=10, sparsity=90.5, bits=lambda n,p: 4 if p.dim()>1 else 5 if p.numel()>50 else None),
    '5':   dict(make=lenet_5, dense=8, prune=12, share=4, sparsity=92.5, bits=lambda n,p: 5 if p.dim()>2 else 3 if p.dim()>1 else 5 if p.numel()>50 else None)}

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

def run(name, seeds):
    o,(what,(x,y),(vx,vy),_) = nets[name],best_there_is()
    x,y,vx,vy = (torch.from_numpy(t.copy()) for t in (x,y,vx,vy))
    mean,std = x.mean(),x.std()
    x,vx = ((t[:,None]-mean)/std for t in (x,vx))
    types,start = (nn.Linear,nn.Conv2d),time.time()
    rows = {}
    def tell(seed, stage, model, **kwargs):
        rows.setdefault(stage, []).append(accuracy(model, vx, vy))
        print(f'{what}, {o["make"].__name__}, seed {seed}, {stage}: {rows[stage][-1]:.2f} %', *(f'{k} {v}' for k,v in kwargs.items()), f'({time.time()-start:.0f} s)', flush=True)
    dense = {}
    for s in seeds:
        set_seed(s)
        dense[s] = o['make']()
        fit(dense[s], (x,y), o['dense'], 3e-3, .1)
        tell(s, 'dense', dense[s])
    teacher = torch.stack([logits(m, x) for m in dense.values()]).mean(0)
    for s,model in dense.items():
        set_seed(s)
        with tempfile.TemporaryDirectory() as d:
            save_file(model.state_dict(), f'{d}/dense')
            fit(model, (x,y,teacher), o['prune'], 3e-3, .1, SparsifyCallback(o['sparsity'], 'weight', 'global', large_final, Schedule(sched_agp, .05, .8), layer_type=types))
            tell(s, 'pruned', model, zeros=sum(int((p==0).sum()) for p in model.parameters()))
            fit(model, (x,y,teacher), o['share'], 5e-4, .1, [cb := KMeansCallback(o['bits']), KeepSparsity()])
            save_compressed(model, f'{d}/small')
            small = load_compressed(f'{d}/small', o['make']())
            before,after = os.path.getsize(f'{d}/dense'),os.path.getsize(f'{d}/small')
            rows.setdefault('ratio', []).append(before/after)
            tell(s, 'shared', small, bytes=f'{after:,} of {before:,}', ratio=f'×{before/after:.1f}')
            if s==seeds[0]: print(cb.quantizer.report().to_string(), compression_report(f'{d}/small').to_string(), sep='\n', flush=True)
    for s in seeds:
        set_seed(s)
        long = o['make']()
        fit(long, (x,y), o['dense']+o['prune']+o['share'], 3e-3, .3)
        tell(s, 'dense, as many epochs', long)
    print('means:', ', '.join(f'{k} {sum(v)/len(v):.2f}' for k,v in rows.items()))

if __name__=='__main__': run(sys.argv[1] if len(sys.argv)>1 else '300', [int(o) for o in sys.argv[2:]] or [0,1,2])
