"""What techniques are given where they begin: refused in words, and nothing is left of what was interrupted"""
import copy, pickle, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fasterai.core.needs import need, needed
from fasterai.core.pace import Pace, Training, attach, named_inputs
from fasterai.core.schedule import Schedule, sched_iterative
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
    (4,-1,'at least 0, not -1'), (4,1.5,'not 1.5'), (4,5,'5 of 4 steps cannot be made already')])
def test_numbers_of_steps(n, k, words):
    m = net()
    opt = sgd(m)
    with pytest.raises(ValueError, match=words): attach(Sparsify(50), Training(m, opt), n, k)
    assert not opt._optimizer_step_post_hooks and not m._forward_pre_hooks

@pytest.mark.parametrize('what,training,words', [
    (lambda: Sparsify, None, 'attach takes a technique, such as Sparsify'), (lambda: SparsifyCallback(50), None, 'takes a technique'), (lambda: Sparsifier(net()), None, 'takes a technique'),
    (lambda: Sparsify(50), lambda m,o: m, r'takes a Training\(model, optimizer\), not Sequential'), (lambda: Sparsify(50), lambda m,o: Training(m), 'an optimizer of torch, not NoneType'),
    (lambda: Sparsify(50), lambda m,o: Training(m, sgd(net())), 'holds no parameter of the Sequential: pass the optimizer that was created'),
    (lambda: Distill(net(1)), None, 'Distill is a part of the loss, which an optimizer step does not show')])
def test_kinds(what, training, words):
    m = net()
    opt = sgd(m)
    with pytest.raises((TypeError,ValueError), match=words): attach(what(), Training(m, opt) if training is None else training(m, opt), 4)
    assert not opt._optimizer_step_post_hooks and not m._forward_pre_hooks

def test_twice_and_too_far():
    m,t = net(),Sparsify(50)
    opt = sgd(m)
    with attach(t, Training(m, opt), 2):
        with pytest.raises(ValueError, match='already attached to the optimizer'): attach(t, Training(m, opt), 2)
        for _ in range(2): step(m, opt)
        with pytest.warns(UserWarning, match='more than the 2 steps that Sparsify was attached for'): step(m, opt)
    assert int((m[0].weight==0).sum())==m[0].weight.numel()//2

def test_training():
    with pytest.raises(ValueError, match='n_epoch is a whole number, at least 1, not 0'): Training(net(), None, 0)
    with pytest.raises(TypeError, match='an nn.Module, not str'): Training('model')

@pytest.mark.parametrize('target', [-5, float('nan'), float('inf'), '40', None, [1,2], dict(a=-1)])
def test_targets(target):
    with pytest.raises(ValueError, match='of at least 0'): Pace('lin', target)

def test_pace():
    for n_epoch in (0, 1.5, 'x'):
        with pytest.raises(ValueError, match='n_epoch is a whole number'): Pace('lin', 40., n_epoch=n_epoch)
    with pytest.raises(ValueError, match='the number of steps is a whole number, at least 1, not 0'): Pace('lin', 40.)(1, 0)
    with pytest.raises(ValueError, match='its last step'): Pace('lin', 40.).load_state_dict({})

def test_states_of_others():
    m = net()
    t = Sparsify(50)
    with attach(t, Training(m, sgd(m)), 4): state = t.state_dict()
    for o in (Prune(50), Distill(net(1))):
        with pytest.raises(ValueError, match='this is not a state of'): o.load_state_dict(state)

def test_states_where_there_is_none():
    for o in (Keep(), Regularize()):
        o.load_state_dict({})
        with pytest.raises(ValueError, match='which has none: it contains shared.0.weight.codes'): o.load_state_dict({'shared.0.weight.codes':X})

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
    with pytest.raises(ValueError, match='Extra gets arguments by position in rest, and others by name'): named_inputs(m, (X,3), dict(factor=2.))
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
    assert set(needed)=={'w','w0','w_prev','grad','act','hess'}

def mlp(seed=0, sizes=(8,16,16,4)):
    torch.manual_seed(seed)
    return nn.Sequential(*[o for a,b in zip(sizes, sizes[1:]) for o in (nn.Linear(a, b), nn.ReLU())][:-1])
def weights(m): return [p for p in m.parameters() if p.dim()>1]
def zeros(m): return [int((p==0).sum()) for p in weights(m)]
V = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
def mlp_step(m, opt):
    opt.zero_grad()
    F.cross_entropy(m(V), torch.arange(16)%4).backward()
    opt.step()
LINEAR = dict(layer_type=nn.Linear)

@pytest.mark.parametrize('makes', [(lambda: Sparsify(50, **LINEAR), lambda: Share(2)), (lambda: Sparsify(50, schedule='agp', criteria='taylor', **LINEAR), lambda: Share(3, per_channel=True)),
    (lambda: Regularize('group_l1', 'weight', .1, nn.Linear), lambda: Share(2)), (lambda: Regularize('group_lasso', 'row', .1, nn.Linear), lambda: Sparsify(30, **LINEAR), lambda: Share(2))])
def test_in_whatever_order(makes):
    "Techniques at one optimizer do the same in each order that they were attached in, and stand where they are to hooks of others"
    ends = []
    for order in (makes, makes[::-1]):
        m,seen = mlp(),[]
        opt = torch.optim.SGD(m.parameters(), lr=.1, momentum=.9)
        technique = [o() for o in order]
        handles = [attach(technique[0], Training(m, opt), 6)]
        opt.register_step_post_hook(lambda *args: seen.append(zeros(m)))
        handles += [attach(o, Training(m, opt), 6) for o in technique[1:]]
        for _ in range(6): mlp_step(m, opt)
        for o in handles: o.close()
        for o in technique:
            if isinstance(o, Sparsify):
                assert zeros(m)==[o.sparsity*p.numel()//100 for p in weights(m)]
                if o is technique[0]: assert seen[-1]==zeros(m)
        ends.append(m)
    assert same(*ends)

@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
def test_scaled_gradients(fused, kind):
    "A GradScaler leaves gradients multiplied until a fused optimizer is in its step: what is added to them weighs the same"
    def trained(scale, infinite=()):
        m,t,s = mlp(),Regularize('group_l1', 'weight', 1., nn.Linear),Sparsify(50, criteria='taylor', **LINEAR)
        opt = kind(m.parameters(), lr=.01, fused=fused)
        scaler = torch.amp.GradScaler('cpu', init_scale=scale, growth_interval=100, enabled=scale>1)
        with attach(t, Training(m, opt), 4), attach(s, Training(m, opt), 4):
            for i in range(4+len(infinite)):
                opt.zero_grad()
                loss = F.cross_entropy(m(V), torch.arange(16)%4)
                if i in infinite: loss = loss*float('inf')
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
        return m
    want = trained(1.)
    for o in (trained(2.**12), trained(2.**12, (2,))):  # a step that is left out is none
        assert zeros(o)==zeros(want) and all(torch.allclose(a, b, atol=1e-6) for a,b in zip(o.parameters(), want.parameters()))

@pytest.mark.parametrize('make', [lambda: Sparsify(50, **LINEAR), lambda: Share(2), lambda: Regularize('group_l1', 'weight', 1., nn.Linear), lambda: Prune(50), Keep])
def test_an_optimizer_of_a_part(make):
    "What is to be changed, and is trained by another optimizer, is told by name, and refused if that is all; what is frozen is nobody's"
    def attached(trained, frozen=()):
        m = mlp()
        with torch.no_grad():
            for p in weights(m): p[:2] = 0
        for i in frozen: m[i].requires_grad_(False)
        opt = torch.optim.SGD([p for i in trained for p in m[i].parameters()], .1)
        attach(make(), Training(m, opt, 1, lambda: (V[:2],)), 4).close(False)
    with pytest.warns(UserWarning, match=r'this SGD does not train 2 of 3 parameters that \w+ changes, and .*: 0.weight, 2.weight'): attached([4])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        attached([0,2,4])
        attached([4], frozen=[0,2])
    m = mlp()
    with torch.no_grad():
        for p in weights(m): p[:2] = 0
    before,opt = [p.detach().clone() for p in m.parameters()],torch.optim.SGD([o.bias for o in m if isinstance(o, nn.Linear)], .1)
    with pytest.raises(ValueError, match='this SGD trains none of the parameters that .* changes'): attach(make(), Training(m, opt, 1, lambda: (V[:2],)), 4)
    assert all(torch.equal(a, b) for a,b in zip(m.parameters(), before)) and not opt._optimizer_step_post_hooks

@pytest.mark.parametrize('make', [lambda: Sparsify(50, **LINEAR), lambda: Share(2), lambda: Regularize('group_l1', 'weight', 1., nn.Linear), lambda: Prune(50), Keep])
def test_at_work_elsewhere(make):
    "One technique works in one training at a time, and in the next one after that"
    t,a,b = make(),mlp(),mlp(1)
    with torch.no_grad(): a[0].weight[:2] = b[0].weight[:2] = 0
    opts = [torch.optim.SGD(m.parameters(), .1) for m in (a, b)]
    training = lambda i: Training((a, b)[i], opts[i], 1, lambda: (V[:2],))
    with attach(t, training(0), 2):
        with pytest.raises(ValueError, match='is attached to another training: close that first, or make another'): attach(t, training(1), 2)
        assert not opts[1]._optimizer_step_post_hooks
        for _ in range(2): mlp_step(a, opts[0])
    attach(t, training(1), 2).close(False)
    attach(t, training(0), 2)
    for _ in range(2): mlp_step(a, opts[0])
    attach(t, training(1), 2).close(False)  # the other one has made all steps, and is closed
    assert not opts[0]._optimizer_step_post_hooks and not a._forward_pre_hooks

@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: torch.compile(m, backend='eager'), nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m, backend='eager'))])
@pytest.mark.parametrize('criteria', ['large_final', 'wanda'])
def test_by_place_and_by_name(wrap, criteria):
    "A wrapper passes on what it gets: its inputs go by the names that the model inside has"
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
        def forward(self, x, scale=1.): return self.net(x)*scale
    m = wrap(Scaled())
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    with attach(Sparsify(50, criteria=criteria, **LINEAR), Training(m, opt), 2):
        for _ in range(2):
            opt.zero_grad()
            m(V, scale=2.).sum().backward()
            opt.step()
    assert zeros(m)==[p.numel()//2 for p in weights(m)]

def test_inputs_that_cannot_be_told():
    "Nobody is bothered who does not ask for them"
    for criteria,refuses in (('large_final',False), ('wanda',True)):
        m = Extra()
        opt = sgd(m)
        with attach(Sparsify(50, criteria=criteria), Training(m, opt), 2):
            F.cross_entropy(m(X, 3, factor=.5), Y).backward()
            if not refuses: opt.step()
            else:
                with pytest.raises(ValueError, match='Extra gets arguments by position in rest, and others by name'): opt.step()

@pytest.mark.parametrize('make', [lambda: Sparsify(50), lambda: Prune(50, 'lin'), lambda: Share(2), lambda: Regularize('group_lasso', 'filter', 10.), Keep])
def test_the_model_travels(make):
    "A model, in the middle of training or where that was interrupted, can be pickled and copied, and what comes out is nobody's"
    m = net()
    opt = sgd(m)
    steps = attach(make(), Training(m, opt, 1, lambda: (X[:2],)), 4)
    step(m, opt)
    for o in (pickle.loads(pickle.dumps(m)), copy.deepcopy(m)):
        assert same(o, m)
        o(X[:1])
        assert steps.seen.inputs==()
    step(m, opt)
    steps.close(False)

@pytest.mark.parametrize('wrong', [-1, .5, 'a', None, True])
def test_what_is_no_epoch(wrong):
    for how in ('lth','reset_end'):
        with pytest.raises(ValueError, match='rewind_epoch is a whole number, at least 0, not'): Sparsify(50, rewind_epoch=wrong, **{how:True})

def test_tickets_are_refused_early():
    for wrong in (3, 1, ['a']):
        with pytest.raises(TypeError, match='save_tickets must be True, False or a folder, not'): Sparsify(50, lth=True, save_tickets=wrong)
    m = net()
    with pytest.raises(ValueError, match='save_tickets=True writes into the folder of the training, but this training has none: pass a folder'): attach(Sparsify(50, lth=True, save_tickets=True), Training(m, sgd(m)), 2)
    for wrong in (3, 'net'):
        m = net()
        with pytest.raises(TypeError, match='model must be a part of the trained model, an nn.Module, not'): attach(Sparsify(50, model=wrong), Training(m, sgd(m)), 2)

def test_tickets_of_a_loop(tmp_path):
    m = net()
    opt = sgd(m)
    with attach(Sparsify(50, schedule='iterative', lth=True, save_tickets=tmp_path), Training(m, opt), 4):
        for _ in range(4): step(m, opt)
    assert 'ticket_50.00.safetensors' in [o.name for o in tmp_path.iterdir()]

@pytest.mark.parametrize('how', ['lth', 'reset_end'])
def test_an_epoch_that_never_comes(how):
    "What is to be rewound to, and was never there, is told at the end"
    m = net()
    opt = sgd(m)
    with pytest.warns(UserWarning, match='Sparsify did not rewind: training ended before rewind_epoch 2 began'):
        with attach(Sparsify(50, schedule=Schedule(sched_iterative, .6), rewind_epoch=2, **{how:True}), Training(m, opt, 4), 4, epochs=False):
            for _ in range(4): step(m, opt)
    assert int((m[0].weight==0).sum())==m[0].weight.numel()//2

def test_prunings_that_overlap():
    for both,words in (((30,50),'two of Prune remove channels of 0, 3'), (({'0':30},50),'remove channels of 0'), ((50,{'3':10}),'remove channels of 3'), (({'0':30},{'0':20}),'remove channels of 0'), (({'0':30},{'3':50}),None), (({'0':30,'3':0},{'3':50}),None)):
        m = net()
        opt,before = sgd(m),copy.deepcopy(m.state_dict())
        training = Training(m, opt, 1, lambda: (X[:2],))
        with attach(Prune(both[0], 'lin'), training, 4):
            if words:
                with pytest.raises(ValueError, match=words): attach(Prune(both[1], 'lin'), training, 4)
                assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
                continue
            with attach(Prune(both[1], 'lin'), training, 4):
                for _ in range(4): step(m, opt)
            assert (m[0].out_channels,m[3].out_channels)==(6,3)
