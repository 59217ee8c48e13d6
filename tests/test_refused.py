"""What cannot be is refused at the door, by every function alike: inputs that a model does not run with, what is no model, numbers that are not there, a criteria without
numbers. And whoever gets much less than was asked for is told once."""
import copy, warnings
from functools import partial
import pytest, torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from fasterai.analyze.all import sensitivity
from fasterai.analyze.counts import answers, latency, n_bytes, n_macs, n_nonzero, n_params, told_right
from fasterai.core.running import explained
from fasterai.distill.all import Distiller, match_feature_layers
from fasterai.misc.all import BN_Folder, Conv_Decomposer, FC_Decomposer
from fasterai.prune.all import PruneCallback, Pruner, load_pruned, save_pruned
from fasterai.prune.pruner import pruned_plan
from fasterai.quantize.all import KMeansQuantizer, load_compressed, save_compressed
from fasterai.quantize.weight_sharing import bits_by_name
from fasterai.regularize.all import Penalty
from fasterai.report.all import report
from fasterai.report.plots import show_channels, show_sparsity
from fasterai.report.tables import summary
from fasterai.sparse.all import Sparsifier, SparsifyCallback
from fasterai.sparse.sparsifier import hold_zeros
from tiny import WRAPPERS, Net, fit, learner, net, state, same, warnings_are

X,Y = torch.randn(2,3,6,6, generator=torch.Generator().manual_seed(0)),torch.zeros(2, dtype=torch.long)
maps = partial(Distiller, loss='Attention', activations_student='0', activations_teacher='0')
quick = partial(report, repeats=6, warmup=0, progress=False)
def total(m): return float(m(X).sum())
def file(f): return lambda m,tmp: f(m, tmp/'new')

# --- every function that takes a model, and every one that takes inputs

ALL = dict(pruner=lambda m,t: Pruner(m, 40, example_inputs=X).prune_model(), lossless=lambda m,t: Pruner().prune_model(m, X), plan=lambda m,t: pruned_plan(m), save_pruned=file(save_pruned),
    load_pruned=lambda m,t: load_pruned(t/'pruned', m), sparsifier=lambda m,t: Sparsifier(m, 'filter', example_inputs=X).sparsify_model(40), hold=lambda m,t: hold_zeros(m, X), penalty=lambda m,t: Penalty(m)(),
    coupled=lambda m,t: Sparsifier(m, 'filter', coupled=True, example_inputs=X), share=lambda m,t: KMeansQuantizer(2).quantize(m), bits=lambda m,t: bits_by_name(m, 2), save_compressed=file(save_compressed),
    load_compressed=lambda m,t: load_compressed(t/'compressed', m), fold=lambda m,t: BN_Folder().fold(m, X), fc=lambda m,t: FC_Decomposer().decompose(m, example_inputs=X), conv=lambda m,t: Conv_Decomposer().decompose(m, method='svd', example_inputs=X),
    teacher=lambda m,t: maps(m).prepare(net(1), X), student=lambda m,t: maps(net(1)).prepare(m, X), student_alone=lambda m,t: Distiller(net(1)).check(m), match=lambda m,t: match_feature_layers(m, net(), X), match_teacher=lambda m,t: match_feature_layers(net(), m, X),
    sensitivity=lambda m,t: sensitivity(m, total, [50], progress=False), n_params=lambda m,t: n_params(m), n_bytes=lambda m,t: n_bytes(m), n_nonzero=lambda m,t: n_nonzero(m), n_macs=lambda m,t: n_macs(m, X),
    latency=lambda m,t: latency(m, example_inputs=X, repeats=1, progress=False), answers=lambda m,t: answers(m, data=X, progress=False), told_right=lambda m,t: told_right(m, data=(X,Y), progress=False),
    summary=lambda m,t: summary(m, X), report=lambda m,t: quick(dict(a=m, b=net(1)), example_inputs=X), show_sparsity=lambda m,t: show_sparsity(m), show_channels=lambda m,t: show_channels(m, net()))

INPUTS = dict(pruner=lambda x: Pruner(net(), 40, example_inputs=x).prune_model(), lossless=lambda x: Pruner().prune_model(net(), x), sparsifier=lambda x: Sparsifier(net(), 'filter', example_inputs=x).sparsify_model(40),
    coupled=lambda x: Sparsifier(net(), 'filter', coupled=True, example_inputs=x), hold=lambda x: hold_zeros(Sparsifier(net(), 'filter').sparsify_model(40), x), fold=lambda x: BN_Folder(x).fold(net()),
    fc=lambda x: FC_Decomposer().decompose(net(), example_inputs=x), conv=lambda x: Conv_Decomposer().decompose(net(), macs=10**6, example_inputs=x), maps=lambda x: maps(net(1)).prepare(net(), x), match=lambda x: match_feature_layers(net(), net(), x),
    sensitivity=lambda x: sensitivity(net(), total, [50], example_inputs=x, progress=False), pruning=lambda x: sensitivity(net(), total, [50], kind='pruning', example_inputs=x, progress=False),
    targets=lambda x: sensitivity(net(), total, [50], progress=False).targets(macs=10**6, example_inputs=x), n_macs=lambda x: n_macs(net(), x), latency=lambda x: latency(net(), example_inputs=x, repeats=1, progress=False),
    summary=lambda x: summary(net(), x), report=lambda x: quick(net(), net(), example_inputs=x))
WRONG = dict(channels=(torch.randn(1,5,6,6), '0, a Conv2d, takes 3 channels'), dimensions=(torch.randn(1,3), r'float32 \[1, 3\]'), empty=(torch.randn(0,3,6,6), 'no sample'), shape=((1,3,6,6), r'pass a tensor, torch.randn\(1, 3, 6, 6\)'),
    meta=(torch.randn(1,3,6,6,device='meta'), 'meta'), whole=(torch.zeros(1,3,6,6,dtype=torch.long), r'int64 \[1, 3, 6, 6\]'), name=(dict(y=X), 'y: float32'))

@pytest.mark.parametrize('wrong', WRONG)
@pytest.mark.parametrize('use', INPUTS)
def test_inputs(use, wrong):
    given,said = WRONG[wrong]
    with pytest.raises(ValueError, match=f'(?s){said}'), warnings_are('ignore'): INPUTS[use](given)

def test_batches_that_do_not_run():
    bad = torch.randn(2,5,6,6)
    for f in (lambda: answers(net(), data=(bad,Y)), lambda: told_right(net(), data=(bad,Y)), lambda: quick(net(), net(), (bad,Y))):
        with pytest.raises(ValueError, match='(?s)takes 3 channels.*Data must be batches'): f()
    images = Net(lambda m,xs: torch.stack([m.a(x[None]).mean((2,3))[0] for x in xs]) if isinstance(xs, list) else 1/0, a=nn.Conv2d(3,4,3))
    with pytest.raises(ValueError, match=r'a batch is \(\[image\], y\)'): quick(images, copy.deepcopy(images), ([X[0]],))
    assert len(quick(images, copy.deepcopy(images), [([X[0]],)]))==len(quick(images, copy.deepcopy(images), example_inputs=([X[0]],)))==2

def test_a_device_without_memory_is_no_wrong_input():
    with pytest.raises(torch.OutOfMemoryError):
        with explained(net(), X): raise torch.OutOfMemoryError('full')

# --- what is no model

@pytest.mark.parametrize('given', [lambda: None, lambda: 3, lambda: 'resnet18', lambda: net().state_dict(), lambda: nn.ReLU, lambda: [net()]], ids=['none','number','name','state','class','list'])
@pytest.mark.parametrize('use', ALL)
def test_no_model(use, given, tmp_path):
    with pytest.raises((TypeError,ValueError)) as e: ALL[use](given(), tmp_path)
    assert 'model' in str(e.value) or 'nn.Module' in str(e.value), e.value
    assert 'fasterai' in str(e.traceback[-1].path)

def test_no_layers():
    for f in (lambda o: Pruner(net(), 40, ignored_layers=o), lambda o: Distiller(net(), 'Attention', o, '0'), lambda o: Distiller(net(), 'Attention', '0', o)):
        for o in (5, X, .5):
            with pytest.raises(ValueError, match='(ignored_layers|activations_.*) must be layers or their names'): f(o)
    with pytest.raises(ValueError, match='ignored_layers must be layers'): fit(learner(), cbs=PruneCallback(40, ignored_layers=5))

def test_no_optimizer():
    other = torch.optim.SGD(net().parameters(), lr=.1)
    for o,said in ((3,'must be an optimizer of torch or fastai'), (torch.optim.SGD,'must be an optimizer of torch or fastai'), (other,'holds no parameter of the Sequential')):
        m = net()
        was = state(m)
        with pytest.raises(ValueError, match=said): Pruner(m, 40, example_inputs=X).prune_model(optimizer=o)
        assert same(was, state(m))
    with pytest.raises(ValueError, match='make a new optimizer'): Pruner().prune_model(net(), X, optimizer=other)

# --- numbers that are not there

def with_weight(f):
    def make():
        m = net()
        m[-1].weight = nn.Parameter(f(m[-1].weight.detach()), requires_grad=False)
        return m
    return make
def lazy():
    m = net()
    m[-1] = nn.LazyLinear(4)
    return m

AWAY = dict(meta=(lambda: net().to('meta'), '0.weight.*meta device'), lazy=(lazy, '8.weight.* ha(s|ve) no shape yet'), sparse=(with_weight(lambda w: w.to_sparse_csr()), '8.weight is stored as torch.sparse_csr'),
    quantized=(with_weight(lambda w: torch.quantize_per_tensor(w, .1, 0, torch.qint8)), r'8.weight is a \w+ of torch.qint8'), own=(with_weight(lambda w: TwoTensor(w, w.clone())), '8.weight is a TwoTensor'))
HELD = 'save_pruned','load_pruned','save_compressed','load_compressed','fold','fc','conv','n_nonzero','summary','report','show_sparsity'

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('use', HELD)
@pytest.mark.parametrize('away', AWAY)
def test_numbers_that_are_not_there(use, away, tmp_path):
    save_pruned(net(), tmp_path/'pruned'), save_compressed(net(), tmp_path/'compressed')
    make,said = AWAY[away]
    if away=='meta' and use in ('fc','conv'): return ALL[use](make(), tmp_path)  # shapes need no numbers
    with pytest.raises(ValueError, match=said): ALL[use](make(), tmp_path)

@pytest.mark.parametrize('use', ['latency','answers','told_right','teacher'])
def test_what_runs_needs_values(use, tmp_path):
    with pytest.raises(ValueError, match='0.weight.*meta device'): ALL[use](net().to('meta'), tmp_path)

@pytest.mark.filterwarnings('ignore')
def test_sharded(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    try: from torch.distributed.fsdp import fully_shard
    except ImportError: from torch.distributed._composable.fsdp import fully_shard  # its place in older releases
    save_pruned(net(), tmp_path/'pruned')
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        for use in {*HELD,'pruner','lossless','sensitivity'}:  # masks and shared values are made of shards, too
            m = fully_shard(net(), mesh=init_device_mesh('cpu', (1,)))
            with pytest.raises(ValueError, match='0.weight is a DTensor'): ALL[use](m, tmp_path)
    finally: dist.destroy_process_group()

# --- wrappers

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('use', ALL)
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_wrappers(use, wrapper, tmp_path):
    save_pruned(net(), tmp_path/'pruned'), save_compressed(net(), tmp_path/'compressed')
    ALL[use](WRAPPERS[wrapper](net().eval()), tmp_path)

# --- a criteria without numbers, and statistics that are none

def log(w): return w.log()
def root(w): return 1/w.clamp(min=0).sqrt()
def logs(w): return w.abs().log()  # -inf for 0, which goes first

ONCE = dict(pruner=lambda c: Pruner(net(), 40, criteria=c, example_inputs=X).prune_model(), model=lambda c: Sparsifier(net(), criteria=c).sparsify_model(40), layer=lambda c: Sparsifier(net(), criteria=c).sparsify_layer('0', 40),
    below=lambda c: Sparsifier(net(), criteria=c).sparsify_below(.1), filters=lambda c: Sparsifier(net(), 'filter', criteria=c).sparsify_model(40), pattern=lambda c: Sparsifier(net(), '2:4', criteria=c).sparsify_model(40),
    coupled=lambda c: Sparsifier(net(), 'filter', criteria=c, coupled=True, example_inputs=X).sparsify_model(40), shared=lambda c: Sparsifier(net(), context='global', criteria=c).sparsify_model(40),
    sensitivity=lambda c: sensitivity(net(), total, [50], criteria=c, progress=False), pruning=lambda c: sensitivity(net(), total, [50], criteria=c, kind='pruning', progress=False))

@pytest.mark.parametrize('use', ONCE)
def test_a_criteria_that_gives_no_numbers(use):
    with warnings_are('ignore'):
        for c in (log,root):
            with pytest.raises(ValueError, match=rf"criteria '{c.__name__}' gives nan or inf for [\d,]+ of [\d,]+ weights of \d.weight"): ONCE[use](c)
        ONCE[use](logs)

def test_training_steps_do_not_look():
    "In a step, to look at scores would have a device waited for"
    with warnings_are('ignore'): learn = fit(learner(), cbs=SparsifyCallback(40, 'weight', 'local', log, 'one_shot'))
    assert (learn.model[0].weight==0).any()

@pytest.mark.parametrize('value', [torch.nan,-1.])
def test_statistics(value):
    m = net()
    m[1].running_var[0] = value
    for f in (lambda: Pruner().prune_model(m, X), lambda: Pruner(m, 40, example_inputs=X).prune_model()):
        with pytest.raises(ValueError, match='1 of 8 numbers of 1.running_var, whose root is taken, are nan'): f()
    with pytest.warns(UserWarning, match='after: 1 of 8 numbers of 1.running_var'): r = quick(net(), m, example_inputs=X)
    assert any('1.running_var' in o for o in r.notes)

# --- much less than was asked for

def one(f, said=None):
    "What `f` gives; its one warning is as `said`, or there is none"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        res = f()
    ours = [str(w.message) for w in ws if w.category is UserWarning]
    assert len(ours)==(said is not None) and all(o in ours[0] for o in said or ()), ours
    return res

def thin(n): return nn.Sequential(nn.Conv2d(3,n,3), nn.ReLU(), nn.Conv2d(n,16,3), nn.ReLU(), nn.Conv2d(16,2,1))

@pytest.mark.parametrize('context', ['local','global'])
@pytest.mark.parametrize('n,ratio,gone', [(20,40,4), (16,40,0), (6,50,0)])
def test_rounded(n, ratio, gone, context):
    "`round_to` keeps so much that a user has to know"
    m = thin(n)
    p = Pruner(m, ratio, context, round_to=8, example_inputs=X)
    if context=='local':
        one(p.prune_model, ('round_to=8 keeps a multiple',))
        assert n-m[0].out_channels==gone and p.left[0]['removed']==gone and p.left[0]['dead']==n*ratio//100
    else: assert one(p.prune_model, ('round_to=8',)) is m and p.left
    sp = Sparsifier(thin(n), 'filter', context, round_to=8)
    one(lambda: sp.sparsify_model(ratio), ('round_to=8 keeps a multiple','`left` of the Sparsifier'))
    assert any(o['zeroed']<o['asked'] for o in sp.left)

def test_rounded_a_little():
    one(Pruner(thin(64), 30, round_to=8, layer_type=nn.Conv2d, ignored_layers='2', example_inputs=X).prune_model)
    one(lambda: Sparsifier(nn.Sequential(nn.Conv2d(3,64,3)), 'filter', round_to=8).sparsify_model(30))

def test_rounded_in_a_fit():
    "One warning, and none of levels on the way"
    for cb in (PruneCallback(50, round_to=4, n_updates=4), SparsifyCallback(50, 'filter', 'local', 'large_final', 'agp', round_to=4)): one(lambda: fit(learner(), cbs=cb))
    cb = PruneCallback(40, round_to=8, n_updates=4, ignored_layers='0')
    one(lambda: fit(learner(), cbs=cb), ('round_to=8',))
    assert cb.left[0]['layer']=='3'
    one(lambda: fit(learner(), cbs=SparsifyCallback(40, 'filter', 'local', 'large_final', 'agp', round_to=8)), ('round_to=8',))

@pytest.mark.parametrize('context', ['local','global'])
def test_patterns_that_do_not_fit(context):
    sp = Sparsifier(nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Conv2d(8,2,1)), '2:4', context)
    one(lambda: sp.sparsify_model(50), ('72 of 108 weights of 0','2:4 does not fit into its shape (8, 3, 3, 3)'))
    assert [(o['layer'],o['asked'],o['zeroed']) for o in sp.left]==[('0',108,72)] and int((sp.model[0].weight==0).sum())==72
    one(lambda: Sparsifier(nn.Sequential(nn.Conv2d(8,4,3)), '2:4', context).sparsify_model(50))

def test_one_warning_of_a_model_that_asks_for_values():
    def f(m, x):
        y = m.a(x)
        return m.b(y.relu())*y.mean().item()
    m = Net(f, a=nn.Conv2d(3,8,3), b=nn.Conv2d(8,4,3)).eval()
    with torch.no_grad():
        for p in (m.a.weight,m.a.bias): p[:2] = 0
    one(lambda: Pruner().prune_model(m, X), ('2 in a: mean','cannot be run on unknown inputs'))
    r = one(lambda: quick(m, copy.deepcopy(m), example_inputs=X))
    assert any('unknown inputs' in o for o in r.notes)

# --- calls that make no sense

WORDS = dict(step=(lambda: Pruner().step(3.), 'only a Pruner with a model and a ratio'), update=(lambda: Pruner(net()).update(3.), 'only a Pruner with a model and a ratio'),
    reached=(lambda: Pruner().reached(), 'only a Pruner with a model and a ratio'), no_type=(lambda: Pruner(net(), 50, layer_type=()), r'layer_type is an empty tuple'),
    loss=(lambda: Pruner(net(), 50, criteria='taylor', loss_func='mse'), 'mse_loss, not .mse'), loss_of_sparsifier=(lambda: Sparsifier(net(), 'filter', criteria='taylor', loss_func='crossentropy'), 'cross_entropy, not'),
    one_channel=(lambda: Pruner(nn.Sequential(nn.Conv2d(3,1,3), nn.Conv2d(1,1,3)), 50, example_inputs=X).prune_model(), '0, 1: one channel has to stay'),
    no_layers=(lambda: FC_Decomposer().decompose(net(), layers=[]), 'leaves no layer to decompose: .None. means all'),
    data=(lambda: FC_Decomposer().decompose(nn.Sequential(nn.Linear(6,6)), data=torch.randn(2,5)), 'does not run with data float32'))
@pytest.mark.parametrize('call,words', WORDS.values(), ids=WORDS)
def test_words(call, words):
    with pytest.raises(ValueError, match=words): call()

def test_nothing_is_reached_before_the_start(): assert Pruner(net(), 50, example_inputs=X).reached()==0
