"Sensitivity to int8, and widths and bits under one budget"
import itertools
from copy import deepcopy
import numpy as np
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fasterai.analyze import sensitivity as module
from fasterai.analyze.all import sensitivity
from fasterai.analyze.budget import isotonic
from fasterai.prune.pruner import Pruner
from fasterai.quantize.all import KMeansQuantizer, Quantizer
from fasterai.quantize.int8 import Int8, bytes_stored
from test_sensitivity import Residual, X, modes, state, total, unchanged
from tiny import WRAPPERS

@pytest.fixture
def model():
    torch.manual_seed(0)
    m = Residual()
    m(X)
    return m.eval()

class Wide(nn.Linear):
    "Has a forward of its own"
    def forward(self, x): return F.linear(x.relu(), self.weight, self.bias)

class Words(nn.Module):
    "An encoder, whose layer reads the weights of its parts where it may"
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.wide = Wide(16, 5)
    def forward(self, x): return self.wide(self.encoder(x))

def in_int8(m, layers, data): return Quantizer(layers=layers).quantize(m, data)

@pytest.mark.parametrize('make,x,n', [(Residual,X,5), (Words,torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(2)),5)], ids=['convolutions','attention'])
def test_each_layer_alone(make, x, n):
    "The metric is that of the network that a `Quantizer` gives for this layer, and the model is as before"
    torch.manual_seed(0)
    m = make().eval()
    def total(m): return float(m(x).detach().double().abs().sum())
    before,was,parts = state(m),modes(m),dict(m.named_modules())
    s = sensitivity(m, total, kind='int8', data=x)
    assert unchanged(m, before) and modes(m)==was and dict(m.named_modules())==parts and total(m)==pytest.approx(s.dense)
    df = s.to_df()
    assert len(df)==n and set(df.level)=={8} and (df.damage!=0).all()
    for o in df.itertuples(): assert total(in_int8(m, [o.layer], x))==pytest.approx(o.metric, rel=1e-5)

@pytest.mark.parametrize('error', [RuntimeError,KeyboardInterrupt])
def test_untouched_after_an_error(model, error):
    for at in (1,2,4):
        calls,before,was = itertools.count(1),state(model),modes(model)
        def stops(m):
            m.train()
            if next(calls)==at: raise error('stop')
            return total(m.eval())
        with pytest.raises(error): sensitivity(model, stops, kind='int8', data=X)
        assert unchanged(model, before) and modes(model)==was and not any(isinstance(m, Int8) for m in model.modules())

@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped(model, wrap):
    want,got = (sensitivity(m, lambda m: float(m(X).double().abs().sum()), kind='int8', data=X, layer_type=nn.Linear) for m in (model,wrap(model)))
    assert list(got.metrics)==['head'] and got.metrics['head'][8]==pytest.approx(want.metrics['head'][8], rel=1e-5)

def test_files_and_plots(model, tmp_path):
    s = sensitivity(model, total, kind='int8', data=X, resume=tmp_path/'s.csv')
    again = sensitivity(model, total, kind='int8', data=X, resume=tmp_path/'s.csv')
    assert again.metrics==s.metrics
    s.plot(tmp_path/'s.png')
    assert (tmp_path/'s.png').stat().st_size

def test_bytes_are_those_of_the_network(model):
    s = sensitivity(model, total, kind='int8', data=X, higher_is_better=False)
    assert s.left('bytes')==bytes_stored(model)
    least = s.left('bytes', dict.fromkeys(s.metrics, 8))
    for share in (.9,.5,.1):
        budget = least+share*(s.left('bytes')-least)
        targets = s.targets(bytes=budget)
        assert set(targets.values())<={8,None} and s.left('bytes', targets)<=budget
        assert bytes_stored(in_int8(model, targets, X))==s.left('bytes', targets)
        d = {o:max(s._damage(v[8]), 0) for o,v in s.metrics.items()}
        every = [[o for o,i in zip(d, c) if i] for c in itertools.product((0,1), repeat=len(d))]
        assert sum(d[o] for o,v in targets.items() if v)==pytest.approx(min(sum(map(d.get, o)) for o in every if s.left('bytes', dict.fromkeys(o, 8))<=budget))

class Reader(nn.Module):
    "Convolutions, then a recurrent layer, then a linear one"
    def __init__(self):
        super().__init__()
        self.conv,self.rnn,self.head = nn.Conv1d(3, 8, 3, padding=1),nn.LSTM(8, 12, batch_first=True, bidirectional=True),nn.Linear(24, 4)
    def forward(self, x): return self.head(self.rnn(self.conv(x).relu().transpose(1, 2))[0])

def test_recurrent_layers():
    "Are one layer of several weights; where channels that they read may go as well, bytes are no more than what is said"
    torch.manual_seed(0)
    m,x = Reader().eval(),torch.randn(4, 3, 9)
    with torch.no_grad(): own = m(x)
    def distance(m): return float((m(x)-own).square().mean())
    s = sensitivity(m, distance, kind='int8', data=x, higher_is_better=False)
    assert [*s.metrics]==['conv','rnn','head'] and all(0<v[8]<1e-3 for v in s.metrics.values())
    budget = .5*s.left('bytes')
    targets = s.targets(bytes=budget)
    assert targets['rnn']==8 and bytes_stored(in_int8(m, targets, x))==s.left('bytes', targets)<=budget
    pruning = sensitivity(m, distance, [25,50], kind='pruning', example_inputs=x, higher_is_better=False)
    for share in (.8,.6,.5):
        ratios,bits = pruning.targets(bytes=share*pruning.left('bytes'), beside=s)
        small = Pruner(deepcopy(m), {k:v for k,v in ratios.items() if v}, example_inputs=x).prune_model() if any(ratios.values()) else m
        if any(bits.values()): small = in_int8(small, bits, x)
        assert bytes_stored(small)<=pruning.left('bytes', (ratios,bits), beside=s)<=share*pruning.left('bytes')

def told_times(monkeypatch, ms):
    "Times are what `ms` says of each module"
    monkeypatch.setattr(module, 'latency', lambda *models, repeats=3, **kwargs: np.array([[ms(m)]*repeats for m in models]))

def macs(m):
    "Weights of all layers, those in int8 for a quarter"
    return sum((o.whole.numel()/4 if isinstance(o, Int8) else o.weight.numel()) for o in m.modules() if isinstance(o, (Int8,nn.Conv2d,nn.Linear)))

def test_latency(model, monkeypatch):
    told_times(monkeypatch, macs)
    s = sensitivity(model, total, kind='int8', data=X)
    assert s.left('latency')==macs(model) and s.left('latency', dict(branch=8))==macs(model)-.75*model.branch.weight.numel()
    targets = s.targets(latency=.5*macs(model))
    assert s.left('latency', targets)<=.5*macs(model)

def scans(m, metric, levels=(25,50,75), **kwargs): return (sensitivity(m, metric, levels, kind='pruning', example_inputs=X, **kwargs),sensitivity(m, metric, kind='int8', data=X, **kwargs))

def loss(m): return float(F.mse_loss(m(X), WANTED))
torch.manual_seed(3)
WANTED = torch.randn(6, 5)

def harm(scan, targets):
    choices,damages = scan._choices(),scan._damages()
    return sum(d[i] for d,i in zip(damages, scan._places(targets)))

def alone(scan, **budget):
    "Damage where one scan has the budget for itself"
    try: return harm(scan, scan.targets(**budget))
    except ValueError: return np.inf

@pytest.mark.parametrize('share', [.8,.5,.3,.15])
def test_widths_and_bits_share_a_budget(model, share):
    "The best of all allocations, never worse than one of both alone, and bytes as those of the network that comes of it"
    def distance(m): return float((m(X)-own).square().mean())
    with torch.no_grad(): own = model(X)
    pruning,int8 = scans(model, distance, higher_is_better=False)
    budget = share*pruning.left('bytes')
    ratios,bits = pruning.targets(bytes=budget, beside=int8)
    left = pruning.left('bytes', (ratios,bits), beside=int8)
    assert left<=budget
    ours = harm(pruning, ratios)+harm(int8, bits)
    assert ours<=min(alone(pruning, bytes=budget), alone(int8, bytes=budget))+1e-12
    cost = pruning._both_cost('bytes', int8, None)
    damages = pruning._damages()+int8._damages()
    ways = np.array([*itertools.product(*[range(len(d)) for d in damages])])
    ways = ways[cost(ways)<=budget]
    assert ours==pytest.approx(min(sum(d[i] for d,i in zip(damages, o)) for o in ways))
    small = deepcopy(model)
    if any(ratios.values()): small = Pruner(small, ratios, example_inputs=X).prune_model()
    small = in_int8(small, bits, X) if any(bits.values()) else small
    assert bytes_stored(small)==left

def test_never_worse_in_a_larger_network():
    "Where not all can be tried"
    torch.manual_seed(0)
    m = nn.Sequential(*[o for i in range(6) for o in (nn.Conv2d(8 if i else 3, 8, 3, padding=1),nn.ReLU())], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    with torch.no_grad(): own = m(X)
    pruning,int8 = scans(m, lambda m: float((m(X)-own).square().mean()), (20,40,60,80), higher_is_better=False)
    for share in (.9,.7,.5,.4,.2,.1):
        budget = share*pruning.left('bytes')
        ratios,bits = pruning.targets(bytes=budget, beside=int8)
        assert pruning.left('bytes', (ratios,bits), beside=int8)<=budget
        assert harm(pruning, ratios)+harm(int8, bits)<=min(alone(pruning, bytes=budget), alone(int8, bytes=budget))+1e-12

def test_latency_of_widths_and_bits(model, monkeypatch):
    told_times(monkeypatch, macs)
    pruning,int8 = scans(model, loss, higher_is_better=False)
    assert pruning.left('latency', beside=int8)==macs(model)
    assert pruning.left('latency', ({},dict(branch=8)), beside=int8)==pytest.approx(macs(model)-.75*model.branch.weight.numel())
    budget = .3*macs(model)
    ratios,bits = pruning.targets(latency=budget, beside=int8)
    assert pruning.left('latency', (ratios,bits), beside=int8)<=budget
    small = Pruner(deepcopy(model), ratios, example_inputs=X, round_to=8).prune_model() if any(ratios.values()) else model
    assert macs(in_int8(small, bits, X))==pytest.approx(pruning.left('latency', (ratios,bits), beside=int8))

def test_shared_values_beside_pruning(model):
    "Bits of a `KMeansQuantizer` as well"
    pruning,bits = sensitivity(model, loss, (25,50), kind='pruning', example_inputs=X, higher_is_better=False),sensitivity(model, loss, (2,4), kind='bits', higher_is_better=False)
    assert pruning.left('bytes', ({},dict(head=4)), beside=bits)==bits.left('bytes', dict(head=4))
    budget = .2*bits.left('bytes')
    ratios,few = pruning.targets(bytes=budget, beside=bits)
    assert pruning.left('bytes', (ratios,few), beside=bits)<=budget
    if any(few.values()): KMeansQuantizer(few).quantize(Pruner(deepcopy(model), ratios, example_inputs=X).prune_model() if any(ratios.values()) else deepcopy(model))

def test_wrong_arguments(model):
    pruning,int8 = scans(model, loss, higher_is_better=False)
    other = sensitivity(deepcopy(model), loss, kind='int8', data=X, higher_is_better=False)
    metric = sensitivity(model, total, kind='int8', data=X, higher_is_better=False)
    for make,said in [(lambda: sensitivity(model, loss, kind='int8'), 'needs data'), (lambda: sensitivity(model, loss, [4], kind='int8', data=X), r'must be \[8\]'), (lambda: sensitivity(model, loss, kind='int8', data=X, criteria='large_final'), 'no meaning'),
                      (lambda: sensitivity(model, loss, kind='int8', data=X, layer_type=nn.LSTM), 'can be in int8'), (lambda: int8.targets(macs=3), 'Allowed: bytes, latency'), (lambda: pruning.targets(bytes=9e9, beside=3), "kind='int8'"),
                      (lambda: int8.targets(bytes=9e9, beside=pruning), r'pruning.targets\(…, beside=int8\)'), (lambda: pruning.targets(bytes=9e9, beside=other), 'another model'), (lambda: pruning.targets(bytes=9e9, beside=metric), 'different metrics'),
                      (lambda: pruning.targets(bytes=1, beside=int8), 'least that is reachable'), (lambda: pruning.targets(macs=9, beside=int8), 'has no budget'),
                      (lambda: in_int8(model, dict(head=4), X), 'KMeansQuantizer'), (lambda: in_int8(model, ['heat'], X), "did you mean 'head'"), (lambda: in_int8(model, 'head', X), r"\['head'\]")]:
        with pytest.raises(ValueError, match=said): make()
