"""A training step with SparsifyCallback, with KMeansCallback, or with QuantizeCallback, beside the same step without a callback, in turn.

Two learners take turns batch by batch, so that both see the machine in the same state.
resnet18 with 10 classes, batches of 32 images of 3×64×64, weights zeroed to 50 % under one_cycle, sharing 16 values a layer, or rounded as in int8.

    python benchmarks/training_step.py [steps …]      default: 40 500
"""
import sys, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
import torch
from torch import nn
from torchvision.models import resnet18
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner

def learner(n_steps, model=resnet18, n_images=32, px=64, device='cpu', layout=torch.contiguous_format):
    "A learner of `model` with 10 classes, and the batch that it sees at each step"
    torch.manual_seed(0)
    images,labels = torch.randn(n_images,3,px,px),torch.randint(0, 10, (n_images,))
    batch = images.to(device, memory_format=layout),labels.to(device)
    dl = DataLoader(range(n_images*n_steps), bs=n_images, create_batch=lambda b: batch)
    dls = DataLoaders(dl, dl, device=torch.device(device))
    learn = Learner(dls, model(num_classes=10).to(device, memory_format=layout), loss_func=nn.CrossEntropyLoss(), lr=1e-3)
    learn.remove_cbs(learn.cbs[2:])  # no progress bar, no table
    learn.logger = lambda log: None
    return learn,batch

def begin(learn, cbs):
    "What `learn.fit(1, cbs=cbs)` does before its first batch"
    learn.add_cbs(cbs)
    learn.create_opt()
    learn.n_epoch,learn.epoch,learn.dl = 1,0,learn.dls.train
    learn.n_iter = len(learn.dl)
    for event in ('before_fit','before_epoch','before_train'): learn(event)

def in_turn(steps, n_steps, clock=time.perf_counter):
    "Seconds of the `n_steps` calls of each of `steps`, functions of the number of the call; each goes first every other time"
    times = [[] for _ in steps]
    for i in range(n_steps):
        for step,ts in list(zip(steps, times))[::1 if i%2 else -1]:
            start = clock()
            step(i)
            ts.append(clock()-start)
    return times

def with_and_without(cb, n_steps, clock=time.perf_counter, **how): # How: what `learner` takes
    "Seconds of each step of a learner with `cb`, and of one without"
    (ours,batch),(base,_) = learner(n_steps, **how),learner(n_steps, **how)
    begin(ours, [cb])
    begin(base, [])
    times = in_turn([lambda i: ours.one_batch(i, batch), lambda i: base.one_batch(i, batch)], n_steps, clock)
    for learn in (ours,base):
        for event in ('after_train','after_epoch','after_fit'): learn(event)
    return times

def compare(name, cb, n_steps):
    ours,base = (sorted(o[2:]) for o in with_and_without(cb, n_steps))  # two steps to warm up
    n = len(base)
    print(f'{name:26} {n_steps:4} steps: {1e3*sum(ours)/n:6.1f} ms beside {1e3*sum(base)/n:6.1f} ms without'
          f' = ×{sum(ours)/sum(base):.3f} (of medians ×{ours[n//2]/base[n//2]:.3f})', f'reached {cb.reached():.4f} %' if hasattr(cb, 'reached') else '', flush=True)

def main(*counts):
    from fasterai.quantize.all import KMeansCallback, QuantizeCallback
    from fasterai.sparse.all import SparsifyCallback, large_final, movement, one_cycle
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    for n in map(int, counts or (40, 500)):
        for context,criteria in (('local',large_final),('global',large_final),('local',movement)):
            compare(f'weight/{context}/{criteria.__name__}', SparsifyCallback(50, 'weight', context, criteria, one_cycle), n)
        compare('KMeansCallback(4)', KMeansCallback(4), n)
        compare('QuantizeCallback()', QuantizeCallback(), n)

if __name__=='__main__': main(*sys.argv[1:])
