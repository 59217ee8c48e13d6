"Decomposition: published counts, what peers get wrong, models of many kinds, arguments that are refused"
import copy, pickle, warnings
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision import models as tv
from fasterai.core.factorization import LowRank, allot
from fasterai.core.graph import ChannelGraph
from fasterai.core.running import example_inputs_for, untouched
from fasterai.misc.all import Conv_Decomposer, FC_Decomposer, conv_methods
from tiny import WRAPPERS

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')
METHODS = list(conv_methods)

def count(m): return sum(p.numel() for p in m.parameters())
def macs(m, x): return sum(ChannelGraph(m, x).macs().values())
def run(m, x):
    with untouched(m): return m(*x)
def outputs(y): return list(y.values()) if isinstance(y, dict) else [o for o in y if o is not None] if isinstance(y, tuple) else [y]
def state(m): return {k:v.clone() for k,v in m.state_dict().items()}
def close(a, b, eps=1e-10): assert torch.allclose(a, b, rtol=eps, atol=eps*float(b.detach().abs().max())), float((a-b).detach().abs().max())
def error(a, b): return float(((a-b).norm()/b.norm()).detach())
def gen(seed=0): return torch.Generator().manual_seed(seed)

# ---- published counts

def test_vgg16_bn_published():
    "83,970,260 → 61,430,022: the 10-class vgg16_bn, 40 % of its filters gone and its BatchNorms folded, every Linear at 0.5"
    def conv(i, o): return [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
    widths,layers,i = [64,64,0,128,128,0,256,256,256,0,512,512,512,0,512,512,512,0],[],3
    for o in widths:
        if not o: layers.append(nn.MaxPool2d(2))
        else: layers += conv(i, i:=o-o*40//100)
    with torch.device('meta'):
        original = tv.vgg16_bn(num_classes=10)
        net = nn.Sequential(*[m.to('meta') for m in layers], nn.AdaptiveAvgPool2d(7), nn.Flatten(),
            nn.Linear(i*49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
    assert count(original)==134_309_962 and count(net)==83_970_260
    d = FC_Decomposer()
    new = d.decompose(net)
    assert count(new)==61_430_022
    assert list(d.ranks.values())==[2048,5] and len(d.left)==1  # 4096 × 4096 at 2048 would take exactly as many weights

def test_resnet18_published():
    net = tv.resnet18(num_classes=102)
    assert count(net.fc)==52_326
    for p,n in ((.25,46_766), (.5,31_416), (.75,15_452)): assert count(FC_Decomposer().decompose(net, p).fc)==n

# ---- what peers get wrong

@pytest.mark.parametrize('name', ['vit_b_16','swin_t'])
def test_peers_attention_runs(name):
    "Peers: AttributeError in forward"
    net = getattr(tv, name)().eval()
    d,x = FC_Decomposer(),(torch.randn(1, 3, 224, 224, generator=gen()),)
    new = d.decompose(net, .75, layers=['encoder.layers.encoder_layer_0','heads'] if name=='vit_b_16' else None, example_inputs=x)
    assert run(new, x).shape==(1,1000) and count(new)<count(net)
    net,x = net.to('meta'),(x[0].to('meta'),)
    new = d.decompose(net, .75, example_inputs=x)  # all of it, without numbers
    assert run(new, x).shape==(1,1000) and count(new)<.6*count(net)
    read = [n for n,m in net.named_modules() if n.endswith(('out_proj','.qkv','attn.proj'))]
    assert read and all('read by another module' in d.left[n] for n in read) and not set(read) & set(d.ranks)

def test_peers_square_layers_do_not_grow():
    "Peers: 262,144 → 393,728"
    net = nn.Sequential(nn.Linear(512, 512, bias=False))
    with pytest.warns(UserWarning, match='no layer was decomposed: 0: rank 384 would have 393,216 weights'): new = FC_Decomposer().decompose(net, .25)
    assert count(new)==262_144
    assert count(FC_Decomposer().decompose(net, .75))==131_072

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem,self.down = nn.Conv2d(3, 12, 3, padding=1),nn.Conv2d(12, 20, (3,5), stride=(2,1), padding=(1,2), padding_mode='reflect')
        self.grouped,self.one,self.fc = nn.Conv2d(20, 16, 3, dilation=2, groups=2, padding='same'),nn.Conv2d(16, 24, 1, stride=2),nn.Linear(24, 10)
    def forward(self, x):
        for m in (self.stem, self.down, self.grouped, self.one): x = m(x).relu()
        return self.fc(x.mean((2,3)))

@pytest.mark.parametrize('method', METHODS)
def test_peers_nothing_removed_is_exact(method):
    "Peers: relative error 0.55 (svd), 0.97 (spatial), 0.99 (cp)"
    net = nn.Sequential(Mixed(), nn.Linear(10, 4)).double()
    x = torch.randn(2, 3, 16, 16, generator=gen(), dtype=torch.float64)
    new = Conv_Decomposer().decompose(net, 0., method)
    assert torch.equal(new(x), net(x)) and count(new)==count(net)

# ---- each factorization by itself

CONVS = [dict(padding=1), dict(padding=(2,0), stride=(1,2)), dict(padding='same', dilation=(1,2)), dict(padding=1, padding_mode='reflect', stride=2), dict(padding=(1,2), padding_mode='circular'),
         dict(padding=2, padding_mode='replicate', dilation=2), dict(bias=False), dict(padding='valid', kernel_size=(1,5)), dict(kernel_size=1, stride=2, padding=1), dict(groups=2, padding=1)]

def low_rank(m, method, r=2):
    "Give `m` a weight that `method` describes exactly with few weights"
    g,(o,i,*k) = gen(1),m.weight.shape
    rand = lambda *s: torch.randn(*s, generator=g, dtype=m.weight.dtype)
    eq = dict(tucker='oa,ib,abhw->oihw', svd='oa,aihw->oihw', spatial='oaw,aih->oihw', cp='oa,ia,ahw->oihw')
    shapes = dict(tucker=((o,r),(i,r),(r,r,*k)), svd=((o,r),(r,i,*k)), spatial=((o,r,k[1]),(r,i,k[0])), cp=((o,r),(i,r),(r,*k)))
    if method=='svd' and m.out_channels>m.in_channels: m.weight.data = torch.einsum('oahw,ai->oihw', rand(o, r, *k), rand(r, i))
    else: m.weight.data = torch.einsum(eq[method], *(rand(*s) for s in shapes[method]))

@pytest.mark.parametrize('options', CONVS, ids=str)
@pytest.mark.parametrize('method', METHODS)
def test_conv_is_the_same_function(method, options):
    "A kernel of exactly low rank: the smaller layers compute the same with every stride, padding, dilation and mode"
    for i,o in ((12,10), (8,16)):
        m = nn.Conv2d(i, o, **{'kernel_size':3, **options}).double()
        low_rank(m, 'svd' if m.kernel_size==(1,1) else method, 1 if m.groups>1 and method!='svd' else 2)
        net,x = nn.Sequential(m),torch.randn(2, i, 11, 13, generator=gen(), dtype=torch.float64)
        d = Conv_Decomposer()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            new = d.decompose(net, method=method, energy_threshold=1., example_inputs=x)
        if m.groups>1 and method in ('tucker','cp'): assert 'grouped' in d.left['0']
        else: assert d.ranks or 'weights' in d.left['0'] or 'accumulates' in d.left['0']
        close(new(x), net(x), 1e-6)
        assert count(new)<=count(net)
        if method=='svd' and m.groups==1: assert d.ranks=={'0':2}

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('dim', [1,3])
def test_other_dimensions(method, dim):
    torch.manual_seed(3)
    C = (nn.Conv1d,None,nn.Conv3d)[dim-1]
    net,x = nn.Sequential(C(8, 12, 3, stride=2, padding=1), nn.ReLU(), C(12, 6, 3)).double(),torch.randn(2, 8, *[9]*dim, generator=gen(), dtype=torch.float64)
    d = Conv_Decomposer()
    if dim==1 and method=='spatial':
        with pytest.warns(UserWarning, match='single spatial axis'): assert not d.decompose(net, .6, method, example_inputs=x) is net
        return
    new = d.decompose(net, .6, method, example_inputs=x)
    assert d.ranks and all('times its multiply-accumulates' in o for o in d.left.values()) and new(x).shape==net(x).shape and count(new)<count(net) and error(new(x), net(x))<1

@pytest.mark.parametrize('method', METHODS)
def test_loss_is_known_beforehand(method):
    "A threshold of energy is a promise about the weights"
    torch.manual_seed(0)
    m = nn.Conv2d(16, 24, 3, padding=1, bias=False).double()
    for t in (.5,.8,.95):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            new = Conv_Decomposer().decompose(m, method=method, energy_threshold=t)
        point = torch.eye(16, dtype=torch.float64)[:,:,None,None]*torch.eye(25, dtype=torch.float64).view(1,1,5,5,5,5)[...,2,2]  # all impulses
        kept = 1-error(new(point), m(point))**2
        assert kept>=t-1e-9

# ---- a linear layer

@given(st.integers(1,12), st.integers(1,12), st.integers(1,12))
def test_low_rank_is_best(o, i, r):
    w = torch.randn(o, i, generator=gen(o*100+i), dtype=torch.float64)
    low,r = LowRank(w),min(r, o, i)
    a,b = low.pair(r)
    s = torch.linalg.svdvals(w)
    close((w-b@a).square().sum()+1, s[r:].square().sum()+1)
    assert float(low.losses()[r-1])==pytest.approx(float(s[r:].square().sum()/s.square().sum()), abs=1e-12)

@given(st.integers(2,8), st.integers(2,8), st.integers(1,7), st.booleans())
def test_data_makes_output_error_least(o, i, r, bias):
    "No affine map of rank r is closer on the data than this one: found by reduced-rank regression, independently"
    g,r = gen(o*10+i),min(r, o, i)
    w,mix = torch.randn(o, i, generator=g, dtype=torch.float64),torch.randn(i, i, generator=g, dtype=torch.float64)
    x = torch.randn(200, i, generator=g, dtype=torch.float64)@mix+3*torch.randn(i, generator=g, dtype=torch.float64)
    low = LowRank(w)
    for part in x.split(77): low.learn(part)
    a,b = low.pair(r, bias)
    y = x@w.T
    got = (y-x@(b@a).T-(low.shift(r) if bias else 0)).square().sum()
    s = torch.linalg.svdvals(y-y.mean(0) if bias else y)
    assert float(got)==pytest.approx(float(s[r:].square().sum()), rel=1e-3, abs=1e-4*float(y.square().sum()))

def test_exact_where_the_rank_is_low():
    m = nn.Linear(30, 20).double()
    m.weight.data = torch.randn(20, 4, generator=gen(), dtype=torch.float64)@torch.randn(4, 30, generator=gen(1), dtype=torch.float64)
    d = FC_Decomposer()
    new,x = d.decompose(m, energy_threshold=1.),torch.randn(5, 30, generator=gen(2), dtype=torch.float64)
    assert d.ranks=={'':4}
    close(new(x), m(x))

def test_kept_as_it_was():
    net = nn.Sequential(nn.Linear(64, 48), nn.Dropout(), nn.Linear(48, 32, bias=False)).to(torch.bfloat16)
    net[0].weight.requires_grad_(False); net[2].eval()
    before,rng = state(net),torch.get_rng_state()
    new = FC_Decomposer().decompose(net, .7)
    assert torch.equal(rng, torch.get_rng_state()) and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert [type(m) for m in net]==[nn.Linear,nn.Dropout,nn.Linear]
    assert all(p.dtype==torch.bfloat16 for p in new.parameters()) and torch.equal(new[0][1].bias, net[0].bias) and new[2][1].bias is None
    assert [p.requires_grad for p in new.parameters()]==[False,False,True,True,True]
    assert new.training and new[0][0].training and not new[2].training and not new[2][1].training
    assert not {p.data_ptr() for p in new.parameters()} & {p.data_ptr() for p in net.parameters()}
    again = pickle.loads(pickle.dumps(new))
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(again.eval()(x), new.eval()(x))

def test_shapes_need_no_numbers():
    "On the meta device a decomposed architecture costs nothing, and takes the weights of the real one"
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))
    new,empty = FC_Decomposer().decompose(net, .6),FC_Decomposer().decompose(copy.deepcopy(net).to('meta'), .6)
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(new.state_dict(), assign=True)
    x = torch.randn(2, 64)
    assert torch.equal(empty(x), new(x))

def test_channels_last_stays():
    net = nn.Sequential(nn.Conv2d(16, 16, 3)).to(memory_format=torch.channels_last)
    new = Conv_Decomposer().decompose(net, .6, 'svd')
    assert new[0][0].weight.is_contiguous(memory_format=torch.channels_last)

# ---- who else reads

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.mid,self.head = nn.Embedding(50, 24),nn.Linear(24, 24),nn.Linear(24, 50, bias=False)
        self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.mid(self.emb(x)))

def test_left_alone():
    d,x = FC_Decomposer(),torch.randint(0, 50, (2,7))
    new = d.decompose(Tied(), .75, example_inputs=x)
    assert d.ranks=={'mid':6} and 'tied' in d.left['head'] and new.head.weight is new.emb.weight
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(24, 24)), nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
    prune.l1_unstructured(net[1], 'weight', .5)
    net[2].register_forward_hook(lambda m,a,o: o)
    d.decompose(net, .75)
    assert d.ranks=={'3':6} and 'computed' in d.left['0'] and 'computed' in d.left['1'] and 'hooks' in d.left['2']
    class Own(nn.Linear):
        def forward(self, x): return 2*super().forward(x)
    d.decompose(nn.Sequential(Own(24, 24), nn.Linear(24, 24)), .75)
    assert d.ranks=={'1':6} and 'forward of its own' in d.left['0']

@pytest.mark.parametrize('batch_first', [False,True])
def test_transformer_layer_in_eval_mode(batch_first):
    "The fused path of torch's layer reads the weights of its linear layers"
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first), 2).eval()
    x = torch.randn(3, 5, 32, generator=gen())
    d = FC_Decomposer()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        new = d.decompose(net, .75, example_inputs=x)
    with torch.no_grad(): assert new(x).shape==net(x).shape
    assert ('layers.0.linear1' in d.ranks)==(not batch_first)

def test_without_a_bias_nobody_reads_it():
    "An operation with no bias is no stranger to a layer without one"
    net = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16, bias=False))
    d,x = Conv_Decomposer(),torch.randn(1, 16, 9, 9)
    d.decompose(net, .6, example_inputs=x)
    assert list(d.ranks)==['0','1','2'] and not d.left
    d.decompose(net, .6, 'svd', layers='0', example_inputs=x)
    assert list(d.ranks)==['0']
    assert list(FC_Decomposer().decompose(net, .6, example_inputs=x)[5][0].weight.shape)==[6,16]

def test_a_budget_where_nothing_can_go():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match='80 at least, from 80 now'): FC_Decomposer().decompose(net, params=79)
    assert count(FC_Decomposer().decompose(net, params=80))==80

def test_a_layer_used_twice_is_one_layer():
    fc = nn.Linear(32, 32)
    new = FC_Decomposer().decompose(nn.Sequential(fc, nn.ReLU(), fc), .75)
    assert new[0] is new[2] and count(new)==32*16+32

# ---- a budget

@pytest.mark.parametrize('share', [.95,.7,.4,.15])
@pytest.mark.parametrize('method', ['fc',*METHODS])
def test_budget_is_kept(method, share):
    torch.manual_seed(0)
    net = Mixed() if method!='fc' else nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 10))
    x = (torch.randn(2, 3, 16, 16),) if method!='fc' else (torch.randn(2, 60),)
    d,more = (FC_Decomposer(),{}) if method=='fc' else (Conv_Decomposer(),dict(method=method))
    for kind,measure in (('params',count), ('macs',lambda m: macs(m, x))):
        budget = int(measure(net)*share)
        try: new = d.decompose(net, example_inputs=x, **{kind:budget}, **more)
        except ValueError as e:
            least = int(str(e).split(' at least')[0].split()[-1].replace(',', ''))
            assert least>budget
            new = d.decompose(net, example_inputs=x, **{kind:least}, **more)
            assert measure(new)==least
        else: assert budget*.75<measure(new)<=budget
        assert run(new, x).shape==run(net, x).shape

@given(st.integers(0,10**6))
def test_allot_against_all_combinations(seed):
    "Never over the budget, feasible whenever anything is, and near the best"
    g = gen(seed)
    costs,losses = {},{}
    for n in 'abc':
        k = int(torch.randint(2, 6, (), generator=g))
        costs[n] = torch.randint(1, 40, (k,), generator=g).sort(descending=True).values
        losses[n] = torch.cat([torch.zeros(1), torch.rand(k-1, generator=g)]).sort().values.double()
    every = torch.cartesian_prod(*(torch.arange(len(c)) for c in costs.values()))
    cost = sum(c[every[:,i]] for i,c in enumerate(costs.values()))
    loss = sum(l[every[:,i]] for i,l in enumerate(losses.values()))
    budget = int(torch.randint(int(cost.min())-2, int(cost.max())+2, (), generator=g))
    ks = allot(costs, losses, budget)
    if ks is None: assert budget<cost.min()
    else:
        assert sum(int(costs[n][k]) for n,k in ks.items())<=budget
        mine = sum(float(losses[n][k]) for n,k in ks.items())
        assert mine<=float(loss[cost<=budget].min())+float(max(l.diff().max() for l in losses.values()))*2+1e-9

def test_budget_prefers_what_is_redundant():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    net[0].weight.data = torch.randn(64, 5)@torch.randn(5, 64)
    d = FC_Decomposer()
    new = d.decompose(net, params=6000)
    assert d.ranks['0']>=5 and '1' in d.left
    x = torch.randn(4, 64)
    close(new(x), net(x), 1e-4)

# ---- refused

@pytest.mark.parametrize('args, says', [
    (dict(percent_removed=50), 'percent_removed is a fraction.*did you mean 0.5'), (dict(percent_removed=1.), 'from 0 to below 1'), (dict(percent_removed=-.1), 'fraction'), (dict(percent_removed='a'), 'fraction'),
    (dict(percent_removed=True), 'fraction'), (dict(energy_threshold=0.), 'above 0'), (dict(energy_threshold=95), 'did you mean 0.95'), (dict(percent_removed=.5, params=100), 'give one'),
    (dict(params=.5), 'whole number'), (dict(macs=0), 'whole number'), (dict(params=3), 'params can be [\\d,]+ at least'), (dict(macs=3), 'macs can be [\\d,]+ at least'),
    (dict(layers='hed'), "did you mean 'head'"), (dict(exclude=['hed']), "did you mean 'head'"), (dict(percent_removed={'hed':.5}), "did you mean 'head'"),
    (dict(percent_removed={'head':.5}, layers='head'), 'already selects layers'), (dict(exclude=''), 'leaves no layer'), (dict(layers='tied'), 'tied cannot be decomposed: its weight or bias is tied'),
    (dict(percent_removed=.5, data=[]), 'data has no batch'), (dict(percent_removed=.5, data=torch.full((2,32), float('nan'))), 'not all finite')])
def test_refused(args, says):
    net = nn.Sequential()
    for n in ('head','tied','other'): net.add_module(n, nn.Linear(32, 32))
    net.other.weight = net.tied.weight
    before = state(net)
    with pytest.raises(ValueError, match=says): FC_Decomposer().decompose(net, **args)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and [type(m) for m in net]==[nn.Linear]*3

def test_refused_models():
    with pytest.raises(ValueError, match='has no Linear to decompose'): FC_Decomposer().decompose(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match='has no Conv1d or Conv2d or Conv3d'): Conv_Decomposer().decompose(nn.Linear(3, 4))
    with pytest.raises(TypeError, match='nn.Module'): FC_Decomposer().decompose('resnet18')
    with pytest.raises(ValueError, match="did you mean 'tucker'"): Conv_Decomposer().decompose(nn.Conv2d(3, 4, 3), method='tuker')
    net = nn.Linear(8, 8)
    net.weight.data[0,0] = float('nan')
    with pytest.raises(ValueError, match='1 of 64 numbers of weight are nan or infinite'): FC_Decomposer().decompose(net, .8)

@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers(wrap):
    "What is inside is decomposed, and comes out"
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32)).eval()
    x = (torch.randn(1, 8, 4, 4, generator=gen()),)
    for d in (FC_Decomposer(),Conv_Decomposer()):
        want,got = d.decompose(net, .5, example_inputs=x),d.decompose(wrap(net), .5, example_inputs=x)
        assert type(got) is nn.Sequential and count(got)==count(want)<count(net)
        close(run(got, x), run(want, x), 1e-5)

def test_layers_and_exclude():
    net,d = nn.Sequential(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), nn.Linear(32, 32)),FC_Decomposer()
    d.decompose(net, .75, layers='0'); assert list(d.ranks)==['0.0','0.1']
    d.decompose(net, .75, layers=[net[1]]); assert list(d.ranks)==['1']
    d.decompose(net, .75, exclude=['0.1']); assert list(d.ranks)==['0.0','1']
    d.decompose(net, {'0.0':.75, '1':.9}); assert d.ranks=={'0.0':8, '1':3}

# ---- many models

FAMILIES = '''resnet18 resnext50_32x4d densenet121 googlenet inception_v3 mnasnet0_5 mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_y_400mf shufflenet_v2_x0_5
squeezenet1_0 convnext_tiny maxvit_t'''.split()
BIG = 'resnext50_32x4d','densenet121','inception_v3','convnext_tiny','maxvit_t'  # decomposed on the meta device: what is checked here are shapes

@pytest.mark.parametrize('name', FAMILIES)
def test_family(name):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = getattr(tv, name)(weights=None, num_classes=60).eval()
        x = example_inputs_for(net)
        was = outputs(run(net, x))
        kinds = [(d,more) for d,more in ((FC_Decomposer(),{}), (Conv_Decomposer(),dict(method='svd'))) if any(isinstance(m, d.types) for m in net.modules())]
        for d,more in kinds:
            same = d.decompose(net, 0., example_inputs=x, **more)
            assert not d.ranks and all(map(torch.equal, outputs(run(same, x)), was))
        if name in BIG: net,x = net.to('meta'),tuple(o.to('meta') for o in x)
        for d,more in kinds:
            new = d.decompose(net, .6, example_inputs=x, **more)
            assert d.ranks and [o.shape for o in outputs(run(new, x))]==[o.shape for o in was]
            for n in d.ranks: assert count(new.get_submodule(n))<count(net.get_submodule(n)), n
            assert macs(new, x)<=macs(net, x)

@pytest.mark.parametrize('method', ['tucker','spatial','cp'])
def test_methods_on_mnasnet(method):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net,x,d = tv.mnasnet0_5(num_classes=10).eval(),(torch.randn(1, 3, 32, 32, generator=gen()),),Conv_Decomposer()
        new = d.decompose(net, .5, method, example_inputs=x)
    assert d.ranks and run(new, x).shape==(1,10) and count(new)<count(net) and macs(new, x)<=macs(net, x)
