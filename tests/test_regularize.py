"Penalties and their callbacks: what they add, to what, and what they leave alone"
import copy, itertools
import pytest, torch
from fastai.callback.core import CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.optimizer import SGD
from functools import partial
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from fasterai import legacy
from fasterai.core.granularity import available, numbered_by
from fasterai.prune.pruner import Pruner
from fasterai.regularize.all import *
from fasterai.regularize.penalties import penalties
from fasterai.sparse.all import *
from tiny import At, Count, convs, fit, learner, net, raises, recording, same, state, zeros, told

LAYERS = nn.Conv1d(4,6,3), nn.Conv2d(4,6,3), nn.Conv3d(4,6,2), nn.ConvTranspose2d(4,6,3), nn.Linear(4,6), nn.Conv2d(4,6,3,groups=2)

@pytest.mark.parametrize('layer', LAYERS, ids=lambda o: type(o).__name__)
def test_formula(layer):
    "The sum over blocks of the mean of absolute values, from the definition: each weight by the size of its block"
    axes = layer_axes[type(layer)]
    for g in available(axes):
        names = numbered_by(axes, granularities[g])
        size = torch.tensor([layer.weight.shape[i] for i,o in enumerate(axes) if o not in names]).prod() if names!=axes else 1
        assert torch.isclose(penalty(layer.weight, g, axes), layer.weight.abs().sum()/size)
        dims = [i for i,o in enumerate(axes) if o not in names]
        lasso = layer.weight.square().sum(dims).sqrt().sum() if dims else layer.weight.abs().sum()
        assert torch.isclose(penalty(layer.weight, g, axes, penalties['group_lasso'][0]), lasso)

def test_filter_and_weight_differ():
    "In 0.4.1 they were equal to the last digit"
    model = net()
    got = {g: Penalty(model, granularity=g)().item() for g in ('weight','filter')}
    assert got['weight']==pytest.approx(sum(m.weight.abs().sum().item() for m in convs(model)), rel=1e-5)
    assert got['filter']==pytest.approx(sum(m.weight.abs().mean((1,2,3)).sum().item() for m in convs(model)), rel=1e-5)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_precision(dtype):
    "Half precision is summed in single: 1,152 weights of a half are 576, and their gradient is a sign"
    w = nn.Parameter(torch.full((128,1,3,3), .5, dtype=dtype))
    p = penalty(w)
    p.backward()
    assert p.item()==576 and p.dtype==(torch.float64 if dtype==torch.float64 else torch.float32) and (w.grad==1).all()

def test_edge_tiles_and_tied_weights():
    w = torch.arange(1., 10.).view(3,3)
    assert penalty(w, 'block(2,2)', 'oi').item()==pytest.approx((1+2+4+5)/4+(3+6)/2+(7+8)/2+9)
    model = nn.Sequential(nn.Linear(4,4), nn.Linear(4,4))
    model[1].weight = model[0].weight
    assert list(Penalty(model, layer_types=nn.Linear).layers)==['0']

def grads(cbs, n_acc=None, n=32):
    "Gradients of one step, by parameter"
    learn,got = learner(n=n, opt_func=partial(SGD, mom=0.), lr=0.),{}
    cbs = [*cbs, At('before_step', lambda o: got.update({k: p.grad.clone() for k,p in o.model.named_parameters()}) if not got else None, order=80)]
    fit(learn, 1, [*cbs, *([GradientAccumulation(n_acc)] if n_acc else [])])
    return learn,got

@pytest.fixture
def one_pass(monkeypatch): monkeypatch.setattr('fasterai.regularize.penalties._waits_for_python', lambda w: True)

@pytest.fixture(params=['layer by layer','one pass'])
def either_way(request): return request.param=='one pass' and request.getfixturevalue('one_pass')

@pytest.mark.parametrize('n_acc', [None,16,32])
def test_gradient(n_acc, either_way):
    "What is added to the gradient of a step is that of the penalty, once, however many batches are accumulated"
    _,plain = grads([], n_acc)
    learn,ours = grads([RegularizeCallback('group_lasso', 'filter', .5)], n_acc)
    for k,p in net().named_parameters():
        want = .5*p/p.flatten(1).norm(dim=1).view(-1,1,1,1) if p.dim()==4 else torch.zeros_like(p)
        assert torch.allclose(ours[k]-plain[k], want, atol=1e-5), k

def test_losses():
    "The training loss has the penalty, the validation loss is the task's (0.4.1: 2198 instead of 2.24)"
    cb = RegularizeCallback('group_l1', 'filter', 100.)
    a,b = learner(n=32, lr=0., opt_func=SGD),learner(n=32, lr=0., opt_func=SGD)
    fit(a, 1, cb), fit(b, 1)
    pen = Penalty(net(), granularity='filter')().item()
    assert a.recorder.metric_names[-2]=='penalty' and a.recorder.values[0][2]==pytest.approx(pen, rel=1e-5)
    assert a.recorder.values[0][0]==pytest.approx(b.recorder.values[0][0]+100*pen, rel=1e-3)
    assert a.recorder.values[0][1]==pytest.approx(b.recorder.values[0][1], rel=1e-6)
    a.add_cb(cb)
    assert a.validate()[0]==pytest.approx(b.validate()[0], rel=1e-6)

@pytest.mark.parametrize('first', [0,1])
def test_with_sparsify_and_one_schedule(first):
    "A schedule serves both callbacks, in either order, and zeros stay"
    sched = Schedule(sched_agp, .25)
    cbs = [SparsifyCallback(50, 'filter', schedule=sched), RegularizeCallback('group_lasso', 'filter', .1, schedule=sched)]
    seen,learn = [],learner()
    fit(learn, 4, [*(cbs if first else cbs[::-1]), At('after_loss', lambda o: seen.append(cbs[1].technique.weight_at(cbs[1].progress[0]/cbs[1].progress[1])), order=99)])
    assert zeros(learn.model)==[108,288] and seen[:3]==[0,0,0] and seen[-1]==.1 and seen==sorted(seen)

@pytest.mark.parametrize('order', list(itertools.permutations(range(3))), ids=told)
def test_all_three_and_one_schedule(order):
    "Sparsify, distill and regularize in one fit, in any order, with one schedule object: the same weights come out, and each does what it does alone"
    from fasterai.distill.all import KnowledgeDistillationCallback
    sched = Schedule(sched_agp, .25)
    def trained(order):
        torch.manual_seed(0)
        cbs = [SparsifyCallback(50, 'filter', schedule=sched), KnowledgeDistillationCallback(net(1), 'SoftTarget', weight=.5, schedule=sched), RegularizeCallback('group_lasso', 'filter', .1, schedule=sched)]
        learn = learner()
        fit(learn, 3, [cbs[i] for i in order])
        return learn
    learn = trained(order)
    assert zeros(learn.model)==[108,288] and {'sparsity','penalty','SoftTarget'}<=set(learn.recorder.metric_names) and len(learn.recorder.metric_names)==len(learn.recorder.values[-1])+2
    for p,q in zip(learn.model.parameters(), trained((0,1,2)).model.parameters()): assert torch.allclose(p, q, atol=1e-5)

def test_nothing_stays(tmp_path):
    "A second fit, an interrupt, an export, mixed precision, a deep copy"
    cb,learn = RegularizeCallback('group_l1', 'kernel', .1),learner(path=tmp_path)
    keys = list(learn.model.state_dict())
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [cb, At('after_batch', raises(KeyboardInterrupt), n=3)])
    fit(learn, 2, cb)
    fit(learn, 1, [cb, At('after_batch', raises(CancelFitException), n=2)])
    fit(learn, 1, [cb, MixedPrecision()])
    assert cb.penalty is None and list(learn.model.state_dict())==keys and not any(m._forward_hooks for m in learn.model.modules())
    learn.add_cb(cb)
    copy.deepcopy(learn)
    learn.export('x.pkl')
    fit(load_learner(tmp_path/'x.pkl'), 0)

def test_filters_go_losslessly():
    "A group lasso makes whole filters small, a threshold zeroes them, and the Pruner removes them without a change"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,16,3,padding=1), nn.ReLU(), nn.Conv2d(16,16,3,padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,4))
    fit(learner(model, opt_func=partial(SGD, mom=0.)), 60, RegularizeCallback('group_lasso', 'filter', .3), lr=.03)
    Sparsifier(model, 'filter').sparsify_below(.01)
    gone = [int((m.weight==0).flatten(1).all(1).sum()) for m in convs(model)]
    small,x = Pruner().prune_model(model, torch.randn(2,3,6,6)),torch.randn(8,3,6,6)
    model.eval(), small.eval()
    assert all(0<g<16 for g in gone) and [m.out_channels for m in convs(small)]==[16-g for g in gone]
    assert torch.allclose(model(x), small(x), atol=1e-6)

@pytest.mark.parametrize('kw,says', [(dict(criteria='group_laso'), 'group_lasso'), (dict(granularity='filtr'), 'filter'), (dict(criteria='movement'), 'w0'), (dict(layer_types=nn.LSTM), 'Conv2d'), (dict(layer_types='Conv2d'), 'Conv2d'),
    (dict(criteria='random'), 'depend'), (dict(criteria=lambda w: w.detach().abs()), 'depend'), (dict(granularity='i', criteria='slimming'), 'no granularity')], ids=told)
def test_wrong_arguments(kw, says):
    "They are refused before anything is trained"
    learn = learner()
    was = state(learn.model)
    with pytest.raises((ValueError,TypeError), match=says): fit(learn, 1, RegularizeCallback(**kw))
    assert same(was, state(learn.model))
    with pytest.raises((ValueError,TypeError), match=says): Penalty(net(), **kw)

@pytest.mark.parametrize('weight', [-1, float('nan'), 'x', None])
def test_wrong_weights(weight):
    with pytest.raises(ValueError, match='at least 0'): RegularizeCallback(weight=weight)
    with pytest.raises(ValueError, match='at least 0'): RegularizationCallback('filter', weight)

def test_paper_listing_11():
    "`reg_cb = RegularizationCallback(granularity, α)`"
    granularity,alpha = 'filter',1e-2
    reg_cb = RegularizationCallback(granularity, alpha)
    learn = learner()
    fit(learn, 1, reg_cb)
    assert learn.recorder.values[0][2]==pytest.approx(sum(m.weight.abs().mean((1,2,3)).sum().item() for m in convs(learn.model)), rel=1e-5)

def test_old_spelling(monkeypatch):
    monkeypatch.setattr(legacy, '_said', set())
    with pytest.warns(FutureWarning, match='weights'): cb = RegularizationCallback('weights')
    assert cb.technique.pairs==[('group_l1','weight')]

def test_threshold():
    "`sparsify_below` counts: what is below goes, what is equal stays, the best of a layer stays, what is gone stays gone"
    model = nn.Sequential(nn.Conv2d(1,4,1,bias=False), nn.Conv2d(4,4,1,bias=False))
    model[0].weight.data = torch.tensor([.1,.2,.3,.4]).view(4,1,1,1)
    model[1].weight.data.fill_(.05)
    sp = Sparsifier(model, 'filter')
    sp.sparsify_below(.2)
    assert [int((m.weight==0).sum()) for m in model]==[1,12]
    sp.sparsify_below(0.)
    assert [int((m.weight==0).sum()) for m in model]==[1,12]
    sp.sparsify_below(.35)
    assert [int((m.weight==0).sum()) for m in model]==[3,12]
    was = state(model)
    for o in ('x', float('nan'), None):
        with pytest.raises(ValueError, match='threshold'): sp.sparsify_below(o)
    assert same(was, state(model))

# --- all layers in one pass

class Squared(nn.Module):
    def forward(self, w): return w*w+w

class Many(nn.Module):
    "Layers of every sort; of some the weight is computed, of some it is tied, or frozen, or lies in memory in another order"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.last = nn.Conv2d(3,8,3),nn.Conv2d(8,16,3).to(memory_format=torch.channels_last)
        self.t,self.small = nn.ConvTranspose2d(16,8,3),nn.Conv2d(8,8,1)
        self.lin,self.half,self.double = nn.Linear(40,6),nn.Conv2d(4,8,3).bfloat16(),nn.Conv2d(8,16,3).double()
        self.computed,self.tied,self.frozen = nn.Conv2d(8,16,3),nn.Conv2d(3,8,3),nn.Conv2d(8,4,3)
        nn.utils.parametrize.register_parametrization(self.computed, 'weight', Squared())
        self.tied.weight = self.a.weight
        self.deep = nn.Conv2d(16,16,3,groups=16)
        self.gap = nn.Linear(8,4)
        self.gap.weight = nn.Parameter(torch.randn(4,16)[:,::2])
        self.frozen.requires_grad_(False)
        with torch.no_grad(): self.a.weight[0] = 0
    types = nn.Conv2d,nn.ConvTranspose2d,nn.Linear
    def trained(self): return [p for n,p in self.named_parameters() if p.requires_grad and 'bias' not in n]

def biggest(w): return w.abs()  # not marked as pointwise

@pytest.mark.parametrize('criteria', ['group_l1','group_lasso','squared_final','small_final',Criteria('large_final', reducer='sum'),Criteria('squared_final', reducer='max'),Criteria('large_final', normalizer='sum'),biggest],
    ids=lambda o: o if isinstance(o, str) else o.__name__)
@pytest.mark.parametrize('granularity', ['weight','kernel','filter','layer','shared_kernel','block(4,2)'])
def test_one_pass_is_layer_by_layer(criteria, granularity, one_pass):
    "The price, its gradient, and the gradient of that"
    model = Many()
    types = (nn.Conv2d,nn.ConvTranspose2d) if granularity in ('kernel','shared_kernel') else model.types
    pen,ps = Penalty(model, criteria, granularity, types),model.trained()
    got = []
    for price in pen,lambda: sum(pen.by_layer().values()):
        first = torch.autograd.grad(3*price(), ps, allow_unused=True, create_graph=True)
        second = torch.autograd.grad(sum(g.double().square().sum() for g in first if g is not None and g.requires_grad), ps, allow_unused=True) if any(g is not None and g.requires_grad for g in first) else ()
        got.append((price(), torch.autograd.grad(3*price(), ps, allow_unused=True), first, second))
    (ours,*derived),(theirs,*wanted) = got
    assert ours.dtype==theirs.dtype and torch.isclose(ours, theirs, rtol=1e-5)
    for gs,ws in zip(derived, wanted):
        assert [g is None for g in gs]==[w is None for w in ws]
        for g,w,p in zip(gs, ws, ps):
            if g is None: continue
            assert g.dtype==p.dtype and g.shape==p.shape
            assert torch.allclose(g, w, rtol=1e-2 if p.element_size()<4 else 1e-4, atol=1e-6, equal_nan=True)  # of a norm of zeros there is no second derivative
    assert model.frozen.weight.grad is None
    with torch.no_grad(): assert not pen().requires_grad and torch.isclose(pen(), theirs, rtol=1e-5)

def counted(f):
    with Count() as c: f()
    return c.n

@pytest.mark.parametrize('criteria,most', [('group_l1',8), ('group_lasso',15)])
@pytest.mark.parametrize('layout', [torch.contiguous_format,torch.channels_last])
def test_operations_do_not_grow_with_layers(criteria, most, layout, one_pass, monkeypatch):
    monkeypatch.setattr('fasterai.regularize.penalties.can_record', lambda device: False)
    def operations(n, train):
        model = nn.Sequential(*[nn.Conv2d(8,8,3).to(memory_format=layout) for _ in range(n)])
        pen,ws = Penalty(model, criteria, 'filter'),[m.weight for m in model]
        pen()  # blocks are found once
        if train: return counted(lambda: torch.autograd.grad(pen(), ws))
        with torch.no_grad(): return counted(pen)
    assert operations(2, True)==operations(40, True)<=most and operations(2, False)==operations(40, False)<operations(2, True)

def test_nothing_is_waited_for(one_pass):
    "Of fake tensors no value is known: to ask for one raises"
    with FakeTensorMode():
        model = net()
        for c in 'group_l1','group_lasso':
            pen = Penalty(model, c, 'filter')
            assert [g.shape for g in torch.autograd.grad(pen(), [m.weight for m in convs(model)])]==[(8,3,3,3),(8,8,3,3)] and pen.groups[0][1]

@pytest.mark.parametrize('criteria', ['group_l1','group_lasso'])
def test_shapes_that_change(criteria, one_pass):
    "Filters are cut, weights are replaced, moved to another layout or dtype: the price is that of the weights as they are"
    model = net()
    pen = Penalty(model, criteria, 'filter')
    def right():
        price,want = pen(),sum(pen.by_layer().values())
        gs = [torch.autograd.grad(o, [m.weight for m in convs(model)]) for o in (price,want)]
        return torch.isclose(price, want, rtol=1e-5) and all(torch.allclose(a, b, rtol=1e-4) for a,b in zip(*gs))
    assert right()
    model[0].weight = nn.Parameter(model[0].weight[:5].detach().clone())
    assert right()
    model[3].weight.data = model[3].weight.data[:,:5].clone()
    assert right()
    model.to(memory_format=torch.channels_last)
    assert right()
    model.double()
    assert right()

def test_backward_twice_and_in_place(one_pass):
    "As of any loss: the graph is gone after its backward pass, and weights that have changed since are noticed"
    model = net()
    pen = Penalty(model, 'group_lasso', 'filter')
    price = pen()
    price.backward(retain_graph=True)
    once = model[0].weight.grad.clone()
    price.backward()
    assert torch.allclose(model[0].weight.grad, 2*once)
    with pytest.raises(RuntimeError, match='second time'): price.backward()
    price = pen()
    with torch.no_grad(): model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match='inplace'): price.backward()

@pytest.mark.parametrize('criteria', ['group_l1','group_lasso'])
def test_autocast(criteria, one_pass):
    model = net()
    pen = Penalty(model, criteria, 'filter')
    want = torch.autograd.grad(pen(), [m.weight for m in convs(model)])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        price = pen()
        assert price.dtype==torch.float32
        for a,b in zip(torch.autograd.grad(price, [m.weight for m in convs(model)]), want): assert torch.equal(a, b)

@pytest.mark.parametrize('criteria', ['group_l1','group_lasso'])
def test_recorded(criteria, one_pass, monkeypatch):
    "What is repeated from the third time on follows the weights, and stays what it was after the next time"
    seen = recording(monkeypatch, 'fasterai.regularize.penalties')
    model = net()
    pen,layers = Penalty(model, criteria, 'filter'),convs(model)
    def both(): return pen(), sum(pen.by_layer().values())
    def step(ours, plain):
        ours,want = (torch.autograd.grad(o, [m.weight for m in layers]) for o in (ours, plain))
        assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(ours, want))
    for i in range(4):
        ours,plain = both()
        assert torch.allclose(ours, plain)
        step(ours, plain)
        with torch.no_grad():
            for m in layers: m.weight *= 1.5
    assert len(seen)==3
    first = both()
    with torch.no_grad(): pen()
    with torch.no_grad(): pen()
    assert len(seen)==5 and torch.allclose(pen(), first[1])
    step(*first)
    layers[0].weight = nn.Parameter(2*layers[0].weight.detach())
    n = len(seen)
    ours,plain = both()
    assert torch.allclose(ours, plain) and len(seen)==n
    again = copy.deepcopy(pen)
    assert torch.allclose(again(), plain)

def test_what_is_not_recorded(one_pass, monkeypatch):
    "A criteria of one's own"
    seen = recording(monkeypatch, 'fasterai.regularize.penalties')
    def mine(w): return w.abs()
    mine.pointwise = True
    pen = Penalty(net(), mine, 'filter')
    for _ in range(4): pen()
    assert not seen

def test_fit_is_the_same_either_way(monkeypatch):
    "Filters are cut and others pulled to zero in one fit"
    from fasterai.prune.all import PruneCallback
    models = []
    for one in False,True:
        monkeypatch.setattr('fasterai.regularize.penalties._waits_for_python', lambda w: one)
        learn = learner(opt_func=SGD)
        fit(learn, 3, [PruneCallback(50, schedule='lin'), RegularizeCallback('group_lasso', 'filter', .1)])
        models.append(learn.model)
    a,b = map(state, models)
    assert a.keys()==b.keys() and convs(models[0])[0].out_channels<8 and all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a)
