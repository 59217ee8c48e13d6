"""A training step with SparsifyCallback beside the same step without a callback, in turn.

Two learners are fitted in two threads that take turns batch by batch, so that both see the machine in the same state.
resnet18 with 10 classes, batches of 32 images of 3×64×64, weights zeroed to 50 % under one_cycle.

    python benchmarks/training_step.py [steps …]      default: 40 500
"""
import sys, threading, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
import torch
from torch import nn
from torchvision.models import resnet18
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fasterai.sparse.all import SparsifyCallback, large_final, movement, one_cycle

class Turns:
    "Lets two threads go on alternately"
    def __init__(self): self.gates = [threading.Semaphore(1), threading.Semaphore(0)]
    def wait(self, i): self.gates[i].acquire()
    def done(self, i): self.gates[1-i].release()

class Timed(Callback):
    "Times each step, all callbacks included, while it is this learner's turn"
    order = -100
    def __init__(self, turns, i, times): self.turns,self.i,self.times = turns,i,times
    def before_batch(self):
        self.turns.wait(self.i)
        self.start = time.perf_counter()
class TimedEnd(Callback):
    order = 100
    def __init__(self, timed): self.timed = timed
    def after_batch(self):
        self.timed.times.append(time.perf_counter()-self.timed.start)
        self.timed.turns.done(self.timed.i)

def learner(n_steps):
    torch.manual_seed(0)
    batch = torch.randn(32,3,64,64),torch.randint(0, 10, (32,))
    dl = DataLoader(range(32*n_steps), bs=32, create_batch=lambda b: batch)
    dls = DataLoaders(dl, DataLoader([], bs=32, create_batch=lambda b: batch))
    learn = Learner(dls, resnet18(num_classes=10), loss_func=nn.CrossEntropyLoss(), lr=1e-3)
    learn.remove_cbs(learn.cbs[2:])  # no progress bar, no table
    learn.logger = lambda log: None
    return learn

def fit(learn, turns, i, times, cbs):
    timed = Timed(turns, i, times)
    learn.fit(1, cbs=[timed, TimedEnd(timed), *cbs])

def compare(n_steps, **how):
    turns,times = Turns(),([],[])
    learns,cbs = [learner(n_steps) for _ in range(2)],([SparsifyCallback(50, schedule=one_cycle, **how)],[])
    ts = [threading.Thread(target=fit, args=(learns[i], turns, i, times[i], cbs[i])) for i in range(2)]
    for t in ts: t.start()
    for t in ts: t.join()
    ours,base = (sorted(o[2:]) for o in times)  # two steps to warm up
    n = len(base)
    reached = cbs[0][0].sparsifier.reached()
    print(f'{how["granularity"]}/{how["context"]}/{how["criteria"].__name__:12} {n_steps:4} steps: {1e3*sum(ours)/n:6.1f} ms beside {1e3*sum(base)/n:6.1f} ms without'
          f' = ×{sum(ours)/sum(base):.3f} (of medians ×{ours[n//2]/base[n//2]:.3f}), reached {reached:.4f} %', flush=True)

if __name__=='__main__':
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    for n in map(int, sys.argv[1:] or (40, 500)):
        for context,criteria in (('local',large_final),('global',large_final),('local',movement)): compare(n, granularity='weight', context=context, criteria=criteria)
