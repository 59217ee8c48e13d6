"""Layers in int8: what they compute, which ones are in int8, and that what is measured decides"""
import copy, pickle, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from fasterai.quantize import int8
from fasterai.quantize.all import KMeansQuantizer, Quantizer, load_compressed, save_compressed
from fasterai.quantize.int8 import Int8, Int8Conv2d, Int8Linear
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
    return F.linear(x, w, bias) if isinstance(layer, nn.Linear) else F.conv2d(x, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

LAYERS = [(nn.Linear(12, 7), (4,12)), (nn.Linear(12, 7, bias=False), (2,3,12)), (nn.Conv2d(4, 8, 3, padding=1), (2,4,9,9)), (nn.Conv2d(4, 8, 3, 2, (1,2), bias=False), (1,4,9,8)),
          (nn.Conv2d(8, 8, 3, groups=8), (3,8,7,7)), (nn.Conv2d(8, 12, 3, dilation=2, groups=4), (2,8,9,9)), (nn.Conv2d(6, 4, 1), (2,6,5,5))]

@pytest.mark.parametrize('layer,shape', LAYERS, ids=lambda o: str(o)[:40])
@pytest.mark.parametrize('low,high', [(-1.5,2.5), (0.,2.), (-3.,-.5)])
@torch.no_grad()
def test_layer(layer, shape, low, high):
    "Levels, steps and clamping are those of a layer that is written down plainly; also simulated, in another layout, and with another number of samples"
    x = 2*torch.randn(shape, generator=torch.Generator().manual_seed(1))
    new = int8._KINDS[type(layer)](layer, low, high)
    wanted = by_hand(layer, x, low, high)
    assert new(x).dtype==torch.float32 and new(x).shape==wanted.shape and new(x).is_contiguous()
    close = lambda a, b: (a-b).abs().max()<1e-5*wanted.abs().max()
    near = lambda a: (a-wanted).abs().median()<1e-5*wanted.abs().max() # a level may be another, where it is halfway
    assert near(new(x)) and close(new.run(new._rounded(x), new.weight), new(x)) and close(new(x[:1]), new(x)[:1])
    if x.dim()==4:
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

@pytest.mark.parametrize('ratios,said', [((.9,), 'no layer'), ((2.,2.,2.,.9), 'returned as it is, in int8 it is not faster: ×0.90')])
def test_a_network_that_is_slower_is_returned_as_it_is(monkeypatch, ratios, said):
    faster(monkeypatch, *ratios)
    quantizer,model = Quantizer(),cnn()
    with pytest.warns(UserWarning, match=said): assert quantizer.quantize(model, X) is model
    assert not quantizer.report().int8.any()

class Own(nn.Linear):
    def forward(self, x): return super().forward(x.relu())

def test_layers_that_stay_in_float_say_why():
    tied = nn.Linear(3, 3)
    tied.weight = nn.Parameter(torch.randn(3, 3))
    other = nn.Linear(3, 3)
    other.weight = tied.weight
    hooked,broken = nn.Linear(3, 3),nn.Linear(3, 3)
    hooked.register_forward_hook(lambda m, x, y: 2*y)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.good,self.own,self.tied,self.other,self.hooked,self.idle,self.same = nn.Linear(3, 3),Own(3, 3),tied,other,hooked,nn.Linear(3, 3),nn.Conv2d(1, 1, 3, padding='same')
        def forward(self, x):
            for m in (self.good,self.own,self.tied,self.other,self.hooked): x = m(x)
            return self.same(x.view(-1, 1, 1, 3))
    _,report = all_int8(Net().eval(), torch.randn(5, 3))
    why = dict(zip(report.layer, report.why))
    assert why['own']=='Own has a forward of its own' and why['tied']==why['other']=='another module has the same weights' and why['hooked']=='it has hooks'
    assert why['idle']=='it does not run with these data' and "'same'" in why['same'] and list(report.layer[report.int8])==['good','']

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

def test_wrong_arguments():
    model = cnn()
    for make,said in [(lambda: Quantizer('statik'), "'statik' is not known"), (lambda: Quantizer(measure=1), 'measure is True, False or None'), (lambda: Quantizer().quantize(model), 'takes calibration_data'),
                      (lambda: Quantizer().quantize(model, []), 'no batch'), (lambda: Quantizer().quantize(model, X, 0), 'at least 1'), (lambda: Quantizer().quantize(model, 3), 'data are batches'),
                      (lambda: Quantizer().quantize(model, torch.randn(2, 5)), 'does not run with'), (lambda: Quantizer().quantize(model.to('meta'), X), 'on meta')]:
        with pytest.raises(ValueError, match=said): make()
    with pytest.raises(TypeError): Quantizer().quantize(3, X)

def test_options_are_bits():
    with warnings_are('ignore'): assert isinstance(Quantizer([('0.weight', 2)]), KMeansQuantizer) and isinstance(Quantizer(options={'0.weight':2}.items()), KMeansQuantizer)

def test_no_layer_of_a_kind():
    model = nn.Sequential(nn.ReLU())
    with pytest.warns(UserWarning, match='no layer'): assert Quantizer('weight_only').quantize(model, torch.randn(2, 2)) is model
