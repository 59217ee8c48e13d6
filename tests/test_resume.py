"""Training that stops, is saved, and goes on in another process ends with the bits of one that never stopped"""
import copy, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper
from fasterai.core.needs import need, needed
from fasterai.core.pace import Training
from fasterai.core.plan import pruned_plan
from fasterai.distill.all import KnowledgeDistillationCallback
from fasterai.prune.all import *
from fasterai.prune.training import Prune
from fasterai.quantize.all import KMeansCallback
from fasterai.quantize.training import Share
from fasterai.regularize.all import RegularizationCallback
from fasterai.sparse.all import *
from fasterai.sparse.training import Sparsify
from safetensors.torch import load_file, save_file
from tiny import Small as Net

torch.manual_seed(0)
X,Y = torch.randn(40, 1, 8, 8),torch.randint(0, 4, (40,))

def learner(path, opt=Adam, seed=0):
    torch.manual_seed(seed)
    load = lambda: DataLoader(list(zip(X, Y)), bs=8, num_workers=0)
    return Learner(DataLoaders(load(), load(), device=X.device), Net(), loss_func=nn.CrossEntropyLoss(), opt_func=opt, lr=1e-2, path=path)

class Stop(Callback):
    order = 100
    def __init__(self, epoch): self.last = epoch
    def after_epoch(self):
        if self.epoch==self.last: raise CancelFitException

class Crash(Callback):
    "As a user who interrupts the kernel"
    def __init__(self, epoch): self.last = epoch
    def before_batch(self):
        if self.epoch==self.last+1: raise KeyboardInterrupt

def fit(learn, n, cbs, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=cbs, **kwargs)

def same(a, b):
    a,b = a.state_dict(),b.state_dict()
    return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def momenta(learn):
    "What the optimizer knows of each parameter"
    opt = getattr(learn.opt, 'opt', learn.opt)
    return [{k:v for k,v in opt.state[p].items()} for ps in learn.opt.param_lists for p in ps]

def alike(a, b):
    for x,y in zip(momenta(a), momenta(b), strict=True):
        assert x.keys()==y.keys()
        for k,v in x.items(): assert torch.equal(v, y[k].to(v.device)) if isinstance(v, torch.Tensor) else v==y[k], k

def teacher(seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(20)

TECHNIQUES = dict(
    large_final=lambda: SparsifyCallback(60, 'weight', 'global'),
    movement=lambda: SparsifyCallback(60, 'weight', 'global', 'movement', 'agp'),
    updating=lambda: SparsifyCallback(60, 'weight', 'local', 'updating_movement', 'cos'),
    few_updates=lambda: SparsifyCallback(70, 'filter', 'local', 'magnitude_increase', 'lin', n_updates=7),
    taylor=lambda: SparsifyCallback(60, 'weight', 'global', 'taylor', 'iterative'),
    wanda=lambda: SparsifyCallback(60, 'weight', 'local', 'wanda', 'lin', n_updates=8),
    pattern=lambda: SparsifyCallback(40, '2:4', schedule='lin', layer_type=(nn.Conv2d,nn.Linear)),
    by_layer=lambda: SparsifyCallback(dict(a=20, b=60, c=40), 'kernel', criteria='movement'),
    back=lambda: SparsifyCallback(60, 'filter', schedule='dsd', criteria='movement'),
    coupled=lambda: SparsifyCallback(50, 'filter', coupled=True, criteria='movmag'),
    erk=lambda: SparsifyCallback(60, 'weight', 'erk', 'large_init', 'one_cycle'),
    tickets=lambda: SparsifyCallback(60, 'weight', 'global', schedule=Schedule(sched_iterative), lth=True),
    tickets_late=lambda: SparsifyCallback(60, 'weight', 'global', schedule=Schedule(sched_iterative, .3), lth=True, rewind_epoch=1, criteria='movement'),
    kmeans=lambda: KMeansCallback(2),
    kmeans_by_channel=lambda: KMeansCallback(2, per_channel=True, init='k-means++'),
    kmeans_beside=lambda: [SparsifyCallback(50, 'weight', criteria='movement', schedule='agp'), KMeansCallback(3)],
    prune=lambda: PruneCallback(50, 'lin', n_updates=8),
    prune_movement=lambda: PruneCallback(60, 'agp', 'global', 'movement', n_updates=12),
    prune_updating=lambda: PruneCallback(50, 'lin', criteria='updating_movement', n_updates=8),
    prune_by_layer=lambda: PruneCallback(dict(a=30, c=50), 'lin', criteria='taylor', n_updates=6),
    penalty=lambda: RegularizationCallback('filter', 1e-2, schedule='lin'),
    two=lambda: [SparsifyCallback(50, 'weight', criteria='movement', layer_type=nn.Linear), SparsifyCallback(30, 'filter', criteria='updating_movement')],
    keep=lambda: KeepSparsity(),
    distill=lambda: KnowledgeDistillationCallback(teacher()),
    distill_maps=lambda: KnowledgeDistillationCallback(teacher(), ['SoftTarget','FitNet'], ['a','b'], ['a','b'], weight=.7, schedule='cos'),
    two_teachers=lambda: [KnowledgeDistillationCallback(teacher(), 'FitNet', 'a', 'a'), KnowledgeDistillationCallback(teacher(2), 'FitNet', 'b', 'b')],
    distill_beside=lambda: [KnowledgeDistillationCallback(teacher(), 'FitNet', 'b', 'b'), SparsifyCallback(50, criteria='movement'), RegularizationCallback('filter')],
)

def fresh(path, name, opt=Adam, seed=0):
    learn = learner(path, opt, seed)
    if name=='keep': learn.model.b.weight.data[:5] = 0
    return learn

@pytest.mark.parametrize('stop', [0,1,2])
@pytest.mark.parametrize('name', TECHNIQUES)
def test_same_bits(name, stop, tmp_path):
    make = TECHNIQUES[name]
    whole = fresh(tmp_path, name)
    fit(whole, 4, make())
    first = fresh(tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it ended early
        fit(first, 4, [*(made if isinstance(made := make(), list) else [made]), Stop(stop)])
    first.save('half')
    again = fresh(tmp_path, name, seed=1)  # as another process makes it
    again.load('half')
    fit(again, 4, make(), start_epoch=stop+1)
    assert same(whole.model, again.model)
    alike(whole, again)
    assert not again.left_off

@pytest.mark.parametrize('name', ['movement','tickets','kmeans','prune_movement','two'])
@pytest.mark.parametrize('how', ['in_the_fit','crash','same_learner'])
def test_ways_to_stop(name, how, tmp_path):
    make = TECHNIQUES[name]
    whole = learner(tmp_path)
    fit(whole, 4, make())
    first,cbs = learner(tmp_path),made if isinstance(made := make(), list) else [made]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if how=='in_the_fit': fit(first, 4, [*cbs, SaveModelCallback(every_epoch=True, with_opt=True)])  # the whole of it: a checkpoint of the middle
        elif how=='crash':
            with pytest.raises(KeyboardInterrupt): fit(first, 4, [*cbs, Crash(1)])
        else: fit(first, 4, [*cbs, Stop(1)])
    if how=='same_learner': again = first
    else:
        again = learner(tmp_path, seed=1)
        if how=='crash': first.save('half')
        again.load('model_1' if how=='in_the_fit' else 'half')
    fit(again, 4, make(), start_epoch=2)
    assert same(whole.model, again.model)
    alike(whole, again)

def test_rewound_at_the_end(tmp_path):
    "A checkpoint of the middle knows what to rewind to"
    make = lambda: SparsifyCallback(60, 'weight', 'global', reset_end=True)
    whole,again = learner(tmp_path),learner(tmp_path, seed=1)
    fit(whole, 4, [make(), SaveModelCallback(every_epoch=True, with_opt=True)])
    again.load('model_2')
    fit(again, 4, make(), start_epoch=3)
    w = torch.manual_seed(0) and Net()
    assert same(whole.model, again.model) and all(torch.equal(a.weight, torch.where(a.weight!=0, b.weight, 0)) for a,b in zip((whole.model.a,whole.model.c), (w.a,w.c)))

@pytest.mark.parametrize('opt', [lambda ps,lr,**kw: OptimWrapper(ps, torch.optim.SGD, lr=lr, momentum=.9), lambda ps,lr,**kw: OptimWrapper(ps, torch.optim.AdamW, lr=lr)])
@pytest.mark.parametrize('name', ['movement','tickets','kmeans','prune_movement'])
def test_optimizers_of_torch(name, opt, tmp_path):
    whole,first,again = learner(tmp_path, opt),learner(tmp_path, opt),learner(tmp_path, opt, 1)
    fit(whole, 4, TECHNIQUES[name]())
    with pytest.warns(UserWarning, match='training ended after step 10 of 20') if name!='kmeans' else warnings.catch_warnings(): fit(first, 4, [TECHNIQUES[name](), Stop(1)])
    first.save('half')
    again.load('half')
    fit(again, 4, TECHNIQUES[name](), start_epoch=2)
    assert same(whole.model, again.model)
    alike(whole, again)

def test_a_pruned_learner_is_loaded_into_a_fresh_one(tmp_path):
    for with_opt in (True,False):
        learn = learner(tmp_path)
        fit(learn, 2, PruneCallback(50))
        learn.save('small', with_opt=with_opt)
        again = learner(tmp_path, seed=3)
        again.load('small', with_opt=with_opt)
        assert same(learn.model, again.model) and pruned_plan(again.model)==pruned_plan(learn.model) and again.model.a.out_channels==6
        if with_opt: alike(learn, again)
        again.load('small', with_opt=with_opt)  # once more
        assert same(learn.model, again.model)
        fit(again, 1, [])
    other = learner(tmp_path)
    fit(other, 1, PruneCallback(20))
    with pytest.raises(ValueError, match='was cut already, and in another way'): other.load('small')

def test_others_read_the_file(tmp_path):
    "What travels along hinders nobody: without the library a checkpoint is an ordinary one"
    learn = learner(tmp_path)
    with pytest.warns(UserWarning, match='training ended'): fit(learn, 4, [SparsifyCallback(50, criteria='movement'), Stop(1)])
    file = learn.save('half', with_opt=False)
    state = torch.load(file, weights_only=True)
    plain = Net()
    assert plain.load_state_dict(state).missing_keys==[] and same(plain, learn.model) and not learn.model._state_dict_hooks and not learn.model._load_state_dict_pre_hooks

def test_nothing_known_is_told(tmp_path):
    learn = learner(tmp_path)
    with pytest.warns(UserWarning, match='at epoch 1, but the earlier state of SparsifyCallback is not known'): fit(learn, 2, SparsifyCallback(50), start_epoch=1)
    fit(learn, 2, RegularizationCallback('filter'), start_epoch=1)  # which has nothing to know

def test_a_state_of_something_else_is_refused(tmp_path):
    learn = learner(tmp_path)
    with pytest.warns(UserWarning, match='training ended'): fit(learn, 4, [SparsifyCallback(50, 'filter', criteria='movement'), Stop(1)])
    learn.save('half')
    again = learner(tmp_path)
    again.load('half')
    with pytest.raises(ValueError, match='was the state saved with another granularity'): fit(again, 4, SparsifyCallback(50, 'weight', criteria='movement'), start_epoch=2)

def test_a_new_fit_begins_anew(tmp_path):
    "What is left of a fit that ended early is nothing to one that begins at its first epoch"
    learn = learner(tmp_path)
    with pytest.warns(UserWarning, match='training ended'): fit(learn, 4, [SparsifyCallback(50, criteria='movement'), Stop(1)])
    other = learner(tmp_path)
    other.model.load_state_dict(learn.model.state_dict())
    learn.opt.clear_state()
    for o in (learn,other): fit(o, 2, SparsifyCallback(50, criteria='movement'))
    assert same(learn.model, other.model)

def test_exported_without_states(tmp_path):
    learn = learner(tmp_path)
    with pytest.warns(UserWarning, match='training ended'): fit(learn, 4, [SparsifyCallback(50, criteria='movement'), Stop(1)])
    import pickle
    assert learn.left_off and not pickle.loads(pickle.dumps(learn.left_off))

class Nested(Callback):
    "Asks how good the model is by itself"
    order,inside = 90,False
    def after_epoch(self):
        if self.inside: return  # which has an end of an epoch of its own
        self.inside = True
        self.learn.validate()
        self.inside = False

@pytest.mark.parametrize('name', TECHNIQUES)
def test_validated_in_the_middle(name, tmp_path):
    "A fit inside of which the learner validates is the same fit"
    plain,nested = fresh(tmp_path, name),fresh(tmp_path, name)
    torch.manual_seed(7)  # adapters begin at random
    fit(plain, 4, TECHNIQUES[name]())
    torch.manual_seed(7)
    fit(nested, 4, [*(made if isinstance(made := TECHNIQUES[name](), list) else [made]), Nested()])
    assert same(plain.model, nested.model)

def broken(i): raise OSError('the disk is gone')

@pytest.mark.parametrize('name', ['movement','kmeans','prune','penalty','keep','distill'])
def test_an_error_before_the_first_batch(name, tmp_path):
    "It is the user's own that is shown, and the next fit is as if there had been none"
    learn = fresh(tmp_path, name)
    data = learn.dls
    learn.dls = DataLoaders(DataLoader(range(8), bs=4, create_item=broken, num_workers=0), data.valid, device=X.device)
    with pytest.raises(OSError, match='the disk is gone'): fit(learn, 1, TECHNIQUES[name]())
    learn.dls = data
    fit(learn, 1, TECHNIQUES[name]())
    assert not any(o._forward_hooks or o._forward_pre_hooks for o in learn.model.modules())

def test_nothing_is_cut_for_weights_that_do_not_fit(tmp_path):
    "A checkpoint of another architecture leaves the model as it was"
    learn = learner(tmp_path)
    fit(learn, 1, PruneCallback(50))
    learn.save('small')
    other = learner(tmp_path)
    other.model.head = nn.Linear(8, 7)
    before = copy.deepcopy(other.model)
    with pytest.raises(ValueError, match='head.weight has shape'): other.load('small')
    assert same(before, other.model) and other.model.a.out_channels==12 and not pruned_plan(other.model)['kept']

# --- a need of one's own

@pytest.fixture(scope='module', autouse=True)
def needs_of_ones_own():
    @need('fisher')
    def fisher(grad): "Square of the gradient"; return grad.square()
    @need('mean_x', then=lambda s: s)
    def mean_x(x): "Sum of what arrives"; return x.abs()
    @need('first_sign', at='start')
    def first_sign(w): "Sign of the weight at the start"; return w.sign()
    @need('last_square', at='update')
    def last_square(w): "Square of the weight at the last update"; return w.square()
    yield
    for o in ('fisher','mean_x','first_sign','last_square'): needed.pop(o)

OWN = dict(fisher=lambda w, fisher: w.square()*fisher, mean_x=lambda w, mean_x: w.abs()*mean_x, first_sign=lambda w, first_sign: w*first_sign, last_square=lambda w, last_square: (w.square()-last_square).abs())

@pytest.mark.parametrize('make', [lambda f: SparsifyCallback(50, 'weight', 'global', f, 'lin'), lambda f: PruneCallback(50, 'lin', criteria=f, n_updates=8)], ids=['sparsify','prune'])
@pytest.mark.parametrize('name', OWN)
def test_needs_of_ones_own(name, make, tmp_path):
    "Tracked, cut along and saved as those of the library"
    whole,first,again = learner(tmp_path),learner(tmp_path),learner(tmp_path, seed=1)
    fit(whole, 4, make(OWN[name]))
    with pytest.warns(UserWarning, match='training ended'): fit(first, 4, [make(OWN[name]), Stop(1)])
    first.save('half')
    again.load('half')
    fit(again, 4, make(OWN[name]), start_epoch=2)
    assert same(whole.model, again.model)

def test_needs_from_data():
    "By hand: exactly the lowest of what the criteria makes of gradients and inputs"
    net = Net()
    for name in ('fisher','mean_x'):
        m = copy.deepcopy(net)
        Sparsifier(m, criteria=OWN[name], data=(X,Y)).sparsify_model(50)
        x = net.eval().bn(net.a(X)).relu()
        if name=='fisher':
            F.cross_entropy(net(X), Y).backward()
            score = net.b.weight.square()*net.b.weight.grad.square()
        else: score = net.b.weight.abs()*x.abs().sum((0,2,3))[None,:,None,None]
        k = score.numel()//2
        assert set((m.b.weight==0).flatten().nonzero().flatten().tolist())==set(score.flatten().argsort()[:k].tolist())

@pytest.mark.parametrize('kind,f,then,words', [('w', lambda w: None, None, 'and is None'), ('w', lambda w: w.sum(), None, r'tensor of shape \(12, 1, 3, 3\), .* and is a tensor of shape \(\)'),
    ('x', lambda x: x, lambda s: s[:1], "'strange' has to be"), ('grad', lambda grad: grad.sum(), None, "'strange' has to be")])
def test_needs_that_do_not_fit(kind, f, then, words):
    need('strange', at='start' if kind=='w' else None, then=then)(f)
    def mine(w, strange): return w*strange
    try:
        with pytest.raises(ValueError, match=words): Sparsifier(Net(), criteria=mine, data=None if kind=='w' else (X,Y)).sparsify_model(50)
    finally: needed.pop('strange')

# --- a loop of one's own

def loop(technique, model, steps, n=20, state=None, opt=None):
    "Steps `steps` of `n` with plain PyTorch"
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if state:
        technique.load_state_dict(state['technique'])
        opt.load_state_dict(state['opt'])
    technique.begin(Training(model, opt, 4, lambda: (X[:2],)))
    for k in steps:
        if (k-1)%5==0: technique.epoch((k-1)//5)
        x,y = X[(k-1)%5*8:][:8],Y[(k-1)%5*8:][:8]
        technique.batch((x,))
        loss = F.cross_entropy(model(x), y)
        if (more := technique.loss(k, n)) is not None: loss = loss+more
        opt.zero_grad()
        loss.backward()
        technique.before_step()
        opt.step()
        technique.after_step(k, n, (x,))
    return dict(technique=technique.state_dict(), opt=opt.state_dict(), model=model.state_dict())

LOOPS = dict(movement=lambda: Sparsify(60, 'weight', 'global', 'movement', 'agp'), tickets=lambda: Sparsify(60, schedule=Schedule(sched_iterative), lth=True), share=lambda: Share(2),
    prune=lambda: Prune(50, 'lin', criteria='movement', n_updates=8), by_layer=lambda: Sparsify(dict(a=20, b=60, c=40), 'kernel', criteria='updating_movement'))

@pytest.mark.parametrize('name', LOOPS)
def test_plain_loop(name, tmp_path):
    "The state is a dict of tensors, which safetensors takes"
    make = LOOPS[name]
    def net():
        torch.manual_seed(0)
        return Net()
    whole = net()
    loop(make(), whole, range(1, 21))
    first = net()
    state = loop(make(), first, range(1, 14))
    save_file({k:v.contiguous() for k,v in state['technique'].items()}, tmp_path/'t.safetensors')
    state['technique'] = load_file(tmp_path/'t.safetensors')
    again = copy.deepcopy(first) if name!='prune' else load_pruned_like(first, net())
    loop(make(), again, range(14, 21), state=copy.deepcopy(state))
    assert same(whole, again)

def load_pruned_like(small, fresh):
    from fasterai.core.plan import cut_to
    cut_to(fresh, pruned_plan(small))
    fresh.load_state_dict(small.state_dict())
    return fresh

class Drops(nn.Module):
    "Draws numbers in each batch"
    def __init__(self):
        super().__init__()
        self.net,self.drop = Net(),nn.Dropout(.3)
    def forward(self, x): return self.net(self.drop(x))

@pytest.mark.parametrize('n', [12, 20])
def test_a_student_that_drops(tmp_path, n):
    "Adapters, or that none is needed, are known of what was saved: the same bits, and no warning"
    cb = lambda: KnowledgeDistillationCallback(teacher, ['SoftTarget','FitNet'], 'net.b', 'b')
    torch.manual_seed(3)
    teacher,kept = Net(n),{}
    class Halfway(Callback):
        order = 100
        def after_epoch(self):
            if self.epoch==1:
                self.learn.save('h')
                kept['rng'] = torch.get_rng_state()
    def drops(seed):
        learn = learner(tmp_path, seed=seed)
        torch.manual_seed(seed)
        learn.model = Drops()
        learn.create_opt()
        return learn
    a,b = drops(0),drops(5)
    fit(a, 4, [cb(), Halfway()])
    b.load('h')
    torch.set_rng_state(kept['rng'])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*is not known')
        fit(b, 4, [cb()], start_epoch=2)
    assert same(a.model, b.model)
