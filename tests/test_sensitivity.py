"Sensitivity: exact values, models that come back untouched, scans that go on, targets that meet a budget"
import importlib, itertools, math
from copy import deepcopy
import numpy as np
import pandas as pd
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, shufflenet_v2_x0_5, squeezenet1_1
from fasterai.analyze.all import *
from fasterai.analyze.budget import isotonic
from fasterai.core.graph import ChannelGraph
from fasterai.core.running import plain_model
from fasterai.prune.pruner import Pruner
from fasterai.quantize.weight_sharing import KMeansQuantizer
from fasterai.sparse.sparsifier import Sparsifier
from tiny import WRAPPERS

sens = importlib.import_module('fasterai.analyze.sensitivity')  # its name is that of the function, too
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))

class Residual(nn.Module):
    "A stem and a branch whose filters are tied by an addition, and a depthwise convolution"
    def __init__(self):
        super().__init__()
        self.stem,self.norm,self.inner,self.branch = nn.Conv2d(3,16,3,padding=1),nn.BatchNorm2d(16),nn.Conv2d(16,24,1),nn.Conv2d(24,16,3,padding=1)
        self.deep,self.head = nn.Conv2d(16,16,3,padding=1,groups=16),nn.Linear(16,5)
    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(self.deep(x+self.branch(self.inner(x).sigmoid())).relu().mean((2,3)))

@pytest.fixture
def model():
    torch.manual_seed(0)
    m = Residual()
    m(X)  # in training mode, so that the statistics are not those of the start
    m.norm.eval()
    return m

def state(m): return {k:v.detach().clone() for k,v in m.state_dict().items()}
def modes(m): return [o.training for o in m.modules()]
def bits(t): return t.contiguous().flatten().view(torch.uint8)
def unchanged(m, before): return all(torch.equal(bits(v), bits(before[k])) for k,v in m.state_dict().items())
def total(m): return float(m(X).detach().double().abs().sum())
WAYS = [dict(), dict(kind='pruning', criteria='taylor', data=(X, torch.zeros(6, dtype=torch.long))), dict(granularity='filter'), dict(granularity='2:4', levels=[10,50]), dict(kind='pruning'), dict(kind='bits'), dict(criteria='taylor', data=(X, torch.zeros(6, dtype=torch.long)))]

@pytest.mark.parametrize('how', WAYS, ids=range(len(WAYS)))
def test_untouched(model, how):
    model.head.weight.data[0,0],model.head.weight.data[0,1] = -0.,1e-42
    before,was,rng = state(model),modes(model),torch.get_rng_state()
    def shakes(m):
        assert not torch.is_grad_enabled() and not any(modes(m))
        m.train()
        m(torch.rand_like(X))
        return total(m.eval())
    s = sensitivity(model, shakes, **how)
    assert unchanged(model, before) and modes(model)==was and torch.equal(torch.get_rng_state(), rng) and len(s.to_df())>=6

@pytest.mark.parametrize('how', [dict(),dict(kind='pruning'),dict(kind='bits')], ids=['sparsity','pruning','bits'])
@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped(model, wrap, how):
    "`evaluate` gets the wrapper, and the result has the names that layers have inside"
    wrapped,seen = wrap(model),set()
    def inside(m):
        seen.add(type(m))
        return total(plain_model(m))
    want,got = (sensitivity(m, f, levels=[4], **how) for m,f in ((model,total),(wrapped,inside)))
    assert got.metrics==want.metrics and seen=={type(wrapped)}

@pytest.mark.parametrize('how', WAYS, ids=range(len(WAYS)))
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_untouched_after_an_error(model, how, error):
    "In the middle of any layer"
    for at in (1, 2, 4, 7):
        before,was,calls = state(model),modes(model),itertools.count(1)
        def stops(m):
            m.train()
            if next(calls)==at: raise error('stop')
            return total(m)
        with pytest.raises(error): sensitivity(model, stops, **how)
        assert unchanged(model, before) and modes(model)==was, at

def test_untouched_when_compressing_fails(model):
    calls = itertools.count(1)
    def fails(w):
        if next(calls)==5: raise RuntimeError('stop')
        return w.abs()
    before = state(model)
    with pytest.raises(RuntimeError, match='stop'): sensitivity(model, total, criteria=fails)
    assert unchanged(model, before)

def test_exact_values():
    "By hand: a linear layer of ten known weights, seen through a sum"
    m = nn.Sequential(nn.Linear(5, 2, bias=False))
    w = torch.tensor([[1.,-2,3,-4,5],[6,7,-8,9,10]])
    m[0].weight.data.copy_(w)
    s = sensitivity(m, lambda m: m[0].weight.sum(), levels=[10,35,50,90])
    df = s.to_df()
    assert s.dense==27 and df.level.tolist()==[10,35,50,90] and df.metric.tolist()==[26, 25, 24, 10]  # 1; 1-2+3; 1-2+3-4+5; all but 10
    assert df.damage.tolist()==[1, 2, 3, 17]
    rows = sensitivity(m, lambda m: m[0].weight.sum(), levels=[50], granularity='filter', higher_is_better=False).to_df()
    assert rows.metric.tolist()==[24] and rows.damage.tolist()==[-3]
    two = sensitivity(m, lambda m: len(m[0].weight.unique()), levels=[1,2], kind='bits').to_df()
    assert two.level.tolist()==[2,1] and two.metric.tolist()==[4,2]

@pytest.mark.parametrize('order', [[90,10,50], [10,50,90], (50.,10,90,10)])
def test_each_level_is_of_the_untouched_layer(model, order):
    df = sensitivity(model, total, order).to_df()
    for o in df.itertuples():
        m = deepcopy(model).eval()
        Sparsifier(m, layer_type=(nn.Conv2d,nn.Linear)).sparsify_layer(o.layer, o.level)
        assert total(m)==o.metric, (o.layer, o.level)
    for o in sensitivity(model, total, [3,5,1], kind='bits').to_df().itertuples():
        m = deepcopy(model).eval()
        assert total(KMeansQuantizer({o.layer:o.level}).quantize(m))==o.metric

def test_tied_layers_are_one_and_zeroed_is_removed(model):
    "The stem, the branch and the depthwise convolution go together; each measured value is that of the network without these channels"
    s = sensitivity(model, total, [20,50,80], kind='pruning', example_inputs=X)
    assert sorted(s.metrics)==['inner','stem']
    for o in s.to_df().itertuples():
        m = deepcopy(model).eval()
        Pruner(m, {o.layer:o.level}, example_inputs=X).prune_model()
        assert total(m)==pytest.approx(o.metric, rel=1e-5), (o.layer, o.level)
    assert m.stem.out_channels==16 and m.inner.out_channels==24-19

def test_removed_before_a_norm_without_scale():
    "A channel that is zero would come out of the normalization as a constant; a removed one does not"
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8, affine=False), nn.Sigmoid(), nn.Conv2d(8,4,3))
    m(X+1)
    m.eval()
    s = sensitivity(m, total, [50], kind='pruning', example_inputs=X)
    small = Pruner(deepcopy(m), {'0':50}, example_inputs=X).prune_model()
    assert small[0].out_channels==4 and total(small)==pytest.approx(s.metrics['0'][50], rel=1e-5)

# Going on

def test_resume_from_a_file(model, tmp_path):
    calls,path = [],tmp_path/'scan.csv'
    def f(m):
        calls.append(1)
        if len(calls)==7: raise KeyboardInterrupt
        return total(m)
    with pytest.raises(KeyboardInterrupt): sensitivity(model, f, [50,60], resume=path)
    with open(path, 'a') as o: o.write('sparsity wei')  # cut off in the middle of a line
    s = sensitivity(model, f, [50,60,70], resume=path)
    assert len(calls)==7+1+5*3-5 and s.to_df().equals(sensitivity(model, total, [50,60,70]).to_df())
    n = len(calls)
    again = sensitivity(model, f, [50,60,70], resume=path)
    assert len(calls)==n+1 and again.dense==s.dense and again.to_df().equals(s.to_df())
    s.to_csv(tmp_path/'copy.csv')
    assert sensitivity(model, f, [60], resume=tmp_path/'copy.csv').to_df().equals(s.to_df()) and len(calls)==n+2
    assert pd.read_csv(path).layer.nunique()==5

def test_resume_from_a_result(model):
    calls = []
    f = lambda m: calls.append(1) or total(m)
    s = sensitivity(model, f, [50])
    assert len(sensitivity(model, f, [50,70], resume=s).to_df())==10 and len(calls)==1+5+1+5

def f_of(data, by=1.):
    "An evaluate that has its data in a closure"
    return lambda m: by*float(m(data).double().abs().sum())

def test_resume_refuses_another(model, tmp_path):
    "What differs is named, before anything is evaluated, and the file stays as it is"
    path,evaluate = tmp_path/'scan.csv',f_of(X)
    s = sensitivity(model, evaluate, [50], resume=path)
    before = path.read_bytes()
    def refused(match, evaluate=evaluate, **how):
        for earlier in (path,s):
            with pytest.raises(ValueError, match=match): sensitivity(model, evaluate, [50], resume=earlier, **how)
        assert path.read_bytes()==before
    refused('kind', kind='pruning'), refused('granularity is weight there, and filter here', granularity='filter')
    refused('criteria is large_final there, and random here', criteria='random'), refused('layer_type is any there, and Conv2d here', layer_type=nn.Conv2d)
    refused('higher_is_better is True there, and False here', higher_is_better=False)
    refused('the function `evaluate`', f_of(X+1)), refused('the function `evaluate`', f_of(X, 2.)), refused('the function `evaluate`', lambda m: evaluate(m)+1)
    assert sensitivity(model, f_of(X.clone()), [50], resume=path).metrics==s.metrics
    other = [1.]
    def hidden(m): return other[0]*total(m)
    sensitivity(model, hidden, [50], resume=tmp_path/'other.csv')
    other[0] = 2.
    with pytest.raises(ValueError, match='metric of the untouched model is .* now, but was'): sensitivity(model, hidden, [50], resume=tmp_path/'other.csv')
    model.stem.weight.data[0,0,0,0] += 1
    refused('the model differs')
    path.write_text('something else\n')
    with pytest.raises(ValueError, match='not a file of a sensitivity scan'): sensitivity(model, total, [50], resume=path)
    assert path.read_text()=='something else\n'

@pytest.mark.parametrize('bad,says', [(lambda r: r[:-1], 'its checksum differs|fields'), (lambda r: r.replace(',50,', ',60,'), 'its checksum differs'), ('stem,50,nan', 'its metric is .nan., but a finite number'), ('stem,50,inf', 'finite'), ('stem,50,1_0', 'finite'),
    ('stem,500,1.0', 'no level 500'), ('stems,50,1.0', "no layer 'stems'"), ('stem,x,1.0', 'its level is'), ('stem,50,' + '9'*5000, 'finite'), ('stem', 'fields')])
def test_rows_of_files(bad, says, model, tmp_path):
    "A row that cannot be is refused with its line"
    path = tmp_path/'scan.csv'
    s = sensitivity(model, total, [50], resume=path)
    lines = path.read_bytes().decode().split('\r\n')
    lines[2] = bad(lines[2]) if callable(bad) else sens._line(sens._row(s.setting, *bad.split(','))).removesuffix('\r\n')
    path.write_bytes('\r\n'.join(lines).encode())
    with pytest.raises(ValueError, match=rf'scan.csv, line 3: .*({says})'): sensitivity(model, total, [50], resume=path)

# What is refused

@pytest.mark.parametrize('how,says', [(dict(kind='sparcity'), "did you mean 'sparsity'"), (dict(kind=3), 'kind must be one of'), (dict(criteria='large_finale'), "did you mean 'large_final'"),
    (dict(granularity='filtre'), "did you mean 'filter'"), (dict(kind='pruning', granularity='filter'), 'granularity has no meaning'), (dict(kind='bits', criteria='random'), 'criteria has no meaning'),
    (dict(levels=[]), 'at least one'), (dict(levels=[0,10]), 'above 0'), (dict(levels=50), 'several numbers'), (dict(levels='50'), 'several numbers'), (dict(levels=[101]), 'from 0 to 100'),
    (dict(kind='pruning', levels=[101]), 'from 0 to 100'), (dict(kind='bits', levels=[9]), 'from 1 to 8'), (dict(granularity='2:4', levels=[60]), 'cannot be reached'), (dict(criteria='movement'), 'only the present weights'),
    (dict(criteria='wanda'), 'pass `data`'), (dict(data=X), 'needs no data'), (dict(layer_type=nn.Conv3d), 'no layer of type Conv3d'), (dict(kind='bits', layer_type=nn.Conv3d), 'no layer of type'),
    (dict(kind='pruning', layer_type=nn.Conv3d), 'no channel'), (dict(evaluate=3), 'evaluate must be a function'), (dict(levels=[.2,.5]), 'write 20, 50')], ids=range(22))
def test_refused_before_anything_is_evaluated(model, how, says):
    before,calls = state(model),[]
    args = dict(dict(model=model, evaluate=lambda m: calls.append(1) or 0.), **how)
    with pytest.raises(ValueError, match=says): sensitivity(**args)
    assert not calls and unchanged(model, before)

def test_no_model():
    with pytest.raises(TypeError, match="nn.Module, not 'resnet18'"): sensitivity('resnet18', lambda m: 0.)

@pytest.mark.parametrize('value', ['0.5', (1., 2.), torch.ones(2), None, math.nan])
def test_what_is_no_number(model, value):
    with pytest.raises(ValueError, match='evaluate'): sensitivity(model, lambda m: value)

def test_evaluate_that_trains(model):
    def trains(m): m.stem.weight.data.add_(1); return 0.
    with pytest.raises(ValueError, match='has changed the weights'): sensitivity(model, trains)

# Targets

def test_targets_of_zeros_are_counted(model):
    model.inner.weight.data[:4] = 0
    s = sensitivity(model, total)
    assert s.left('params')==n_nonzero(model)
    for budget in (600, 1500, 2500, 3000):
        t = s.targets(params=budget)
        m = deepcopy(model)
        Sparsifier(m, layer_type=s.layer_type).sparsify_model(t)
        assert n_nonzero(m)==s.left('params', t)<=budget
    full,t = ChannelGraph(model, X).macs(),s.targets(macs=40_000, example_inputs=X)
    m = deepcopy(model)
    Sparsifier(m, layer_type=s.layer_type).sparsify_model(t)
    weights = {k:m.get_submodule(k).weight for k in s.metrics}
    want = sum(v*float((weights[k]!=0).double().mean()) if k in weights else v for k,v in full.items())
    assert s.left('macs', t, X)==round(want)<=40_000

@pytest.mark.parametrize('make', [Residual, resnet18, mobilenet_v2, squeezenet1_1, shufflenet_v2_x0_5])
def test_targets_of_channels_are_counted(make):
    "What is left is what a Pruner leaves, of parameters, multiply-accumulates and bytes, on networks that tie channels by addition, concatenation, depthwise convolution and shuffling"
    torch.manual_seed(0)
    m,x = make().eval(),X[:2] if make is Residual else torch.randn(2, 3, 64, 64)
    evaluate = lambda m: float(sum(p.double().abs().mean() for p in m.parameters()))  # not the point here
    s = sensitivity(m, evaluate, [25,50], kind='pruning', example_inputs=x)
    for what,count in (('params',n_params), ('macs',lambda m: n_macs(m, x)), ('bytes',lambda m: sum(o.numel()*o.element_size() for o in m.state_dict().values()))):
        assert s.left(what)==count(m)
        budget = .7*s.left(what)
        t = s.targets(**{what:budget})
        small = Pruner(deepcopy(m), t, example_inputs=x).prune_model()
        assert count(small)<=s.left(what, t)<=budget
        if make is not shufflenet_v2_x0_5: assert count(small)==s.left(what, t)
        assert small(x).shape==m(x).shape

def test_targets_of_bits(model):
    s = sensitivity(model, total, kind='bits')
    for share in (.9, .5, .2):
        t = s.targets(bytes=share*s.left('bytes'))
        kept = sum(o.numel()*o.element_size() for o in model.state_dict().values())
        for k,b in t.items():
            w = model.get_submodule(k).weight
            kept += math.ceil(w.numel()*b/8)+4*2**b-4*w.numel() if b else 0
        assert kept==s.left('bytes', t)<=share*s.left('bytes')
        KMeansQuantizer(t).quantize(deepcopy(model))

def test_latency_is_looked_up_at_the_widths_a_pruner_leaves(monkeypatch):
    "With a clock that says out·in channels, the sum is that of the pruned network; each shape is measured once"
    import fasterai.analyze.sensitivity as module
    torch.manual_seed(0)
    m,seen = nn.Sequential(nn.Conv2d(3,40,3), nn.ReLU(), nn.Conv2d(40,40,3), nn.ReLU(), nn.Flatten(), nn.Linear(640,10)).eval(),[]
    own = lambda m: sum(float(o.weight.shape[0]*o.weight.shape[1]) for o in m.modules() if isinstance(o, (nn.Conv2d,nn.Linear)))
    def clock(o, example_inputs, **kwargs):
        o(example_inputs)
        if not isinstance(o, nn.Sequential): seen.append((repr(o),tuple(example_inputs.shape)))
        return np.array([[own(o)+(5 if isinstance(o, nn.Sequential) else 0)]])
    monkeypatch.setattr(module, 'latency', clock)
    s = sensitivity(m, total, kind='pruning', example_inputs=X)
    t = s.targets(latency=3000)
    small = Pruner(deepcopy(m), t, example_inputs=X, round_to=8).prune_model()
    assert s.left('latency', t)==own(small)+5<=3000 and s.left('latency')==own(m)+5 and len(seen)==len(set(seen))
    assert {w for o,_ in seen if o.startswith('Conv2d(3,') for w in [int(o.split(',')[1])]}=={8,16,24,32,40}

def test_latency_runs(model):
    s = sensitivity(model, total, [50], kind='pruning', example_inputs=X)
    assert s.left('latency')>0 and s.targets(latency=1000*s.left('latency'))=={'stem':0, 'inner':0}

def test_targets_refuse(model):
    s = sensitivity(model, total, [50,90])
    before = state(model)
    for budget,says in ((dict(), 'one budget'), (dict(params=9, macs=9), 'one budget'), (dict(latency=1), 'Allowed: params, macs'), (dict(bytes=1), 'has no budget'), (dict(params=0), 'above 0'), (dict(params='half'), 'above 0'), (dict(params=1), 'least that is reachable')):
        with pytest.raises(ValueError, match=says): s.targets(**budget)
    with pytest.raises(ValueError, match="did you mean 'stem'"): s.left('params', {'sten':50})
    with pytest.raises(ValueError, match='was not measured'): s.left('params', {'stem':40})
    assert unchanged(model, before)
    model.stem.bias.data[0] += 1
    with pytest.raises(ValueError, match='has changed since'): s.targets(params=1000)

def test_layer_types_may_be_a_list_and_are_checked(model):
    for kind in ('sparsity','pruning','bits'):
        assert 'head' not in sensitivity(model, total, [8], kind=kind, layer_type=[nn.Conv2d]).metrics
        with pytest.raises(TypeError, match="pass the class nn.Conv2d itself"): sensitivity(model, total, kind=kind, layer_type='Conv2d')

def test_plot_writes_a_file(model, tmp_path):
    s = sensitivity(model, total, [50,90])
    ax = s.plot(tmp_path/'s.png')
    assert len(ax.lines)==5+1 and (tmp_path/'s.png').stat().st_size>1000
    ax.figure.clear()

# Allocation

tables = st.lists(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 5)), min_size=1, max_size=4), min_size=1, max_size=4)

@given(tables, st.floats(0, 1))
def test_allocation(layers, share):
    "It meets the budget wherever any levels do, never beats the best, and no layer can go back to a less damaged level"
    damages = [np.r_[0, np.cumsum([d for _,d in l])] for l in layers]
    kept = [np.r_[0, np.cumsum([s for s,_ in l])][::-1].copy() for l in layers]
    cost = lambda at: sum(k[i] for k,i in zip(kept, at.T)).astype(float)
    every = np.array(list(itertools.product(*(range(len(d)) for d in damages))))
    harm = sum(d[i] for d,i in zip(damages, every.T))
    low,high = cost(every).min(),cost(every).max()
    budget = low+share*(high-low)
    at = allocate(damages, cost, budget)
    mine = sum(d[i] for d,i in zip(damages, at))
    assert cost(at[None])[0]<=budget and mine>=harm[cost(every)<=budget].min()-1e-9
    for u in range(len(at)):
        for l in range(at[u]):
            back = at.copy()
            back[u] = l
            assert cost(back[None])[0]>budget or damages[u][l]>=damages[u][at[u]]
    with pytest.raises(ValueError, match='least'): allocate(damages, cost, low-1)

@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_isotonic_is_the_nearest(d):
    "Against pooling of neighbours that violate the order"
    pools = []
    for o in d:
        pools.append([o, 1])
        while len(pools)>1 and pools[-2][0]>pools[-1][0]:
            (a,n),(b,m) = pools[-2:]
            pools[-2:] = [[(a*n+b*m)/(n+m), n+m]]
    want = np.clip(np.concatenate([[a]*n for a,n in pools]), 0, None)
    assert np.allclose(isotonic(d), want)
