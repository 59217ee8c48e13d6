"""Layers in int8: what they compute, which ones are in int8, and that what is measured decides"""
import copy, json, pickle, time, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from fasterai.core.plan import cut_to, pruned_plan
from fasterai.prune.all import load_pruned, save_pruned
from fasterai.quantize import int8
from fasterai.quantize.all import KMeansQuantizer, Quantizer, load_compressed, save_compressed
from fasterai.quantize.int8 import Int8, Int8Conv2d, Int8Linear, Int8Recurrent, Int8Within
from tiny import warnings_are

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))

def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()

def all_int8(model, data, method='static', **kwargs):
    "In int8 whatever the time"
    quantizer = Quantizer(method, measure=False)
    return quantizer.quantize(model, data, **kwargs),quantizer.report()

def by_hand(layer, x, lowest, highest):
    "The layer of rounded weights and inputs, in float64"
    w = layer.weight.detach().double()
    steps = w.flatten(1).abs().amax(1).view(-1, *[1]*(w.dim()-1))/127
    lowest,highest = min(lowest, 0.),max(highest, 0.)
    step = (highest-lowest)/255
    zero = round(-lowest/step)
    x = (((x.double()/step).round()+zero).clamp(0, 255)-zero)*step
    w,bias = (w/steps).round()*steps,None if layer.bias is None else layer.bias.double()
    f = {2:F.linear, 3:F.conv1d, 4:F.conv2d, 5:F.conv3d}[w.dim()]
    return f(x, w, bias, *(() if isinstance(layer, nn.Linear) else (layer.stride,layer.padding,layer.dilation,layer.groups)))

LAYERS = [(nn.Linear(12, 7), (4,12)), (nn.Linear(12, 7, bias=False), (2,3,12)), (nn.Conv2d(4, 8, 3, padding=1), (2,4,9,9)), (nn.Conv2d(4, 8, 3, 2, (1,2), bias=False), (1,4,9,8)),
          (nn.Conv2d(8, 8, 3, groups=8), (3,8,7,7)), (nn.Conv2d(8, 12, 3, dilation=2, groups=4), (2,8,9,9)), (nn.Conv2d(6, 4, 1), (2,6,5,5)),
          (nn.Conv2d(4, 8, 3), (4,9,9)), (nn.Conv2d(4, 8, (4,3), padding='same'), (2,4,9,8)), (nn.Conv1d(6, 8, 5, 2, 2, groups=2), (3,6,20)), (nn.Conv1d(4, 8, 3, padding='same', dilation=2), (4,20)),
          (nn.Conv3d(4, 6, 3, (1,2,2), 1), (2,4,5,8,8)), (nn.Conv3d(4, 6, (1,3,3), padding=(0,1,1), bias=False), (1,4,5,8,8))]

@pytest.mark.parametrize('layer,shape', LAYERS, ids=lambda o: str(o)[:40])
@pytest.mark.parametrize('low,high', [(-1.5,2.5), (0.,2.), (-3.,-.5)])
def test_layer(layer, shape, low, high):
    "Levels, steps and clamping are those of a layer that is written down plainly; also simulated, in another layout, and with another number of samples"
    x = 2*torch.randn(shape, generator=torch.Generator().manual_seed(1))
    new = int8._KINDS[type(layer)](layer, low, high)
    wanted = by_hand(layer, x, low, high)
    assert new(x).dtype==torch.float32 and new(x).shape==wanted.shape and new(x).is_contiguous()
    close = lambda a, b: (a-b).abs().max()<1e-5*wanted.abs().max()
    near = lambda a: (a-wanted).abs().median()<1e-5*wanted.abs().max() # a level may be another, where it is halfway
    assert near(new(x)) and close(copy.deepcopy(new)(x.clone().requires_grad_()), new(x)) # which is simulated
    if layer.weight.dim()==2 or x.dim()==layer.weight.dim(): assert close(new(x[:1]), new(x)[:1])
    if x.dim()==layer.weight.dim()==4:
        last = new(x.to(memory_format=torch.channels_last))
        assert close(last, new(x)) and last.is_contiguous(memory_format=torch.channels_last)

@torch.no_grad()
def test_dynamic_takes_the_range_of_each_call():
    layer = nn.Linear(12, 7)
    new = Int8Linear(layer)
    for size in (.01,1.,100.):
        x = size*torch.randn(5, 12)
        wanted = by_hand(layer, x, x.min().item(), x.max().item())
        assert (new(x)-wanted).abs().median()<1e-5*wanted.abs().max()

@torch.no_grad()
def test_where_operations_are_missing(monkeypatch):
    new,_ = all_int8(cnn(), X)
    wanted = new(X)
    monkeypatch.setattr(int8, '_RUNS', False)
    assert (new(X)-wanted).abs().max()<1e-4*wanted.abs().max()

@torch.no_grad()
def test_dead_channels_and_no_samples():
    layer = nn.Linear(6, 4)
    layer.weight[1] = 0
    new = Int8Linear(layer, -1., 1.)
    assert (new(torch.randn(3, 6))[:,1]==layer.bias[1]).all() and new(torch.empty(0, 6)).shape==(0,4)
    assert Int8Linear(layer, 0., 0.)(torch.zeros(2, 6)).isfinite().all()

@pytest.mark.parametrize('method', ['static','dynamic','weight_only'])
def test_network(method):
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    new,report = all_int8(model, [X,X], method)
    assert all(torch.equal(a, before[k]) for k,a in model.state_dict().items()) and not any(isinstance(m, Int8) for m in model.modules())
    with torch.no_grad(): a,b = model(X),new(X)
    assert report.error.iloc[-1]<.01 and ((a-b)**2).sum()/((a-a.mean())**2).sum()==pytest.approx(report.error.iloc[-1], rel=.01)
    kinds = ['Linear'] if method=='dynamic' else ['Conv2d','Conv2d','Linear']
    assert list(report.kind[report.int8])==[*kinds,'Sequential'] and list(report.layer)==['0','2','6','']
    assert list(report.bytes)[-1]==sum(o.numel()*4 for o in model.parameters()) and report.bytes_int8.iloc[-1]<report.bytes.iloc[-1]
    if method=='dynamic': assert set(report.why[:2])=={"'dynamic' is for linear layers"}

def test_ranges_are_those_of_all_batches():
    model = nn.Sequential(nn.Linear(4, 4))
    new,_ = all_int8(model, [torch.full((2,4), float(o)) for o in (1,-3,2)])
    assert new[0].ends.tolist()==[-3,2]
    assert all_int8(model, [torch.full((2,4), float(o)) for o in (1,-3,2)], max_calibration_samples=3)[0][0].ends.tolist()==[-3,1]

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6, 6),nn.Linear(6, 3)
    def forward(self, x, shift=None): return dict(y=self.b(self.a(x if shift is None else x+shift).relu()))

def test_data_as_other_rooms_take_them():
    x = torch.randn(8, 6)
    loader = DataLoader(TensorDataset(x, torch.zeros(8, dtype=torch.long)), batch_size=4)
    wanted = [x.min().item(),x.max().item()]
    for data in (x, [x,x], [(x,torch.zeros(8))], loader, iter([x]), [dict(x=x, shift=torch.zeros(6))], dict(x=x)):
        new,report = all_int8(Named().eval(), data)
        assert new.a.ends.tolist()==pytest.approx(wanted) and report.int8.all()

def faster(monkeypatch, *ratios):
    "Measured speedups are `ratios` in turn, the last one for all that follow"
    ratios = [*ratios]
    monkeypatch.setattr(int8, 'latency', lambda *models, **kwargs: torch.tensor([[ratios.pop(0) if len(ratios)>1 else ratios[0]]*9, [1.]*9]).numpy())

def test_what_is_slower_stays_in_float(monkeypatch):
    faster(monkeypatch, 2., .5, 3., 1.5)
    quantizer = Quantizer()
    new = quantizer.quantize(cnn(), X)
    assert [type(new[i]) for i in (0,2,6)]==[Int8Conv2d,nn.Conv2d,Int8Linear]
    report = quantizer.report()
    assert list(report.int8)==[True,False,True,True] and report.why[1]=='not faster: ×0.50 (0.50 to 0.50)' and report.why[2]=='×3.00 (3.00 to 3.00)'

@pytest.mark.parametrize('ratios,said', [((.9,), 'no layer'), ((2.,2.,2.,.9), 'returned unchanged: in int8 it is not faster: ×0.90')])
def test_a_network_that_is_slower_is_returned_as_it_is(monkeypatch, ratios, said):
    faster(monkeypatch, *ratios)
    quantizer,model = Quantizer(),cnn()
    with pytest.warns(UserWarning, match=said): assert quantizer.quantize(model, X) is model
    assert not quantizer.report().int8.any()

class Padded(nn.Linear):
    "Does something before and after"
    def forward(self, x): return super().forward(x.relu()).sigmoid()

class Same(nn.Conv2d):
    "Pads by the size of what arrives"
    def forward(self, x):
        ends = [(s-1,k-1) for s,k in zip(self.stride, self.kernel_size)]
        h,w = [k-(n-1)%(s+1)%2 for (s,k),n in zip(ends, x.shape[-2:])]
        return self._conv_forward(F.pad(x, (w//2,w-w//2,h//2,h-h//2)), self.weight, self.bias)

class Lora(nn.Linear):
    "What is added is trained"
    def __init__(self, n, m):
        super().__init__(n, m)
        self.a,self.b = nn.Parameter(torch.randn(2, n)/10),nn.Parameter(torch.randn(m, 2)/10)
    def forward(self, x): return F.linear(x, self.weight, bias=self.bias)+x@self.a.T@self.b.T

class Turned(nn.Module):
    "Outputs are the last axis of its weights"
    def __init__(self, n, m):
        super().__init__()
        self.weight,self.bias = nn.Parameter(torch.randn(n, m)),nn.Parameter(torch.randn(m))
    def forward(self, x): return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)

class Reader(nn.Module):
    "Multiplies with weights of its parts"
    def __init__(self, n, m):
        super().__init__()
        self.one,self.two = nn.Linear(n, 6),nn.Linear(6, m)
    def forward(self, x): return F.linear(F.linear(x, self.one.weight, self.one.bias).relu(), self.two.weight, self.two.bias)

class Attention(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.inside = nn.MultiheadAttention(n, 2, batch_first=True)
    def forward(self, x): return self.inside(x, x, x, need_weights=False)[0]

class Twice(nn.Module):
    "A layer that is called by its `forward`"
    def __init__(self, n, m):
        super().__init__()
        self.part = Padded(n, m)
    def forward(self, x): return self.part.forward(x)

torch.manual_seed(0)
images,vectors = (2,4,9,9),(2,5,8)
WITHIN = [(Same(4, 8, 3, 2), images, ['m']), (nn.Conv2d(4, 8, 3, padding=1, padding_mode='reflect'), images, ['m']), (Padded(8, 4), vectors, ['m']), (Lora(8, 4), vectors, ['m']), (Turned(8, 4), vectors, ['m']),
          (Reader(8, 4), vectors, ['m.one','m.two']), (Attention(8, 8), vectors, ['m.inside.in_proj_weight','m.inside.out_proj']), (Twice(8, 4), vectors, ['m.part'])]

class Around(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, x): return self.m(x).relu()

@pytest.fixture(params=WITHIN, ids=lambda o: type(o[0]).__name__)
def within(request):
    "A model, inputs, its int8, the report, names of layers in int8"
    layer,shape,names = request.param
    model,x = Around(copy.deepcopy(layer)).eval(),torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return model,x,*all_int8(model, [x,x/2]),names

@torch.no_grad()
def test_forward_of_its_own(within):
    "Its multiplications run with whole numbers, and what is around them as before"
    model,x,new,report,names = within
    assert list(report.layer[report.int8])==[*names,''] and not any(isinstance(m, (Int8,Int8Within)) for m in model.modules())
    cores = [m for m in new.modules() if isinstance(m, Int8)]
    assert len(cores)==len(names) and all(o.packed is not None for o in cores)
    for o in (x,x[:1],torch.cat([x,x])): assert int8._share(model(o), new(o))<5e-3
    exact = copy.deepcopy(model)
    for name,core in zip(names, cores):
        owner = exact.get_submodule(name.removesuffix('.in_proj_weight'))
        w = owner.in_proj_weight if name.endswith('in_proj_weight') else owner.weight
        w.copy_(core.weight.t() if isinstance(owner, Turned) else core.weight)
    assert int8._share(exact(x), new(x))<2e-3 and report.bytes_int8[report.int8].sum()<report.bytes[report.int8].sum()

@torch.no_grad()
def test_forward_of_its_own_in_copies_files_and_states(within, tmp_path):
    model,x,new,report,_ = within
    wanted = new(x)
    torch.save(new, tmp_path/'m.pt')
    for again in (copy.deepcopy(new),pickle.loads(pickle.dumps(new)),torch.load(tmp_path/'m.pt', weights_only=False)): assert torch.equal(again(x), wanted)
    other,_ = all_int8(model, 3*x)
    assert not torch.equal(other(x), wanted)
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(x), wanted)

def saved(model, fresh, path, x):
    save_pruned(model, path/'a')
    again = load_pruned(path/'a', fresh)
    save_pruned(again, path/'b')
    assert again is fresh and (path/'a').read_bytes()==(path/'b').read_bytes() and str(again)==str(model)
    with torch.no_grad(): assert torch.equal(again.eval()(x), model(x))
    return again

def test_forward_of_its_own_in_saved_models(within, tmp_path):
    model,x,new,_,_ = within
    again = saved(new, fresh := copy.deepcopy(model), tmp_path, x)
    assert [n for n,m in again.named_modules() if isinstance(m, Int8Within)]==[n for n,m in new.named_modules() if isinstance(m, Int8Within)]
    assert pruned_plan(copy.deepcopy(again))==pruned_plan(fresh)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters(): p.mul_(2)
    assert cut_to(other, pruned_plan(new)) and other.load_state_dict(new.state_dict()) and torch.equal(other.eval()(x), new(x))

@torch.no_grad()
def test_encoder_in_saved_models(tmp_path):
    "The fresh one would take its shortcut"
    mk = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 16)
    for layers in (None,['layers.0.linear1'],['layers.1.self_attn.in_proj_weight','layers.1.linear2']):
        new = Quantizer(measure=False, layers=layers).quantize(mk(), x)
        assert all(o.packed is not None for o in saved(new, mk(), tmp_path, x).modules() if isinstance(o, Int8))

@torch.no_grad()
def test_forwards_inside_of_forwards_in_saved_models(tmp_path):
    class Nest(Padded):
        def __init__(self):
            super().__init__(4, 4)
            self.deep = Lora(4, 4)
        def forward(self, x): return super().forward(self.deep(x))
    x = torch.randn(6, 4)
    for orders in ([['0','0.deep']],[['0.deep'],['0']],[['0'],['0.layer.deep']]):
        model = nn.Sequential(Nest(), nn.ReLU()).eval()
        for layers in orders: model = Quantizer(layers=layers).quantize(model, x)
        saved(model, nn.Sequential(Nest(), nn.ReLU()).eval(), tmp_path, x)

@pytest.mark.parametrize('swaps', [[], [['','weight']], [['','bias',False]], [['','weight',True]], [['x','weight',False]], [['','weight',False],['','weight',False]], [['','forward',False]], [[0,'weight',False]], 'x', None])
def test_forward_of_its_own_in_tampered_plans(swaps):
    new,_ = all_int8(Around(Padded(8, 4)).eval(), torch.randn(5, 8))
    plan = json.loads(json.dumps(pruned_plan(new)))
    told = next(o for o in plan['before'][0]['replaced']['new'] if 'swaps' in o['args'])
    told['args']['swaps'] = swaps
    fresh = Around(Padded(8, 4)).eval()
    state,own = copy.deepcopy(fresh.state_dict()),[(m,dict(vars(m)),dict(m._parameters),dict(m._modules)) for m in fresh.modules()]
    with pytest.raises(ValueError): cut_to(fresh, plan)
    assert all(torch.equal(v, state[k]) for k,v in fresh.state_dict().items()) and all(vars(m)==a and m._parameters==b and m._modules==c for m,a,b,c in own)

def test_forward_of_its_own_compiled_and_exported(within, tmp_path):
    model,x,new,_,_ = within
    with torch.no_grad(): wanted = new(x)
    with torch.no_grad(): compiled = torch.compile(new, backend='eager', fullgraph=True)(x)
    assert int8._share(wanted, compiled)<1e-5
    program = torch.export.export(new, (x,), strict=False)
    assert int8._share(wanted, program.module()(x))<1e-5
    pytest.importorskip('onnxruntime'), pytest.importorskip('onnxscript')
    from fasterai.export.all import export_onnx
    assert export_onnx(new, x, tmp_path/'m.onnx', rtol=2e-2).samples[0]==2

def test_what_is_added_is_trained():
    new,_ = all_int8(Around(Lora(8, 4)).eval(), torch.randn(5, 8))
    x = torch.randn(5, 8, requires_grad=True)
    new(x).sum().backward()
    assert x.grad.abs().sum()>0 and new.m.layer.a.grad.abs().sum()>0 and new.m.a is new.m.layer.a

def test_code_that_asks_a_layer():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = nn.Conv2d(3, 4, 1),Same(4, 4, 3, 2),Lora(16, 4)
        def forward(self, x):
            assert self.a.out_channels==self.b.in_channels==4 and self.b.weight.shape==(4,4,3,3) and self.b.weight.isfinite().all()
            return self.c(self.b(self.a(x).to(self.b.weight.dtype)).flatten(1)[:,:self.c.in_features])
    assert all_int8(Asks().eval(), torch.randn(2, 3, 8, 8))[1].error.iloc[-1]<.01

@torch.no_grad()
def test_encoder_layer():
    "It would read the weights of its parts, all at once"
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 16)
    new,report = all_int8(layer, x)
    assert report.int8.sum()==1+2*4 and report.error.iloc[-1]<.01
    assert all(o.packed is not None for o in new.modules() if isinstance(o, Int8))

@torch.no_grad()
def test_forwards_inside_of_forwards():
    class Nest(Padded):
        def __init__(self):
            super().__init__(4, 4)
            self.deep = Lora(4, 4)
        def forward(self, x): return super().forward(self.deep(x))
    new,report = all_int8(nn.Sequential(Nest(), nn.ReLU()).eval(), torch.randn(6, 4))
    assert list(report.layer[report.int8])==['0','0.deep',''] and isinstance(new[0], Int8Within) and isinstance(new[0].layer.deep, Int8Within) and report.error.iloc[-1]<.01

def test_a_layer_is_a_network():
    x = torch.randn(6, 4)
    assert isinstance(all_int8(nn.Linear(4, 3), x)[0], Int8Linear)
    with pytest.warns(UserWarning, match='no layer'): _,report = all_int8(Lora(4, 3), x)
    assert report.why[0]=='code outside of it multiplies with its weights'

class Own(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight*2, self.bias)

class Silent(nn.Linear):
    def forward(self, x): return (x[...,None,:]*self.bias[:,None]).sum(-1)

def test_layers_that_stay_in_float_say_why():
    tied = nn.Linear(3, 3)
    tied.weight = nn.Parameter(torch.randn(3, 3))
    other = nn.Linear(3, 3)
    other.weight = tied.weight
    hooked,patched = nn.Linear(3, 3),nn.Linear(3, 3)
    hooked.register_forward_hook(lambda m, x, y: 2*y)
    patched.forward = lambda x: 2*x
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.good,self.own,self.silent,self.tied,self.other,self.hooked,self.patched,self.idle,self.twice = nn.Linear(3, 3),Own(3, 3),Silent(3, 3),tied,other,hooked,patched,nn.Linear(3, 3),Padded(3, 3)
            self.rnn,self.words,self.cross,self.up,self.shift = nn.RNN(3, 3),nn.Embedding(4, 3),nn.MultiheadAttention(3, 1),nn.ConvTranspose1d(3, 3, 1),nn.Parameter(torch.zeros(5, 3))
        def forward(self, x):
            for m in (self.good,self.own,self.silent,self.tied,self.other,self.hooked,self.patched,self.twice): x = m(x)
            x = self.rnn(x)[0]+self.words(torch.zeros(5, dtype=torch.long))+self.shift
            return self.up(self.cross(x, x+1, x+2)[0].T).T+F.linear(x, self.twice.weight)
    _,report = all_int8(Net().eval(), torch.randn(5, 3))
    why = dict(zip(report.layer, report.why))
    assert why['own']=='Own computes the weights that it multiplies with' and why['tied']==why['other']=='another module has the same weights' and why['hooked']=='it has hooks'
    assert why['idle']=='it does not run with these data' and why['silent']=='Silent does not multiply as a layer of PyTorch' and why['patched']=='its forward was replaced'
    assert why['twice']=='its weights are also read elsewhere' and why['shift']=='it is a parameter of Net, not a weight of a layer'
    assert [why[o] for o in ('rnn','words','cross','up')]==[f'no int8 kernel for {o}' for o in ('RNN','Embedding','MultiheadAttention','ConvTranspose1d')]
    assert list(report.layer[report.int8])==['good','cross.out_proj',''] and report.bytes[report.layer=='rnn'].item()==4*(3*6+3*2)

def test_layer_under_two_names_and_twice():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    new,report = all_int8(model, torch.randn(4, 6))
    assert new[0] is new[2] and isinstance(new[0], Int8Linear) and len(report)==2

def test_code_that_reads_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
        def forward(self, x): return self.layer(x.to(self.layer.weight.dtype))@self.layer.weight
    model,x = Net().eval(),torch.randn(8, 4)
    new,report = all_int8(model, x)
    assert report.error.iloc[-1]<.01

def test_copies_files_and_states(tmp_path):
    new,_ = all_int8(cnn(), X)
    with torch.no_grad():
        wanted = new(X)
        for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))): assert torch.equal(again(X), wanted)
        other,_ = all_int8(cnn(), 3*X)
        assert not torch.equal(other(X), wanted)
        other.load_state_dict(new.state_dict())
        assert torch.equal(other(X), wanted)
        save_compressed(new, tmp_path/'m')
        other,_ = all_int8(cnn(), 3*X)
        assert not torch.equal(other(X), wanted)
        load_compressed(tmp_path/'m', other)
        assert torch.equal(other(X), wanted)
        with torch.inference_mode(): again,_ = all_int8(cnn(), X)
        assert torch.equal(again(X), wanted)

def test_gradients_pass():
    new,_ = all_int8(cnn(), X)
    x = X.clone().requires_grad_()
    new(x).sum().backward()
    y = X.clone().requires_grad_()
    cnn()(y).sum().backward()
    assert F.cosine_similarity(x.grad.flatten(), y.grad.flatten(), 0)>.95

@pytest.mark.parametrize('method', ['static','dynamic','weight_only'])
def test_in_onnx(tmp_path, method):
    "The file is compared with what int8 gives here"
    pytest.importorskip('onnxruntime'), pytest.importorskip('onnxscript')
    import onnx
    from fasterai.export.all import export_onnx
    new,_ = all_int8(cnn(), X, method)
    file = export_onnx(new, X, tmp_path/'m.onnx', rtol=1e-2)
    kinds = [o.op_type for o in onnx.load(file.path).graph.node]
    assert file.samples==(4,1,5) and kinds.count('QuantizeLinear')==(3 if method=='static' else 0)

class Recurrent(nn.Module):
    "As readers of text have it"
    def __init__(self, kind=nn.LSTM, **kwargs):
        super().__init__()
        self.rnn = kind(6, 8, **kwargs)
        self.head = nn.Linear(8*(1+self.rnn.bidirectional), 3)
    def forward(self, x, state=None):
        self.rnn.flatten_parameters()
        out,state = self.rnn(x.to(self.rnn.weight_ih_l0.dtype), state)
        return self.head(out),state

def recurrent(**kwargs):
    torch.manual_seed(0)
    return Recurrent(**kwargs).eval()

@pytest.mark.parametrize('kwargs', [{},dict(kind=nn.GRU),dict(batch_first=True, bidirectional=True),dict(kind=nn.GRU, num_layers=2, bias=False),dict(num_layers=2, bidirectional=True, dropout=.3)], ids=str)
@torch.no_grad()
def test_recurrent(kwargs, tmp_path):
    "Each product is one of rounded numbers, and states, copies and files are those of any layer"
    model,x = recurrent(**kwargs),torch.randn(7, 5, 6)
    new,report = all_int8(model, [x,x/2])
    assert list(report.layer[report.int8])==['rnn','head',''] and isinstance(new.rnn, Int8Recurrent) and list(report.kind[:1])==[type(model.rnn).__name__]
    assert report.bytes_int8[0]<.5*report.bytes[0] and (report.error<5e-3).all()
    out,state = model(x[:4])
    for inputs in ((x,),(x[:4],state),(x[:,0],)):
        old,now = (int8.tensors_of(o(*inputs)) for o in (model,new))
        assert new.rnn.packed is not None and all(a.shape==b.shape and int8._share(a, b)<1e-2 for a,b in zip(old, now, strict=True))
    for again in (copy.deepcopy(new),pickle.loads(pickle.dumps(new))): assert torch.equal(again(x)[0], new(x)[0])
    other,_ = all_int8(recurrent(**kwargs), 3*x)
    for p in other.rnn.buffers(): p.zero_()
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(x)[0], new(x)[0])
    save_pruned(new, tmp_path/'m')
    assert torch.equal(load_pruned(tmp_path/'m', recurrent(**kwargs)).eval()(x)[0], new(x)[0])

@pytest.mark.parametrize('key,value', [('num_layers',10**9),('num_layers',0),('hidden_size',10**9),('hidden_size',10**6),('input_size',-1),('mode','RNN'),('mode',['LSTM']),('rounds',1)])
def test_recurrent_in_tampered_plans(key, value):
    "Are refused soon, and nothing is changed"
    plan,start = json.loads(json.dumps(pruned_plan(all_int8(recurrent(), torch.randn(7, 5, 6))[0]))),time.perf_counter()
    told = next(o for o in plan['before'][0]['replaced']['new'] if 'mode' in o['args'])
    told['args'][key] = value
    fresh = recurrent()
    words = str(fresh)
    with pytest.raises(ValueError): cut_to(fresh, plan)
    assert str(fresh)==words and isinstance(fresh.rnn, nn.LSTM) and time.perf_counter()-start<5

def test_recurrent_elsewhere():
    "Gradients pass; other types, graphs and engines get the floats of the same weights"
    model,x = recurrent(),torch.randn(7, 5, 6)
    new,_ = all_int8(model, x)
    given = x.clone().requires_grad_()
    new(given)[0].sum().backward()
    wanted = x.clone().requires_grad_()
    model(wanted)[0].sum().backward()
    assert F.cosine_similarity(given.grad.flatten(), wanted.grad.flatten(), 0)>.99
    with torch.no_grad():
        assert int8._share(model(x)[0], copy.deepcopy(new).double()(x.double())[0])<1e-3
        program = torch.export.export(new, (x,), strict=False)
        for again in (program.module(),torch.compile(new, backend='eager', fullgraph=True)): assert int8._share(new(x)[0], again(x)[0])<1e-2
    assert isinstance(all_int8(model, x, 'dynamic')[0].rnn, Int8Recurrent) and not all_int8(model, x, 'weight_only')[0].rnn.rounds

@torch.no_grad()
def test_recurrent_where_operations_are_missing(monkeypatch):
    "As where PyTorch no longer has them: the same weights in floats"
    model,x = recurrent(),torch.randn(7, 5, 6)
    new,_ = all_int8(model, x)
    monkeypatch.setattr(int8, '_RECURS', False)
    with torch.no_grad(): assert int8._share(model(x)[0], copy.deepcopy(new)(x)[0])<1e-3

def test_recurrent_of_packed_sequences():
    class Packed(Recurrent):
        def forward(self, x): return self.rnn(x)[0].data
    model,x = Packed().eval(),nn.utils.rnn.pack_sequence([torch.randn(n, 6) for n in (3,5,2)], enforce_sorted=False)
    new,report = all_int8(model, [(x,0)])
    assert report.int8[0] and new.rnn.packed is not None and report.error[0]<5e-3

def test_recurrent_that_stays_in_float():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c,self.d = nn.LSTM(4, 4),nn.LSTM(4, 4),nn.LSTM(4, 4, proj_size=2),nn.utils.parametrizations.weight_norm(nn.LSTM(4, 4), 'weight_hh_l0')
            self.b.weight_hh_l0 = self.a.weight_hh_l0
            self.e = nn.Linear(2, 2)
        def forward(self, x): return self.e(self.c(self.d(self.b(self.a(x)[0])[0])[0])[0])
    new,report = all_int8(Tied().eval(), torch.randn(3, 2, 4))
    why = dict(zip(report.layer, report.why))
    assert [why[o] for o in 'abcd']==['another module has the same weights']*2+['no int8 kernel for LSTM with projections','its weights are computed']

@pytest.mark.parametrize('value', [float('nan'),float('inf')])
@torch.no_grad()
def test_what_is_not_finite_goes_on(value):
    "Where the range is that of each call, an answer is as little finite as in float"
    for model,x in ((nn.Sequential(nn.Linear(4, 3)),torch.randn(5, 4)),(recurrent(),torch.randn(5, 2, 6))):
        new,bad = all_int8(model.eval(), x, 'dynamic')[0],x.clone()
        bad[0] = value
        old,now = (int8.tensors_of(o(bad))[0] for o in (model,new))
        assert torch.equal(old.isfinite(), now.isfinite()) and not now.isfinite().all()

def test_inputs_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.rnn,self.head = nn.Conv1d(3, 4, 3),nn.LSTM(7, 6),nn.Linear(6, 2)
        def forward(self, x): return self.head(input=self.rnn(input=self.conv(input=x))[0])
    torch.manual_seed(0)
    model,x = Named().eval(),torch.randn(5, 3, 9)
    new,report = all_int8(model, [x,2*x,x])
    assert report.int8.all() and report.error.iloc[-1]<1e-2 and torch.equal(new.conv.ends, torch.stack((2*x).aminmax()))
    with torch.no_grad(): assert int8._share(model(x), new(x))<2e-2 and new.rnn.packed is not None

def test_what_follows_tensors():
    "Packed weights tell no place in memory: norms beside layers in float are folded, and a repair runs"
    from fasterai.misc.all import BN_Folder
    from fasterai.prune.all import drop_blocks
    from fasterai.repair.all import repair
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    new = Quantizer(layers=['0','8']).quantize(model, X)
    folded = BN_Folder().fold(new, X)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded) and torch.allclose(folded(X), new(X), atol=1e-5)
    assert {'1','4'}<=set(repair(copy.deepcopy(all_int8(model, X)[0]), model, X).layer)
    class Block(nn.Module):
        def __init__(self): super().__init__(), setattr(self, 'lin', nn.Linear(8, 8))
        def forward(self, x): return x+self.lin(x)
    x = torch.randn(4, 8)
    blocks = Quantizer(layers=['1.lin']).quantize(nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.Linear(8, 2)).eval(), x)
    assert len(drop_blocks(blocks, 1, data=x))==1

def test_nothing_but_zeros():
    "Would be a range in which all that comes then is zero"
    model,x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(),torch.zeros(5, 4)
    new,report = all_int8(model, x)
    assert list(report.why[:2])==['all its inputs are zero',''] and isinstance(new[0], nn.Linear) and isinstance(new[2], Int8Linear)
    assert all_int8(model, x, 'dynamic')[1].int8[:2].all() and all_int8(model, x, 'weight_only')[1].int8[:2].all()

def test_data_of_fastai():
    "Of DataLoaders, the validation set"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    model,x = nn.Sequential(nn.Linear(4, 8)).eval(),torch.randn(8, 4)
    dls = DataLoaders(DataLoader([(9*o,0) for o in x], bs=4), DataLoader([(o,0) for o in x], bs=4))
    assert torch.equal(all_int8(model, dls)[0][0].ends, torch.stack(x.aminmax()))
    with pytest.raises(ValueError, match='the validation set of this DataLoaders is empty'): all_int8(model, DataLoaders(dls.train, DataLoader([], bs=4)))

def test_wrong_types():
    for args,kwargs,said in (((None,),{},'method must be one of'),((torch.qint8,),{},'method must be one of'),((nn.Linear(2, 2),),{},'method must be one of'),((),dict(layers=nn.Linear),'layers must be names'),
                             ((),dict(layers=3),'layers must be names'),((),dict(ranges=[(0,1)]),'ranges must be a dict'),((),dict(ranges='x'),'ranges must be a dict')):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=said):
            warnings.simplefilter('error')
            Quantizer(*args, **kwargs)

def test_wrong_arguments():
    model = cnn()
    for make,said in [(lambda: Quantizer('statik'), "'statik' is not known"), (lambda: Quantizer(measure=1), 'measure must be True, False or None'), (lambda: Quantizer().quantize(model), 'needs calibration_data'),
                      (lambda: Quantizer().quantize(model, []), 'no batch'), (lambda: Quantizer().quantize(model, X, 0), 'at least 1'), (lambda: Quantizer().quantize(model, 3), 'data are batches'),
                      (lambda: Quantizer().quantize(model, torch.randn(2, 5)), 'does not run with'), (lambda: Quantizer().quantize(model.to('meta'), X), 'on meta')]:
        with pytest.raises(ValueError, match=said): make()
    with pytest.raises(TypeError): Quantizer().quantize(3, X)

def test_options_are_bits():
    with warnings_are('ignore'): assert isinstance(Quantizer([('0.weight', 2)]), KMeansQuantizer) and isinstance(Quantizer(options={'0.weight':2}.items()), KMeansQuantizer)

def test_no_layer_of_a_kind():
    model = nn.Sequential(nn.ReLU())
    with pytest.warns(UserWarning, match='no layer'): assert Quantizer('weight_only').quantize(model, torch.randn(2, 2)) is model
