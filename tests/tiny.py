"A tiny network, tiny data and a quiet Learner, for tests of callbacks"
import re, warnings
from contextlib import contextmanager
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import *
from fasterai.core.recorded import record

g = torch.Generator().manual_seed(0)
X,Y = torch.randn(48, 3, 6, 6, generator=g),torch.randint(0, 4, (48,), generator=g)
def told(o): "Name of what a test gets, without addresses, which are others in each process"; return re.sub(r' at 0x[0-9a-f]+', '', str(o))

class Items(list):
    "A list that can be exported"
    def new_empty(self): return Items()
    def __getitem__(self, i): return Items(super().__getitem__(i)) if isinstance(i, slice) else super().__getitem__(i)

DATA = Items(zip(X, Y))

# Fake tensors of PyTorch 2.5 that are on a GPU need its driver; without it they have no value either, but are on the CPU
FAKE_GPU = X.device.type if X.device.type!='cpu' else 'cuda' if hasattr(torch._C, '_ensureCUDADeviceGuardSet') or torch.cuda.is_available() else 'cpu'

def net(seed=0, norm=nn.BatchNorm2d):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3,8,3,padding=1), norm(8), nn.ReLU(), nn.Conv2d(8,8,3,padding=1), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4))

WRAPPERS = dict(compiled=torch.compile, parallel=nn.DataParallel, averaged=torch.optim.swa_utils.AveragedModel,
    compiled_parallel=lambda m: torch.compile(nn.DataParallel(m)))

class Net(nn.Module):
    "A `forward` given as a function of the net and its inputs, and layers by name"
    def __init__(self, f, **layers):
        super().__init__()
        self.f = f
        for k,v in layers.items(): setattr(self, k, v)
    def forward(self, *args, **kwargs): return self.f(self, *args, **kwargs)

def learner(model=None, bs=8, n=32, data=DATA, cls=Learner, **kwargs):
    "A Learner with `n/bs` batches an epoch that shows nothing"
    dls = DataLoaders(DataLoader(Items(data[:n]), bs=bs), DataLoader(Items(data[n:]), bs=8), device=X.device)
    return cls(dls, net() if model is None else model, **dict(dict(loss_func=nn.CrossEntropyLoss(), lr=1e-2), **kwargs))

def fit(learn, n=1, cbs=None, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=cbs, **kwargs)
    return learn

@contextmanager
def warnings_are(action):
    "`warnings.catch_warnings(action=action)`, which Python 3.10 does not have"
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        yield

def convs(model): return [m for m in model.modules() if isinstance(m, nn.Conv2d)]
def zeros(model): return [int((m.weight==0).sum()) for m in convs(model)]
def state(model): return {k:v.detach().clone() for k,v in model.state_dict().items()}
def same(a, b):
    "The same numbers, wherever they are: `load_learner` puts all on the CPU"
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k].to(a[k].device)) for k in a)

def recording(monkeypatch, module):
    "What `module` would record on a GPU is repeated, one by one where nothing records; a list with an entry for each time"
    seen = []
    def counted(device, launches):
        again = record(device, launches) if torch.cuda.is_available() else launches
        def repeat():
            seen.append(again)
            return again()
        return again and repeat
    monkeypatch.setattr(f'{module}.record', counted)
    if not torch.cuda.is_available(): monkeypatch.setattr(f'{module}.can_record', lambda device: True)
    return seen

class Small(nn.Module):
    "Convolutions, a norm and a sum of branches; `tied`, with a weight that is used twice"
    def __init__(self, n=12, tied=False):
        super().__init__()
        self.a,self.bn,self.b,self.c,self.head = nn.Conv2d(1, n, 3), nn.BatchNorm2d(n), nn.Conv2d(n, n, 3, padding=1), nn.Conv2d(n, 8, 3), nn.Linear(8, 4)
        self.again = nn.Conv2d(n, n, 3, padding=1) if tied else None
        if tied: self.again.weight = self.b.weight
    def forward(self, x):
        x = self.bn(self.a(x)).relu()
        x = (x+self.b(x)).relu()
        if self.again is not None: x = (x+self.again(x)).relu()
        return self.head(self.c(x).relu().amax((2, 3)))

class At(Callback):
    "Call `f(self)` at `event`, the `n`-th time (every time by default); in training where it is one of a batch's"
    run_valid = False
    def __init__(self, event, f, n=None, order=80):
        self.f,self.n,self.order,self.seen = f,n,order,0
        setattr(self, event, self._hit)
    def _hit(self):
        self.seen += 1
        if self.n in (None, self.seen): self.f(self)

def raises(ex):
    def f(_): raise ex('stop')
    return f

class Count(TorchDispatchMode):
    "How many operations compute something; a view does not"
    n = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += not op.is_view
        return op(*args, **(kwargs or {}))
