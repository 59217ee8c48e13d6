"""What techniques are given where they begin: refused in words, and nothing is left of what was interrupted"""
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fasterai.core.needs import need, needed
from fasterai.core.pace import Pace, Training, attach, named_inputs
from fasterai.distill.training import Distill
from fasterai.prune.training import Prune
from fasterai.quantize.training import Share
from fasterai.regularize.training import Regularize
from fasterai.sparse.all import SparsifyCallback
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.training import Keep, Sparsify

torch.manual_seed(0)
X,Y = torch.randn(8, 3, 8, 8),torch.randint(0, 4, (8,))
def net(seed=0, n=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, n, 3), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
def sgd(m): return torch.optim.SGD(m.parameters(), lr=.1, momentum=.9)
def step(m, opt):
    opt.zero_grad()
    F.cross_entropy(m(X), Y).backward()
    opt.step()
def same(a, b): return all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values()))

@pytest.mark.parametrize('n,k,words', [(0,0,'at least 1, not 0'), (None,0,'at least 1, not None'), ('10',0,"not '10'"), (-3,0,'not -3'), (2.5,0,'not 2.5'), (True,0,'not True'),
    (4,-1,'at least 0, not -1'), (4,1.5,'not 1.5'), (4,5,'5 of 4 steps cannot have been made')])
def test_numbers_of_steps(n, k, words):
    m = net()
    opt = sgd(m)
    with pytest.raises(ValueError, match=words): attach(Sparsify(50), Training(m, opt), n, k)
    assert not opt._optimizer_step_post_hooks and not m._forward_pre_hooks

@pytest.mark.parametrize('what,training,words', [
    (lambda: Sparsify, None, 'attach takes a technique, such as Sparsify'), (lambda: SparsifyCallback(50), None, 'takes a technique'), (lambda: Sparsifier(net()), None, 'takes a technique'),
    (lambda: Sparsify(50), lambda m,o: m, r'takes a Training\(model, optimizer\), not Sequential'), (lambda: Sparsify(50), lambda m,o: Training(m), 'of an optimizer of torch, not NoneType'),
    (lambda: Sparsify(50), lambda m,o: Training(m, sgd(net())), 'holds no parameter of the Sequential: it was made for another model'),
    (lambda: Distill(net(1)), None, 'Distill is a part of the loss, which steps do not show')])
def test_kinds(what, training, words):
    m = net()
    opt = sgd(m)
    with pytest.raises((TypeError,ValueError), match=words): attach(what(), Training(m, opt) if training is None else training(m, opt), 4)
    assert not opt._optimizer_step_post_hooks and not m._forward_pre_hooks

def test_twice_and_too_far():
    m,t = net(),Sparsify(50)
    opt = sgd(m)
    with attach(t, Training(m, opt), 2):
        with pytest.raises(ValueError, match='attached to the optimizer already'): attach(t, Training(m, opt), 2)
        for _ in range(2): step(m, opt)
        with pytest.warns(UserWarning, match='more than the 2 steps are made that Sparsify was attached for'): step(m, opt)
    assert int((m[0].weight==0).sum())==m[0].weight.numel()//2

def test_training():
    with pytest.raises(ValueError, match='n_epoch is a whole number, at least 1, not 0'): Training(net(), None, 0)
    with pytest.raises(TypeError, match='an nn.Module, not str'): Training('model')

@pytest.mark.parametrize('target', [-5, float('nan'), float('inf'), '40', None, [1,2], dict(a=-1)])
def test_targets(target):
    with pytest.raises(ValueError, match='not negative'): Pace('lin', target)

def test_pace():
    for n_epoch in (0, 1.5, 'x'):
        with pytest.raises(ValueError, match='n_epoch is a whole number'): Pace('lin', 40., n_epoch=n_epoch)
    with pytest.raises(ValueError, match='the number of steps is a whole number, at least 1, not 0'): Pace('lin', 40.)(1, 0)
    with pytest.raises(ValueError, match='has its last step'): Pace('lin', 40.).load_state_dict({})

def test_states_of_others():
    m = net()
    t = Sparsify(50)
    with attach(t, Training(m, sgd(m)), 4): state = t.state_dict()
    for o in (Prune(50), Distill(net(1))):
        with pytest.raises(ValueError, match='this is no state of'): o.load_state_dict(state)

def test_states_where_there_is_none():
    for o in (Keep(), Regularize()):
        o.load_state_dict({})
        with pytest.raises(ValueError, match='which has none: it has shared.0.weight.codes'): o.load_state_dict({'shared.0.weight.codes':X})

def test_epochs_of_a_loop():
    "They begin every n/n_epoch steps, also where that is no whole number, and on going on"
    class Tell(Keep):
        def epoch(self, i): seen.append((k, i))
    for n,n_epoch,begins in ((6,3,[(0,0),(2,1),(4,2)]), (7,2,[(0,0),(4,1)]), (2,4,[(0,0),(1,2)]), (3,1,[(0,0)])):
        m,seen,k = net(),[],0
        opt = sgd(m)
        with attach(Tell(), Training(m, opt, n_epoch), n):
            for k in range(1, n+1): step(m, opt)
        assert seen==begins
    seen,k = [],4
    attach(Tell(), Training(m, opt, 3), 6, 4).close(False)
    attach(Tell(), Training(m, opt, 3), 6, 3).close(False)
    attach(Tell(), Training(m, opt, 3), 6, epochs=False).close(False)
    assert seen==[(4,2)]

class Extra(nn.Module):
    "Gets what it does not name"
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x, *rest, **more): return self.net(x)*more.get('factor', 1.)

def test_inputs_as_they_were_given():
    m = Extra()
    assert named_inputs(m, (X,), {})==(X,) and set(named_inputs(m, (X,), dict(factor=2.)))=={'x','factor'}
    with pytest.raises(ValueError, match='Extra gets arguments by place, as rest, and others by name'): named_inputs(m, (X,3), dict(factor=2.))
    opt = sgd(m)
    with attach(Sparsify(50, criteria='wanda'), Training(m, opt), 2):
        for _ in range(2):
            opt.zero_grad()
            F.cross_entropy(m(X, factor=.5), Y).backward()
            opt.step()
    assert int((m.net[0].weight==0).sum())==m.net[0].weight.numel()//2

@pytest.mark.parametrize('make', [lambda: Sparsify(50), lambda: Prune(50, 'lin'), lambda: Share(2), lambda: Regularize('group_lasso', 'filter', 10.), Keep])
def test_interrupted(make):
    "The same technique works for the next model as if it were new"
    t,m = make(),net()
    opt = sgd(m)
    with pytest.raises(KeyboardInterrupt):
        with attach(t, Training(m, opt, 1, lambda: (X[:2],)), 4):
            step(m, opt)
            raise KeyboardInterrupt
    assert not opt._optimizer_step_post_hooks and not opt._optimizer_step_pre_hooks and not m._forward_pre_hooks
    a,b = net(3),net(3)
    for m,o in ((a,t),(b,make())):
        opt = sgd(m)
        with attach(o, Training(m, opt, 1, lambda: (X[:2],)), 4):
            for _ in range(4): step(m, opt)
    assert same(a, b) and not same(a, net(3))

def test_adapters_leave_with_an_interrupt():
    m = net()
    opt = sgd(m)
    n = len(opt.param_groups[0]['params'])
    for _ in range(2):
        t = Distill(net(1, 12), 'FitNet', ['0'], ['0'])
        with pytest.raises(KeyboardInterrupt):
            with attach(t, Training(m, opt), 4, adds=False):
                t.get_ready(X)
                assert len(opt.param_groups[0]['params'])>n
                raise KeyboardInterrupt
        assert len(opt.param_groups[0]['params'])==n and not opt._optimizer_state_dict_post_hooks

@pytest.mark.parametrize('args,words', [((3,),'name of a parameter, not 3'), (('a b',),'name of a parameter'), (('q',None,3),'then is a function'), (('q','sometimes'),'at=')])
def test_needs(args, words):
    with pytest.raises(ValueError, match=words): need(*args)(lambda w: w)
    assert set(needed)=={'w','w0','w_prev','grad','act'}
