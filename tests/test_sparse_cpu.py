"Layers without their zeros: they compute the same, wherever they are put; the clock is ours, so that no test depends on the machine"
import copy,io,pickle
import numpy as np
import pytest,torch
from torch import nn
from fasterai.export import sparse_cpu as cpu
from fasterai.export.all import sparse_for_cpu
from fasterai.export.sparse_cpu import SparseConv2d,SparseLinear
from fasterai.sparse.all import Sparsifier

KINDS = nn.Linear,nn.Conv2d

def zeroed(model, percent=90, granularity='weight'):
    torch.manual_seed(0)
    for kind in KINDS:
        if any(isinstance(m, kind) for m in model.modules()): Sparsifier(model, granularity, 'local', layer_type=kind).sparsify_model(percent)
    return model.eval()

def mlp(): return zeroed(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)))
def cnn(): return zeroed(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(16*16, 4)))

@pytest.fixture
def faster(monkeypatch):
    "Whatever comes second takes half of the time"
    def clock(*models, example_inputs, repeats, progress): return np.array([[2.]*repeats,[1.]*repeats])
    monkeypatch.setattr(cpu, 'latency', clock)

def same(a, b, x):
    with torch.no_grad(): torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('percent', [0,60,100])
@pytest.mark.parametrize('bias', [True,False])
@pytest.mark.parametrize('shape', [(6,),(1,6),(5,6),(2,3,6),(0,6)])
def test_linear(percent, bias, shape):
    layer = zeroed(nn.Linear(6, 4, bias=bias), percent)
    same(SparseLinear(layer), layer, torch.randn(shape))

@pytest.mark.parametrize('how', [dict(kernel_size=1), dict(kernel_size=1, stride=2), dict(kernel_size=1, padding=1), dict(kernel_size=3, padding=1, bias=False),
    dict(kernel_size=(3,1), stride=(1,2), padding=(0,2), dilation=(2,1))], ids=str)
@pytest.mark.parametrize('shape', [(1,4,7,9),(3,4,7,9),(4,7,9),(0,4,7,9)])
def test_convolution(how, shape):
    layer = zeroed(nn.Conv2d(4, 6, **how), 70)
    x = torch.randn(shape)
    same(SparseConv2d(layer), layer, x)
    if x.dim()==4: same(SparseConv2d(layer), layer, x.to(memory_format=torch.channels_last))

def test_columns_of_a_view():
    "Inputs that do not lie one behind the other"
    layer = zeroed(nn.Linear(6, 4))
    same(SparseLinear(layer), layer, torch.randn(6, 5).t())
    same(SparseLinear(layer), layer, torch.randn(5, 12)[:,::2])

def test_outputs_can_be_viewed():
    out = SparseLinear(zeroed(nn.Linear(6, 4)))(torch.randn(2, 3, 6))
    assert out.is_contiguous()

@pytest.mark.parametrize('cut', ['gradient','autocast','double'])
def test_all_else_is_dense(cut):
    layer = zeroed(nn.Linear(6, 4))
    sparse,x = SparseLinear(layer),torch.randn(3, 6)
    if cut=='gradient':
        grads = []
        for m in (layer,sparse):
            leaf = x.clone().requires_grad_()
            m(leaf).square().sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)
    if cut=='double': same(sparse.double(), layer.double(), x.double())
    if cut=='autocast':
        with torch.autocast('cpu', torch.bfloat16): assert sparse(x).dtype==layer(x).dtype

@pytest.mark.parametrize('make', [mlp,cnn])
def test_network(make, faster):
    model,x = make(),torch.randn(2, 16) if make is mlp else torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    new,report = sparse_for_cpu(model, x, report=True)
    same(new, model, x)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items()) and not any(isinstance(m, cpu.Sparse) for m in model.modules())
    assert report.is_sparse.tolist()==([True]*3 if make is mlp else [True,False,True,True,True])
    assert (report.bytes_sparse.dropna()<=report.bytes[report.is_sparse]).all()
    for o in (copy.deepcopy(new),pickle.loads(pickle.dumps(new))): same(o, model, x)

def test_state_goes_to_another_copy(faster):
    model,x = mlp(),torch.randn(2, 16)
    new,other = sparse_for_cpu(model, x),sparse_for_cpu(model, x)
    file = io.BytesIO()
    torch.save(new.state_dict(), file)
    file.seek(0)
    with torch.no_grad(): other[0].values.zero_()
    other.load_state_dict(torch.load(file))
    same(other, model, x)

def test_a_layer_alone(faster):
    layer = zeroed(nn.Linear(16, 8))
    assert type(sparse_for_cpu(layer, torch.randn(2, 16))) is SparseLinear

def test_not_faster_is_dense(monkeypatch):
    monkeypatch.setattr(cpu, 'latency', lambda *models, repeats, **kwargs: np.array([[1.]*repeats,[1.1]*repeats]))
    model = mlp()
    with pytest.warns(UserWarning, match='returned unchanged, with dense layers: no layer is faster'): new,report = sparse_for_cpu(model, torch.randn(2, 16), report=True)
    assert new is model and not report.is_sparse.any() and report.why[0].startswith('not faster: ×0.91')

def test_network_that_is_not_faster_is_dense(monkeypatch):
    "Though its layers are"
    def clock(old, new, repeats, **kwargs): return np.array([[1.]*repeats,[2. if isinstance(old, nn.Sequential) else .5]*repeats])
    monkeypatch.setattr(cpu, 'latency', clock)
    model = mlp()
    with pytest.warns(UserWarning, match='not faster: ×0.50'): new,report = sparse_for_cpu(model, torch.randn(2, 16), report=True)
    assert new is model and not report.is_sparse.any()

class Odd(nn.Linear):
    def forward(self, x): return super().forward(x)+1

def hooked():
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda m, args, out: out)
    return layer

def infinite():
    layer = nn.Linear(8, 8)
    with torch.no_grad(): layer.weight[0,0] = torch.inf
    return layer

@pytest.mark.parametrize('make, why', [(lambda: Odd(8, 8), 'overrides forward'), (hooked, 'hooks'), (infinite, 'finite'), (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 'computed'),
    (lambda: nn.Linear(8, 8), '0% of its weights')], ids=['forward','hook','infinite','computed','no zeros'])
def test_layers_that_stay(make, why, faster):
    layer = make()
    if why!='0% of its weights' and why!='computed':
        with torch.no_grad(): layer.weight[1:] = 0
    model = nn.Sequential(zeroed(nn.Linear(8, 8)), layer).eval()
    if why=='finite':
        with pytest.warns(UserWarning, match='returned unchanged'): _,report = sparse_for_cpu(model, torch.randn(2, 8), report=True)
        assert why in report.why[1]  # what it gives is no number, and cannot be compared
        return
    new,report = sparse_for_cpu(model, torch.randn(2, 8), report=True)
    assert why in report.why[1] and report.is_sparse.tolist()==[True,False,True]
    assert type(new[1]) is type(layer) and type(new[0]) is SparseLinear

def test_shared_layers_stay_shared(faster):
    layer = nn.Linear(8, 8)
    model = zeroed(nn.Sequential(layer, nn.ReLU(), layer))
    new = sparse_for_cpu(model, torch.randn(2, 8))
    assert type(new[0]) is SparseLinear and new[0] is new[2]

def test_shared_weights_stay(faster):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    _,report = sparse_for_cpu(zeroed(model), torch.randn(2, 8), report=True)
    assert report.is_sparse.tolist()==[False,False,True,True] and report.why[0]=='another module has the same weights'

def test_layers_that_are_not_called(faster):
    model = zeroed(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    x = torch.randn(2, 5, 8)
    new,report = sparse_for_cpu(model, x, report=True)
    same(new, model, x)
    assert report.set_index('layer').why['self_attn.out_proj']=='it is not called: it does not run with these inputs, or another module reads its weight'

class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
    def forward(self, a, b): return dict(out=self.layer(a)+b)

def test_inputs_by_name(faster):
    model,x = zeroed(ByName()),dict(a=torch.randn(2, 8), b=torch.randn(2, 8))
    new = sparse_for_cpu(model, x)
    with torch.no_grad(): torch.testing.assert_close(new(**x)['out'], model(**x)['out'])

@pytest.mark.parametrize('wrap', [nn.DataParallel,torch.compile], ids=['DataParallel','compiled'])
def test_wrapped(wrap, faster):
    model,x = mlp(),torch.randn(2, 16)
    new = sparse_for_cpu(wrap(model), x)
    assert type(new) is nn.Sequential
    same(new, model, x)

def test_training_mode_is_kept(faster):
    model = mlp().train()
    new = sparse_for_cpu(model, torch.randn(2, 16))
    assert model.training and not new.training

@pytest.mark.parametrize('model, error', [(torch.randn(2), TypeError), (nn.Linear(2, 2).to('meta'), ValueError), (nn.LazyLinear(3), ValueError)], ids=['tensor','meta','lazy'])
def test_refused(model, error):
    with pytest.raises(error): sparse_for_cpu(model, torch.randn(2, 2))

def test_wrong_inputs():
    model = mlp()
    with pytest.raises(ValueError): sparse_for_cpu(model, torch.randn(2, 3))
    assert type(model[0]) is nn.Linear

def test_compiled(faster):
    model,x = mlp(),torch.randn(2, 16)
    same(torch.compile(sparse_for_cpu(model, x), backend='eager'), model, x)

def test_export_is_refused(faster):
    model,x = mlp(),torch.randn(2, 16)
    with pytest.raises(ValueError, match='export the original network'): torch.export.export(sparse_for_cpu(model, x), (x,))

def test_layers_that_get_inputs_by_name(faster):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 8)
        def forward(self, x): return self.l(input=x)
    _,report = sparse_for_cpu(nn.Sequential(zeroed(Inside()), zeroed(nn.Linear(8, 8))), torch.randn(2, 8), report=True)
    assert report.why[0]=='its input is passed by name' and report.is_sparse[1]
