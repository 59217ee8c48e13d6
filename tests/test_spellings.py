"""One operation has other names on other devices and in other releases of PyTorch. Networks are run here as those would run them, without their hardware:
as on a GPU, with fake tensors; and with real numbers, where each spelling is computed by its equal on the CPU. The graph has to be the same, and what is removed."""
from contextlib import contextmanager
import pytest, torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune
from torch._subclasses.fake_tensor import FakeTensorMode
from fasterai.core.graph import ChannelGraph
from fasterai.core.ops import Watch, channels, ops, scales, values
from fasterai.misc.bn_folding import BN_Folder
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier
from tiny import FAKE_GPU, Net

aten = torch.ops.aten

# --- every pass knows what any pass knows

def test_each_meaning_is_known_to_all_passes():
    "A meaning that the graph has no rule for would be unknown; one that liveness has none for is told here, since all of its result counts as unknown"
    meanings = set(ops.values())
    assert meanings-set(channels)=={'recurrent'}  # the graph follows `unroll`, one direction of a layer at a time
    dark = {'recurrent','distance','weight_norm','count','ask'}
    assert {o for o in meanings-set(values) if o!='each'}==dark

def test_facets_name_only_what_is_in_the_table():
    meanings = {*ops.values(),*ops}
    for facet in (channels,values,scales): assert set(facet)<=meanings, facet.what

# --- the spellings, each computed by its equal on the CPU

BATCH_NORMS = dict(
    cudnn=lambda x,w,b,m,v,t,mom,eps: aten.cudnn_batch_norm(x, w, b, m, v, t, mom, eps),
    miopen=lambda x,w,b,m,v,t,mom,eps: aten.miopen_batch_norm(x, w, b, m, v, t, mom, eps),
    legit=lambda x,w,b,m,v,t,mom,eps: aten._native_batch_norm_legit(x, w, b, m, v, t, mom, eps),
    no_training=lambda x,w,b,m,v,t,mom,eps: aten._native_batch_norm_legit_no_training(x, w, b, m, v, mom, eps),
    with_update=lambda x,w,b,m,v,t,mom,eps: aten._batch_norm_no_update(x, w, b, m, v, mom, eps))

@pytest.fixture(scope='module', autouse=True)
def gpu_spellings_on_the_cpu():
    "Operations of GPUs get a kernel for the CPU, where these tests run"
    lib = torch.library.Library('aten', 'IMPL', 'CPU')
    def norm(x, w, b, mean, var, training, momentum, eps):
        return aten.native_batch_norm(x, w, b, mean, var, training, momentum, eps)
    lib.impl('miopen_batch_norm', norm)
    lib.impl('cudnn_batch_norm', lambda *a: (*norm(*a), a[0].new_empty(0, dtype=torch.uint8)))
    def attend(q, k, v, bias=None, dropout=0., causal=False, scale=None):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): return F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=scale)
    none = lambda q: q.new_empty(0)
    seed = lambda: torch.zeros((), dtype=torch.long)
    def rnn(x, ws, stride, buf, h, c, mode, size, proj, n, batch_first, dropout, train, both, lengths, state):
        return *torch.lstm(x, (h,c), ws, stride==4, n, dropout, train, both, batch_first),x.new_empty(0),x.new_empty(0)
    def flatten(ws, *a):
        chunk = torch.cat([w.reshape(-1) for w in ws])
        for w,o in zip(ws, chunk.split([w.numel() for w in ws])): w.set_(o.view(w.shape))
        return chunk
    lib.impl('_cudnn_rnn', rnn)
    lib.impl('_cudnn_rnn_flatten_weight', flatten)
    lib.impl('_scaled_dot_product_efficient_attention', lambda q,k,v,bias,lse,p=0.,causal=False,*,scale=None: (attend(q, k, v, bias, p, causal, scale),none(q),seed(),seed()))
    lib.impl('_scaled_dot_product_flash_attention', lambda q,k,v,p=0.,causal=False,mask=False,*,scale=None: (attend(q, k, v, None, p, causal, scale),none(q),None,None,0,0,seed(),seed(),none(q)))
    with torch.device('cpu'): yield
    lib._destroy()

@contextmanager
def spelled(how, monkeypatch):
    "While this lasts, whatever watches a model hears its operations as `how` spells them: name of an operation -> function of the same arguments"
    real = Watch.__torch_dispatch__
    def hear(self, func, types, args=(), kwargs=None):
        other = how.get(func)
        if other is None: return real(self, func, types, args, kwargs)
        with self: return other(*args, **(kwargs or {}))
    with monkeypatch.context() as patch:
        patch.setattr(Watch, '__torch_dispatch__', hear)
        yield

def norms(f):
    def call(x, w, b, mean, var, training, momentum, eps):
        return tuple(f(x, w, b, mean, var, training, momentum, eps)[:3])
    return {aten.native_batch_norm.default:call}

def flash_as(name):
    def call(q, k, v, p=0., causal=False, *, attn_mask=None, scale=None):
        if name=='efficient' or attn_mask is not None: out = aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, False, p, causal, scale=scale)
        elif name=='flash': out = aten._scaled_dot_product_flash_attention(q, k, v, p, causal, False, scale=scale)
        else: return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, p, causal, None, scale=scale)[:2]
        return out[0],out[1]
    return {aten._scaled_dot_product_flash_attention_for_cpu.default:call}

RELEASES = {aten.hardtanh.default:lambda x,lo=-1,hi=1: aten.clamp(x, lo, hi), aten.hardtanh_.default:lambda x,lo=-1,hi=1: aten.clamp_(x, lo, hi),
    aten.hardswish_.default:lambda x: x.copy_(x*aten.clamp(x+3, 0, 6)/6), aten.silu_.default:lambda x: aten.mul_(x, aten.sigmoid(x)),
    aten.addmm.default:lambda b,x,w,**k: aten.add(aten.mm(x, w), b)}  # activations and layers as other releases compute them

SPELLINGS = {f'{k}_batch_norm':norms(f) for k,f in BATCH_NORMS.items()} | {f'{k}_attention':flash_as(k) for k in ('efficient','flash','math')} | dict(releases=RELEASES)

FAMILIES = dict(resnet18={}, mobilenet_v2={}, mobilenet_v3_small={}, shufflenet_v2_x0_5={}, densenet121={}, squeezenet1_1={}, efficientnet_b0={}, regnet_y_400mf={}, mnasnet0_5={},
    convnext_tiny={}, swin_t={}, vit_b_16=dict(image_size=32), googlenet=dict(init_weights=False))

def network(name):
    torch.manual_seed(0)
    m = torchvision.models.get_model(name, weights=None, num_classes=10, **FAMILIES[name])
    for l in m.modules():
        if isinstance(l, nn.BatchNorm2d):
            nn.init.uniform_(l.weight, .5, 1.5); nn.init.normal_(l.bias); l.running_mean.normal_(); l.running_var.uniform_(.5, 2)
    return m.eval()

def same_graph(a, b):
    "Are all weights' channels tied alike, free or not? Numbers may differ"
    def told(g):
        known,res = {},{}
        for s in g.slices:
            if s.role not in ('out','in'): continue
            res[s.name,s.dim,s.role] = tuple(known.setdefault(c, len(known)) if c else -1 for c in g.classes(s.ids).tolist())
        return res
    x,y = told(a),told(b)
    assert x.keys()==y.keys()
    assert [k for k in x if x[k]!=y[k]]==[]

def on_fake_gpu(m, x):
    "Model `m`, turned, and `x` as they would be on a GPU, without values"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = lambda o: mode.from_tensor(o.data).to(FAKE_GPU)
        for l in m.modules():
            l._parameters.update({k:nn.Parameter(fake(p)) for k,p in l._parameters.items() if p is not None})
            l._buffers.update({k:fake(b) for k,b in l._buffers.items() if b is not None and b.is_floating_point()})  # an index has values, there as here
        return m,fake(x)

@pytest.mark.parametrize('name', FAMILIES)
def test_graph_as_on_a_gpu(name):
    size = 32 if name=='vit_b_16' else 64
    m,x = network(name),torch.randn(2, 3, size, size)
    here = ChannelGraph(m, x)
    there = ChannelGraph(*on_fake_gpu(m, x))
    assert there.unknown=={} and here.unknown=={}
    same_graph(here, there)

USED_BY = dict(batch_norm=('mobilenet_v2',), attention=('vit_b_16',), releases=('mobilenet_v3_small','shufflenet_v2_x0_5'))
CASES = [(name,how) for how in SPELLINGS for kind,names in USED_BY.items() if how.endswith(kind) for name in names]

@pytest.mark.parametrize('name,how', CASES)
def test_lossless_in_every_spelling(name, how, monkeypatch):
    m = network(name)
    size = 32 if name=='vit_b_16' else 64
    x = torch.randn(2, 3, size, size)
    Sparsifier(m, 'filter', coupled=True, layer_type=(nn.Conv2d,nn.Linear), example_inputs=x).sparsify_model(40)
    small = Pruner().prune_model(m, x)
    graph = ChannelGraph(m, x)
    with spelled(SPELLINGS[how], monkeypatch):
        other = ChannelGraph(m, x)
        assert other.unknown=={}
        again = Pruner().prune_model(m, x)
    same_graph(graph, other)
    assert [p.shape for p in again.parameters()]==[p.shape for p in small.parameters()]
    assert sum(p.numel() for p in small.parameters())<.95*sum(p.numel() for p in m.parameters())

@pytest.mark.parametrize('how', [o for o in SPELLINGS if 'attention' not in o])
def test_figures_in_every_spelling(how, monkeypatch):
    "The road of the paper, in small: the same numbers of parameters, whatever a BatchNorm is called"
    def road():
        torch.manual_seed(0)
        m = nn.Sequential(nn.Conv2d(3,16,3), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16,32,3), nn.BatchNorm2d(32), nn.ReLU6(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,10)).eval()
        x = torch.randn(2,3,16,16)
        Sparsifier(m, 'filter', example_inputs=x).sparsify_model(40)
        small = Pruner().prune_model(m, x)
        folded = BN_Folder(x).fold(small)
        return [sum(p.numel() for p in o.parameters()) for o in (m,small,folded)]
    expected = road()
    assert expected==[3*16*9+16+32+16*32*9+32+64+330, 10*27+10+20+10*20*9+20+40+210, 10*27+10+10*20*9+20+210]
    with spelled(SPELLINGS[how], monkeypatch): assert road()==expected

class LSTM(nn.LSTM):
    "The operation itself, as programs of `torch.export` call it"
    def forward(self, x):
        n = self.num_layers*(1+self.bidirectional)
        h = x.new_zeros(n, len(x), self.hidden_size)
        return aten.lstm.input(x, [h,h], self._flat_weights, self.bias, self.num_layers, 0., False, self.bidirectional, True)[:1]

@pytest.mark.parametrize('kw', [dict(), dict(bidirectional=True), dict(num_layers=2), dict(bias=False), dict(num_layers=2, bidirectional=True, bias=False)], ids=str)
def test_recurrent_layers(kw):
    "The input loses dead channels and the least important; one that only the other direction reads stays"
    def made(cls):
        torch.manual_seed(0)
        m = Net(lambda m,x: m.head(m.rnn(F.relu(m.a(x)))[0]), a=nn.Linear(4,8), rnn=cls(8,5,batch_first=True,**kw), head=nn.Linear(5*(1+('bidirectional' in kw)),3)).eval()
        with torch.no_grad(): m.a.weight[[1,6]] = m.a.bias[[1,6]] = m.rnn.weight_ih_l0[:,[2,3]] = 0
        if 'bidirectional' in kw: m.rnn.weight_ih_l0_reverse.data[:,3] = 0
        return m
    x = torch.randn(2,7,4)
    here,there = made(nn.LSTM),made(LSTM)
    assert ChannelGraph(there, x).unknown=={} and ChannelGraph(there, x).macs()==ChannelGraph(here, x).macs()
    if 'num_layers' not in kw: same_graph(ChannelGraph(here, x), ChannelGraph(there, x))
    torch.testing.assert_close(there(x), here(x))
    here,there = (Pruner().prune_model(m, x) for m in (here,there))
    assert here.a.out_features==there.a.out_features==there.rnn.input_size==(5 if 'bidirectional' in kw else 4)
    torch.testing.assert_close(there(x), here(x))
    for m in (here,there): Pruner(m, 50, example_inputs=x).prune_model()
    torch.testing.assert_close(there(x), here(x))

class Flattened(LSTM):
    "Weights that a hook computes lie elsewhere in each run, and move to one chunk of memory again"
    def forward(self, x):
        with torch.no_grad(): torch._cudnn_rnn_flatten_weight(self._flat_weights, 4, self.input_size, 2, self.hidden_size, 0, 1, True, False)
        return super().forward(x)

def test_weights_that_move_in_memory_stay_what_they_are():
    torch.manual_seed(0)
    m = Net(lambda m,x: m.head(m.rnn(F.relu(m.a(x)))[0]), a=nn.Linear(4,8), rnn=Flattened(8,5,batch_first=True), head=nn.Linear(5,3)).eval()
    prune.random_structured(m.rnn, 'weight_ih_l0', 2, dim=1)
    with torch.no_grad(): m.a.weight[[1,6]] = m.a.bias[[1,6]] = 0
    x = torch.randn(2,7,4)
    assert ChannelGraph(m, x).unknown=={}
    small = Pruner().prune_model(m, x)
    assert small.a.out_features==small.rnn.input_size==int((m.rnn.weight_ih_l0!=0).any(0)[[0,2,3,4,5,7]].sum())
    torch.testing.assert_close(small(x), m(x))

DROPS = dict(dropout=lambda x: torch.native_dropout(x, .3, True)[0], scaled=lambda x: torch.native_dropout(x, .3, None)[0]*2, off=lambda x: torch.native_dropout(x, .3, False)[0])

@pytest.mark.parametrize('how', DROPS)
def test_what_may_fall_out(how):
    "A zero stays one; a constant does not, unless nothing can fall out"
    torch.manual_seed(0)
    m = Net(lambda m,x: m.b(DROPS[how](m.a(x))), a=nn.Conv1d(3,8,1), b=nn.Conv1d(8,4,1)).eval()
    with torch.no_grad(): m.a.weight[:3],m.a.bias[:2] = 0,0
    x = torch.randn(2,3,16)
    small = Pruner(verify=how=='off').prune_model(m, x)
    assert small.a.out_channels==(5 if how=='off' else 6)
    if how=='off': torch.testing.assert_close(small(x), m(x))
