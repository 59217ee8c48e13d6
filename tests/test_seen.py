"""Criteria that need gradients or activations, and layers that never get any, or get some now and then"""
import copy
from functools import partial
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fastai.optimizer import OptimWrapper
from fasterai.analyze.all import sensitivity
from fasterai.core.all import *
from fasterai.core.evidence import arrived, check_seen, found_now, weight_of
from fasterai.prune.all import *
from fasterai.sparse.all import *
from tiny import At, Net, X, Y, fit, learner, same, state

def conv(i, o): return nn.Conv2d(i, o, 3, padding=1)
def pooled(x): return x.mean((2,3))

def encoder(norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0., batch_first=True, norm_first=norm_first)
    return Net(lambda s,x: s.head(s.body(s.stem(x.flatten(2))).mean(1)), stem=nn.Linear(36, 8), body=nn.TransformerEncoder(layer, 2), head=nn.Linear(8, 4))

def two_heads():
    "The second head is never called"
    torch.manual_seed(0)
    return Net(lambda s,x: s.head(pooled(s.a(x).relu())), a=conv(3,8), head=nn.Linear(8,4), spare=nn.Linear(8,4))

def functional():
    "A layer whose weight is read by another's forward"
    torch.manual_seed(0)
    return Net(lambda s,x: F.linear(pooled(s.a(x).relu()), s.head.weight, s.head.bias), a=conv(3,8), head=nn.Linear(8,4))

def detached():
    "A layer that runs, and has no part in what is trained"
    torch.manual_seed(0)
    return Net(lambda s,x: s.head(pooled(s.a(x).relu()+s.b(x).detach())), a=conv(3,8), b=conv(3,8), head=nn.Linear(8,4))

class Told(nn.Module):
    "A second output, which the loss does not read"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.head,self.other = conv(3,8),nn.Linear(8,4),nn.Linear(8,4)
    def forward(self, x):
        x = pooled(self.a(x).relu())
        return self.head(x),self.other(x)

def first(out, y): return F.cross_entropy(out[0], y)

NEVER = [(encoder, 'wanda', 'out_proj', {}), (lambda: encoder(True), 'wanda', 'out_proj', {}), (two_heads, 'wanda', 'spare', {}), (two_heads, 'taylor', 'spare', {}),
    (functional, 'wanda', 'head', {}), (detached, 'taylor', 'b', {}), (Told, 'taylor', 'other', dict(loss_func=first)), (two_heads, lambda w, act, grad: w.abs()*act+grad.abs(), 'spare', {})]
BOTH = dict(layer_type=(nn.Conv2d,nn.Linear))

@pytest.mark.parametrize('make,criteria,layer,how', NEVER)
@pytest.mark.parametrize('context', ['local','global'])
@pytest.mark.parametrize('train', [True,False])
def test_refused_before_training(make, criteria, layer, how, context, train):
    "In a fit, and with data; nothing is changed, the layer is named, and what is to be done"
    learn,steps = learner(make().train(train), **how),[]
    before = state(learn.model)
    with pytest.raises(ValueError, match=rf'{layer}\.weight.*layer_type'): fit(learn, 1, [SparsifyCallback(50, context=context, criteria=criteria, schedule=lin, **BOTH), At('after_loss', steps.append)])
    assert not steps and same(before, state(learn.model)) and not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    model = make().train(train)
    with pytest.raises(ValueError, match=rf'{layer}\.weight.*layer_type'): Sparsifier(model, context=context, criteria=criteria, data=[(X[:8],Y[:8]),(X[8:16],Y[8:16])], **BOTH, **how).sparsify_model(50)
    assert same(before, state(model)) and all(m.training is train for m in model.modules())

@pytest.mark.parametrize('make,criteria,layer,how', NEVER)
def test_what_helps(make, criteria, layer, how):
    "To say how sparse other layers are to be, in a fit and with data; or another criteria"
    names = [n for n,m in make().named_modules() if isinstance(m, (nn.Conv2d,nn.Linear)) and layer not in n]
    target = dict.fromkeys(names, 50)
    learn = fit(learner(make(), **how), 2, SparsifyCallback(target, criteria=criteria, schedule=lin, **BOTH))
    model = make()
    Sparsifier(model, criteria=criteria, data=(X,Y), **BOTH, **how).sparsify_model(target)
    for o in (learn.model, model):
        assert all(int((o.get_submodule(n).weight==0).sum())==o.get_submodule(n).weight.numel()//2 for n in names)
        assert all(m.weight.count_nonzero()==m.weight.numel() for n,m in o.named_modules() if layer in n and hasattr(m, 'weight'))
    fit(learner(make(), **how), 1, SparsifyCallback(50, schedule=lin, **BOTH))

def test_one_layer_at_a_time():
    model = encoder()
    sp = Sparsifier(model, criteria='wanda', data=(X,Y), layer_type=nn.Linear)
    sp.sparsify_layer('body.layers.0.linear1', 50)
    assert (model.body.layers[0].linear1.weight==0).sum()==48

def test_sensitivity_is_refused_before_it_measures():
    seen = []
    for criteria in ('wanda','taylor'):
        with pytest.raises(ValueError, match=r'spare\.weight'): sensitivity(two_heads(), lambda m: seen.append(1) or 0., levels=[50], criteria=criteria, data=(X,Y), progress=False)
    assert not seen

# --- layers that run now and then

class Sometimes(nn.Module):
    "`b` runs in every third batch of training, and `a` always"
    def __init__(self, every=3):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.b,self.head,self.every,self.seen = conv(3,8),conv(8,8),nn.Linear(8,4),every,0
    def forward(self, x):
        x = self.a(x).relu()
        if not self.training or self.seen%self.every==0: x = x+self.b(x)
        if self.training: self.seen += 1
        return self.head(pooled(x))

class Experts(nn.Module):
    "Half of the samples go to one layer, half to another; in some batches none goes to the second"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem,self.experts,self.head,self.runs = conv(3,6),nn.ModuleList([nn.Linear(6,6),nn.Linear(6,6)]),nn.Linear(6,4),0
    def forward(self, x):
        x = pooled(self.stem(x))
        self.runs += self.training
        second = torch.arange(len(x), device=x.device)%2==1 if self.runs%4<2 else torch.zeros(len(x), dtype=torch.bool, device=x.device)
        out = torch.zeros_like(x)
        for o,which in zip(self.experts, (~second,second)):
            if which.any(): out[which] = o(x[which])
        return self.head(out.relu())

class Auxiliary(nn.Module):
    "A second head that runs in training only"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.b,self.head,self.aux = conv(3,8),conv(8,8),nn.Linear(8,4),nn.Linear(8,4)
    def forward(self, x):
        x = self.a(x).relu()
        y = self.head(pooled(self.b(x).relu()))
        return y+.3*self.aux(pooled(x)) if self.training else y

@pytest.mark.parametrize('make', [Sometimes, Experts, Auxiliary])
@pytest.mark.parametrize('criteria', ['wanda','taylor'])
@pytest.mark.parametrize('opt', [None,torch.optim.SGD,torch.optim.AdamW], ids=str)
def test_layers_that_run_in_some_batches(make, criteria, opt):
    "The fit goes on to the end, with half of each layer gone"
    learn = learner(make(), **({} if opt is None else dict(opt_func=partial(OptimWrapper, opt=opt))))
    fit(learn, 2, SparsifyCallback(50, criteria=criteria, schedule=lin, **BOTH))
    assert all(int((m.weight==0).sum())==m.weight.numel()//2 for m in learn.model.modules() if isinstance(m, (nn.Conv2d,nn.Linear)))

@pytest.mark.parametrize('make', [Sometimes, Auxiliary])
@pytest.mark.parametrize('criteria', ['wanda','taylor'])
def test_channels_of_layers_that_run_in_some_batches(make, criteria):
    learn = learner(make(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    fit(learn, 2, PruneCallback(50, criteria=criteria))
    assert learn.model.a.out_channels==4

def test_pruning_is_refused_before_training():
    "What is made by a layer that never gets a gradient, or has no activations of its own"
    for make,criteria in ((functional,'wanda'), (detached,'taylor')):
        learn,steps = learner(make()),[]
        before = state(learn.model)
        cb = PruneCallback(50, criteria=criteria)
        if make is functional: fit(learn, 1, cb); continue  # the head's outputs stay, so that nobody asks
        with pytest.raises(ValueError, match=r'b\.weight.*ignored_layers'): fit(learn, 1, [cb, At('after_loss', steps.append)])
        assert not steps and same(before, state(learn.model))

def test_what_was_seen():
    "Zeros where a layer had no part; what an earlier batch told; none of it leaves a trace"
    model = Sometimes()
    ws = [weight_of(model, f'{o}.weight') for o in ('a','b','head')]
    acts = check_seen(criterias['wanda'], ws, model, X[:4])['act']
    assert set(acts)=={'a.weight','b.weight','head.weight'} and model.training and model.seen==0
    model.seen = 1
    F.cross_entropy(model(X), Y).backward()
    now = found_now(criterias['taylor'], ws, model, X)['grad']
    assert not now['b.weight'].any() and now['a.weight'] is model.a.weight.grad
    idle = two_heads()
    ws = [weight_of(idle, 'spare.weight')]
    assert arrived(['act'], idle, X, ws)==dict(act={}) and found_now(criterias['wanda'], ws, idle, X)['act']['spare.weight'].shape==(1,1)
    with pytest.raises(ValueError, match='unfreeze'): check_seen(criterias['taylor'], [weight_of(two_heads().requires_grad_(False), 'a.weight')], two_heads(), X)
