"""A default device that the user has set changes nothing: models and data that are on the CPU stay there, and so does all that comes of them.

The default device is `meta` here. A tensor that is made without a word of where becomes one without values, and whoever needs these fails."""
import copy, warnings
from contextlib import contextmanager
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.utils._pytree import tree_leaves
from fasterai.analyze.all import latency, n_macs, sensitivity
from fasterai.core.all import ChannelGraph, criterias, unknown_ops
from fasterai.core.granularity import granularities
from fasterai.core.liveness import Liveness
from fasterai.core.surgery import cut
from fasterai.distill.all import Distiller, KnowledgeDistillationCallback, kd_losses, match_feature_layers
from fasterai.distill.losses import loss_needs
from fasterai.misc.all import BN_Folder, Conv_Decomposer, FC_Decomposer
from fasterai.prune.all import PruneCallback, Pruner, load_pruned, save_pruned
from fasterai.prune.pruner import pruned_plan
from fasterai.quantize.all import KMeansCallback, KMeansQuantizer, compression_report, kmeans, load_compressed, save_compressed
from fasterai.quantize.kmeans import inits
from fasterai.regularize.all import Penalty, RegularizeCallback, penalties, penalty
from fasterai.report.all import report, show_blocks, show_criterion
from fasterai.sparse.all import KeepSparsity, Sparsifier, SparsifyCallback, hold_zeros
from tiny import Net, X, Y, fit, learner
from tiny import net as tiny_net

@contextmanager
def default_device(device):
    was = torch.empty(0).device
    torch.set_default_device(device)
    try: yield
    finally: torch.set_default_device(None if was.type=='cpu' else was)

def model(seed=0):
    "A residual connection, groups, two kinds of norm, attention and two linear layers; some channels are zero"
    torch.manual_seed(seed)
    def f(m, x):
        x = m.relu(m.norm(m.stem(x)))
        x = m.relu(m.group(m.deep(x))+x)
        x = m.out(x).flatten(2).transpose(1, 2)
        x = x+m.attention(x, x, x)[0]
        return m.head(m.relu(m.up(x.mean(1))))
    with torch.device('cpu'):
        m = Net(f, stem=nn.Conv2d(3,8,3,padding=1), norm=nn.BatchNorm2d(8), deep=nn.Conv2d(8,8,3,padding=1,groups=8), group=nn.GroupNorm(8,8),
            out=nn.Conv2d(8,8,1), attention=nn.MultiheadAttention(8, 2, batch_first=True), up=nn.Linear(8,12), head=nn.Linear(12,4), relu=nn.ReLU())
    with torch.no_grad():
        for o in (m.stem,m.norm,m.deep,m.group): o.weight[[1,4]] = o.bias[[1,4]] = 0
        m.up.weight[3] = m.up.bias[3] = 0
    return m.eval()

def net(seed=0):
    with torch.device('cpu'): return tiny_net(seed)

x,y = (o[:8].cpu() for o in (X,Y))
def state(m): return dict(m.state_dict())

def graph(path):
    g = ChannelGraph(m := model(), x)
    return [(s.name,s.dim,s.role,g.classes(s.ids),g.why(s.ids)) for s in g.slices], g.describe(), g.macs(), g.following('stem.weight'), g.tied(['stem.weight'])

def found_inputs(path): return ChannelGraph(net()).describe(), n_macs(net())
def dead(path):
    life = Liveness(m := model(), g := ChannelGraph(m, x))
    return life.dead(), life.constants(life.dead())
def removed(path): return cut(m := model(), g := ChannelGraph(m, x), g.classes(g.out('stem.weight').ids)[:1]), state(m)
def unknown(path): return [unknown_ops(model(), x)=={}]

def lossless(path): return state(Pruner().prune_model(model(), x))
def by_ratio(path):
    res = []
    data = [(x,y)]
    for make,kw in ((model,dict()), (model,dict(context='global')), (model,dict(criteria='taylor', data=data)), (net,dict(criteria='wanda', data=data)), (model,dict(round_to=4))):
        p = Pruner(m := make(), 50, example_inputs=x, **kw)
        res += [p.prune_model() and state(m),p.left]
    return res
def in_steps(path):
    p = Pruner(m := model(), 50, example_inputs=x)
    return [(p.update(o),state(m)) for o in (10,25,50)]
def pruned_file(path):
    save_pruned(m := Pruner().prune_model(model(), x), path)
    return state(load_pruned(path, new := model(1))), pruned_plan(new)

def sparse(context):
    def f(path):
        res = []
        for granularity in granularities:
            sp = Sparsifier(m := model(), granularity, context, layer_type=nn.Conv2d)
            sp.sparsify_model(40)
            res += [state(m),sp.state_dict()]
        return res
    return f
def coupled(path):
    sp = Sparsifier(m := model(), 'filter', 'global', example_inputs=x, coupled=True)
    sp.sparsify_model(50)
    return state(m), sp.report()
def by_criteria(path):
    def one(criteria):
        sp = Sparsifier(m := model(), 'weight', 'local', criteria=criteria, layer_type=nn.Conv2d, data=[(x,y)] if criteria in ('taylor','wanda','grad_crit') else None)
        sp.sparsify_model(50)
        return state(m)
    return [one(o) for o in ('large_final','movement','squared_final','taylor','wanda')]
def held_zeros(path):
    sp = hold_zeros(m := model(), x)
    with torch.no_grad(): m.stem.weight += 1
    sp.apply_masks()
    return state(m)

def folded(path): return state((f := BN_Folder(x)).fold(model())), f.into, f.left, state(BN_Folder().fold(net().eval()))
def linear(path):
    one = lambda **kw: (state((d := FC_Decomposer()).decompose(model(), example_inputs=x, **kw)),d.ranks)
    return [one(), one(energy_threshold=.8), one(params=800), one(macs=42700), one(data=[x])]
def convolutions(method):
    def f(path):
        def one(**kw):
            m = Net(lambda m,x: m.b(m.a(x)), a=nn.Conv2d(3,16,3,device='cpu'), b=nn.Conv2d(16,16,3,device='cpu'))
            for i,p in enumerate(m.parameters()): p.data = torch.randn(p.shape, generator=torch.Generator('cpu').manual_seed(i), device='cpu')
            return state((d := Conv_Decomposer()).decompose(m, method=method, example_inputs=x, **kw)), d.ranks
        return [one(), one(energy_threshold=.8), one(params=1800), one(macs=20000)]
    return f

def shared_values(path):
    res = []
    for method in inits:
        KMeansQuantizer(3, init=method).quantize(m := model())
        res.append(state(m))
    shared = KMeansQuantizer(3).share(m := model())
    nn.functional.cross_entropy(m(x), y).backward()
    shared.sum_grads(), shared.snap()
    return res, state(m), [p.grad for p in m.parameters()]
def clusters(path): return [kmeans(x.flatten(), 5, init=o, keep_zeros=z) for o in inits for z in (False,True)]
def compressed_file(path):
    KMeansQuantizer(2).quantize(m := model())
    save_compressed(m, path)
    return state(load_compressed(path, model(1))), compression_report(path)

def reported(path): return [report(dict(before=model(), after=Pruner().prune_model(model(), x)), data=(x,y), repeats=6, progress=False).drop(columns=TIMES).to_dict()]
TIMES = ['ms','ms_low','ms_high','speedup','speedup_low','speedup_high']
def timed(path): return latency(model(), example_inputs=x, repeats=6, warmup=1, progress=False).shape
def drawn(path): return [show_blocks('filter').get_title(), show_criterion('large_final').get_title()]
def sensitive(kind, levels):
    def f(path):
        metric = lambda m: float(m(x).square().mean())
        return sensitivity(model(), metric, levels, kind=kind, **(dict() if kind=='bits' else dict(example_inputs=x)), progress=False).to_df()
    return f

def distilled(path):
    res = []
    for name,loss in kd_losses.items():
        maps = 'fm_s' in loss_needs(loss)
        kw = dict(activations_student=['out'], activations_teacher=['0']) if maps else {}
        torch.manual_seed(0)
        d = Distiller(net(), loss, **kw)
        m = model().requires_grad_()
        d.prepare(m, x)
        with d.watch(m): pred = m(x)
        d.loss(pred, x, target=y).backward()
        res.append((d.terms,[p.grad for p in (*m.parameters(),*d.parameters())]))
    return res, match_feature_layers(net(), net(1), x)

def penalized(path):
    return [Penalty(m, o).by_layer() for o in penalties for m in (model(),)], [penalty(model().stem.weight, o) for o in granularities]

CALLBACKS = dict(prune=lambda: PruneCallback(50, 'lin', example_inputs=x[:2]), sparsify=lambda: SparsifyCallback(50, 'filter', criteria='movement', schedule='agp'),
    keep=lambda: KeepSparsity(), regularize=lambda: RegularizeCallback(), kmeans=lambda: KMeansCallback(3),
    distill=lambda: KnowledgeDistillationCallback(net(3), 'SoftTarget'))
EVENTS = 'before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_train after_epoch after_fit'.split()

def fitted(name):
    "In the events of the callback, the default device is that of the caller; the rest of the fit is fastai's"
    def f(path):
        device,cb = torch.empty(0).device,CALLBACKS[name]()
        def under(event):
            def call(*args, **kwargs):
                with torch.device(device): return event(*args, **kwargs)
            return call
        for o in EVENTS:
            if hasattr(cb, o): setattr(cb, o, under(getattr(cb, o)))
        with torch.device('cpu'):
            torch.manual_seed(0)
            return state(fit(learner(), 2, cb).model)
    return f

OPERATIONS = dict(graph=graph, found_inputs=found_inputs, dead=dead, removed=removed, unknown=unknown, lossless=lossless, by_ratio=by_ratio, in_steps=in_steps,
    pruned_file=pruned_file, local=sparse('local'), global_=sparse('global'), coupled=coupled, by_criteria=by_criteria, held_zeros=held_zeros, folded=folded,
    linear=linear, **{o:convolutions(o) for o in ('tucker','svd','spatial','cp')}, shared_values=shared_values, clusters=clusters, compressed_file=compressed_file,
    report=reported, timed=timed, drawn=drawn, sensitivity=sensitive('sparsity', [50]), sensitivity_pruning=sensitive('pruning', [50]),
    sensitivity_bits=sensitive('bits', [3]), distilled=distilled, penalized=penalized, **{f'fit_{o}':fitted(o) for o in CALLBACKS})

def alike(a, b):
    if isinstance(a, pd.DataFrame): pd.testing.assert_frame_equal(a, b)
    elif isinstance(a, torch.Tensor):
        assert a.device==b.device and a.dtype==b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    elif isinstance(a, np.ndarray): np.testing.assert_array_equal(a, b)
    else: assert a==b

@pytest.mark.parametrize('name', OPERATIONS)
@pytest.mark.filterwarnings('ignore')
def test_default_device_decides_nothing(name, tmp_path):
    f = OPERATIONS[name]
    with default_device('cpu'): want = f(tmp_path/'plain')
    with default_device('meta'): got = f(tmp_path/'meta')
    want,got = tree_leaves(want),tree_leaves(got)
    assert len(want)==len(got)>0
    for a,b in zip(want, got): alike(a, b)

def test_a_tensor_without_a_word_of_where_is_found():
    "The test above would fail on what it is for"
    with default_device('meta'), pytest.raises((NotImplementedError,RuntimeError)): torch.zeros(3)[torch.tensor([1], device='cpu')].tolist()
