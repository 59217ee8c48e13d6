"""Which layers become semi-structured, and why others do not. Only a GPU stores and measures such weights: here, what does is replaced.
`pytest --device cuda` does it in earnest as well"""
import copy,warnings
from types import SimpleNamespace
import pytest,torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations,prune
from fasterai.sparse import semi_structured
from fasterai.sparse.semi_structured import _allowed,_apart,_backends,_crowded,_fitting,_steps,to_semi_structured
from fasterai.sparse.sparsifier import Sparsifier

half = torch.float16
elsewhere = torch.empty(0).device.type!='cpu'
on_gpu = torch.empty(0).device.type=='cuda' and torch.cuda.get_device_capability()>=(8,0)

@pytest.fixture(autouse=True)
def here(request):
    "Tests of decisions are on the CPU, wherever the others are"
    if 'earnest' in request.node.name or not elsewhere: yield
    else:
        with torch.device('cpu'): yield

@pytest.fixture
def gpu(monkeypatch):
    "A GPU that is made up: what a sparse weight takes beside 1 ms, by backend, and how it is stored"
    made = SimpleNamespace(ms=dict(cusparselt=.5, cutlass=.6), store=lambda w: w.clone(), calls=[])
    def compressed(w, cls):
        new = made.store(w.detach(), cls.BACKEND) if made.store.__code__.co_argcount>1 else made.store(w.detach())
        new.backend = cls.BACKEND
        return new
    def milliseconds(calls, device):
        outs = [f() for f in calls]
        made.calls.append([tuple(o.shape) for o in outs])
        ms = [1., *made.ms.values()] if len(calls)==3 else [1., made.ms['cusparselt']]
        return ms[:len(calls)]
    monkeypatch.setattr(semi_structured, '_lacks', lambda device: '')
    monkeypatch.setattr(semi_structured, '_compressed', compressed)
    monkeypatch.setattr(semi_structured, '_milliseconds', milliseconds)
    return made

def obeying(*layers):
    "A float16 model whose `Linear` layers obey 2:4, for inference"
    model,gen = nn.Sequential(*layers).half().eval(),torch.Generator(device='cpu').manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            w = torch.randn(m.weight.shape, generator=gen, device='cpu')
            w.view(-1, 4)[:,1::2] = 0
            m.weight.data.copy_(w)
    return model

def inputs(rows=8, n=64, dtype=half): return torch.randn(rows, n, generator=torch.Generator(device='cpu').manual_seed(1), device='cpu').to(dtype)
def mlp(): return obeying(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 128))

def convert(model, x=None, warns=False):
    "The copy and the rows of the report, by layer; `model` is as it was, and one warning is there if `warns`"
    x = inputs() if x is None else x
    was,modes,params = copy.deepcopy(model.state_dict()),[o.training for o in model.modules()],list(model.parameters())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        new,report = to_semi_structured(model, x, report=True)
    said = [str(o.message) for o in said if 'semi-structured' in str(o.message)]
    assert len(said)==warns, said
    assert all(torch.equal(v, was[k]) for k,v in model.state_dict().items()) and modes==[o.training for o in model.modules()]==[o.training for o in new.modules()]
    assert all(a is b for a,b in zip(model.parameters(), params)) and not {id(o) for o in new.parameters()} & {id(o) for o in params}
    assert list(report.columns)==['layer','shape','rows','dense ms','sparse ms','backend','ratio','kept as','why']
    rows = {o['layer']:o for o in report.to_dict('records')}
    return new,rows,(said or [''])[0]

def dense_alone(model, contains, x=None, layer='0'):
    "Layer `layer` of `model` stays dense, and the report says why"
    new,rows,said = convert(model, x, warns=True)
    assert rows[layer]['kept as']=='dense' and contains in rows[layer]['why'], rows[layer]['why']
    assert new.get_submodule(layer).weight.dtype==model.get_submodule(layer).weight.dtype
    return rows[layer],said

# what can be told of a weight

def test_groups_are_counted_along_inputs():
    w = torch.zeros(8, 8)
    w[:,0] = 1  # eight in a row along the outputs are none along the inputs
    assert _crowded(w)==(0, 16)
    w[2,:3] = 1
    w[5,4:] = -1
    assert _crowded(w)==(2, 16)
    assert _crowded(torch.ones(2, 3))==(0, 0) and _crowded(torch.ones(2, 7))==(2, 2)

def test_what_sparsifier_makes_obeys():
    model = nn.Sequential(nn.Linear(64, 32))
    Sparsifier(model, '2:4', layer_type=nn.Linear).sparsify_model(50)
    assert _crowded(model[0].weight)==(0, 512) and int((model[0].weight==0).sum())==1024

@pytest.mark.parametrize('dtype', [half,torch.bfloat16,torch.float32,torch.float64,torch.int8])
def test_shapes_are_those_that_torch_takes(dtype):
    "Torch's own check, but for where the weight is, is the oracle"
    for name,cls in _backends().items():
        for shape in [(16,16), (32,32), (32,64), (64,128), (10,64), (64,10), (48,64), (0,64)]:
            w = torch.zeros(shape).to(dtype)
            where = SimpleNamespace(is_cuda=True, dim=w.dim, is_contiguous=w.is_contiguous, dtype=w.dtype, shape=w.shape, device=w.device)
            try: cls._validate_device_dim_dtype_shape(where)
            except RuntimeError: assert name not in _fitting(w)
            else: assert name in _fitting(w)

# what is decided

def test_faster_layers_become_sparse(gpu):
    model = mlp()
    new,rows,_ = convert(model)
    for k in '02':
        assert rows[k]['kept as']=='semi-structured' and rows[k]['why']=='' and rows[k]['backend']=='cusparselt' and rows[k]['rows']==8
        assert (rows[k]['dense ms'],rows[k]['sparse ms'],rows[k]['ratio'])==(1., .5, 2.)
    assert [rows[k]['shape'] for k in '02']==[(64,64),(128,64)]
    assert not new[0].weight.requires_grad and new[0].bias.requires_grad and torch.equal(new(inputs()), model(inputs()))
    assert type(to_semi_structured(model, inputs())) is nn.Sequential  # without a report, the model alone

def test_the_faster_backend_is_kept(gpu):
    gpu.ms = dict(cusparselt=.9, cutlass=.7)
    rows = convert(mlp())[1]
    assert rows['0']['backend']=='cutlass' and rows['0']['sparse ms']==.7

def test_not_faster(gpu):
    gpu.ms = dict(cusparselt=1.28, cutlass=1.)
    row,said = dense_alone(mlp(), 'not faster: 1 ms instead of 1 ms')
    assert row['backend']=='cutlass' and row['ratio']==1 and '(0, 2)' in said

def test_only_some_are_faster(gpu, monkeypatch):
    monkeypatch.setattr(semi_structured, '_milliseconds', lambda calls, device: [1.]+[.5 if calls[0]().shape[-1]==128 else 2.]*(len(calls)-1))
    rows = convert(mlp())[1]
    assert [o['kept as'] for o in rows.values()]==['dense','semi-structured'] and 'not faster: 2 ms instead of 1 ms' in rows['0']['why']

def test_other_outputs(gpu):
    gpu.store = lambda w: w*1.1
    row,_ = dense_alone(mlp(), 'its outputs differ with cusparselt: they differ by ')
    assert 'with cutlass' in row['why'] and 'but float16 allows' in row['why'] and row['ratio']!=row['ratio']

def test_one_backend_is_wrong(gpu):
    "The other one is measured, and the report tells of both"
    gpu.store = lambda w, name: w.clone() if name=='cusparselt' else w.flip(0)
    rows = convert(mlp())[1]
    assert rows['0']['backend']=='cusparselt' and rows['0']['kept as']=='semi-structured' and 'with cutlass' in rows['0']['why']

def test_backend_that_does_not_run(gpu):
    def store(w, name): raise RuntimeError('no such library\nmore')
    gpu.store = store
    row,_ = dense_alone(mlp(), 'cusparselt does not run: RuntimeError: no such library; cutlass does not run')
    assert 'more' not in row['why']

def test_rounding_is_allowed_and_no_more():
    x = inputs(64)
    w = obeying(nn.Linear(64, 64))[0].weight.detach()
    dense = F.linear(x, w)
    assert _apart(dense, F.linear(x.double(), w.double()).half())<=_allowed(half)
    assert _apart(dense, dense*1.01)>_allowed(half) and _apart(dense, dense[:,:-1])==float('inf') and _apart(dense, dense.float())==float('inf')
    far = dense.clone()
    far[0,0] = float('inf')
    assert _apart(dense, far)==float('inf') and _apart(far, far)==0 and _apart(dense*0, dense*0)==0 and _apart(dense*0, dense)>1

def test_allowed_for_short_products(monkeypatch):
    was = _allowed(torch.float32)
    monkeypatch.setattr(torch.backends.cuda, 'matmul', SimpleNamespace(allow_tf32=True))
    assert _allowed(torch.float32)>100*was and _allowed(half)==4*2**-10

def test_crowded(gpu):
    model = mlp()
    model[0].weight.data[:3,:4] = 1
    rows = convert(model)[1]
    assert rows['0']['why']=='does not follow 2:4: 3 of 1024 groups have more than two nonzero weights' and rows['2']['kept as']=='semi-structured'

def test_dtypes(gpu):
    row,said = dense_alone(mlp().double(), 'float64: needs float16, bfloat16 or float32', inputs(dtype=torch.float64))
    assert 'float64: needs' in said
    assert all(o['kept as']=='semi-structured' for o in convert(mlp().bfloat16(), inputs(dtype=torch.bfloat16))[1].values())

def test_float32_is_for_those_that_take_it(gpu):
    gpu.ms = dict(cusparselt=.5)
    assert {o['backend'] for o in convert(mlp().float(), inputs(dtype=torch.float32))[1].values()}=={'cutlass'}

def test_shapes(gpu):
    steps = {k:_steps(cls, half) for k,cls in _backends().items()}
    model = obeying(nn.Linear(64, 10))
    dense_alone(model, f'its shape (10, 64) does not fit: its sides must be multiples of {steps["cusparselt"]} for cusparselt, of {steps["cutlass"]} for cutlass')

def test_shape_that_fits_one(gpu):
    assert convert(obeying(nn.Linear(64, 16)))[1]['0']['backend']=='cusparselt'

def test_on_the_cpu():
    row,said = dense_alone(mlp(), 'is on the CPU: needs a GPU of compute capability 8.0')
    assert 'none of 2 Linear layers' in said and said.count('is on the CPU')==1 and '(0, 2)' in said

def test_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (7,5))
    assert semi_structured._lacks(torch.device('cuda'))=='is on a GPU of compute capability 7.5: needs a GPU of compute capability 8.0'
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (9,0))
    assert semi_structured._lacks(torch.device('cuda'))==''
    assert 'is on the MPS' in semi_structured._lacks(torch.device('mps'))

def test_all_reasons_at_once():
    model = nn.Sequential(nn.Linear(64, 10)).double()
    row,_ = dense_alone(model, 'does not follow 2:4', inputs(dtype=torch.float64))
    assert 'float64' in row['why'] and 'is on the CPU' in row['why']

# what users bring

def test_not_called(gpu):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.unused = obeying(nn.Linear(64, 64))[0],obeying(nn.Linear(64, 64))[0]
        def forward(self, x): return self.a(x)
    rows = convert(Net())[1]
    assert rows['a']['kept as']=='semi-structured' and 'is not called' in rows['unused']['why'] and rows['unused']['rows']==0

if not elsewhere:  # a default device that is set keeps PyTorch from fusing
    def test_attention_reads_its_weight(gpu):
        "A fused operation reads weights of layers that are not called: they stay, and the copy runs as before"
        layer = obeying(nn.TransformerEncoderLayer(64, 2, 64, batch_first=True))
        x = inputs(12).view(2, 6, 64)
        with torch.no_grad():
            new,rows,_ = convert(layer, x, warns=True)
            assert torch.equal(new(x), layer(x))
        assert all('is not called' in o['why'] for o in rows.values()) and len(rows)==3

def test_calls_are_counted_by_shape(gpu):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = obeying(nn.Linear(64, 64))[0]
        def forward(self, x): return self.a(self.a(self.a(x)))[:2]+self.a(x[:2])
    rows = convert(Net())[1]
    assert rows['a']['rows']==3*8+2 and rows['a']['dense ms']==4 and rows['a']['sparse ms']==2
    assert [o[0] for o in gpu.calls]==[(8,64),(2,64)]  # each shape is measured once

def test_tied_weights(gpu):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = (obeying(nn.Linear(64, 64))[0] for _ in range(3))
            self.b.weight = self.a.weight
        def forward(self, x): return self.c(self.b(self.a(x)))
    new,rows,_ = convert(Net())
    assert rows['a']['why']=='its weight is shared with b' and rows['b']['why']=='its weight is shared with a' and new.a.weight is new.b.weight
    assert rows['c']['kept as']=='semi-structured'

def test_layer_that_is_there_twice(gpu):
    "One layer under two names is one layer"
    layer = obeying(nn.Linear(64, 64))[0]
    new,rows,_ = convert(nn.Sequential(layer, layer))
    assert list(rows)==['0'] and rows['0']['kept as']=='semi-structured' and new[0] is new[1]

@pytest.mark.parametrize('how', [lambda m: parametrizations.spectral_norm(m), lambda m: prune.l1_unstructured(m, 'weight', .5)], ids=['parametrized','hook'])
def test_computed_weights(gpu, how):
    model = mlp().float()
    how(model[0])
    new,rows,_ = convert(model, inputs(dtype=torch.float32))
    assert 'its weight is computed' in rows['0']['why'] and 'makes it permanent' in rows['0']['why'] and rows['2']['kept as']=='semi-structured'

def test_weight_that_is_read_elsewhere(gpu):
    "Where the model does not run with a sparse weight, that one stays dense, and others do not"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = (obeying(nn.Linear(64, 64))[0] for _ in range(3))
        def forward(self, x):
            if hasattr(self.b.weight, 'stored'): raise NotImplementedError('no sum of that')
            return self.c(self.b(self.a(x)))*self.b.weight.sum()
    class Stored(torch.Tensor): stored = True
    gpu.store = lambda w: w.clone().as_subclass(Stored)
    model = Net()
    new,rows,_ = convert(model)
    assert [o['kept as'] for o in rows.values()]==['semi-structured','dense','semi-structured']
    assert rows['b']['why']=='the model does not run with it: NotImplementedError: no sum of that'
    assert torch.equal(new(inputs()), model(inputs())) and new.b.weight.requires_grad

class Pretended(torch.sparse.SparseSemiStructuredTensorCUTLASS):
    "Torch's class of tensors, with all that it does but for the product, which a CPU cannot do"
    def _mm(self, B, *, bias=None, should_transpose_dense=False, **kwargs):
        out = self.packed@(B.t() if should_transpose_dense else B)
        if bias is not None: out = out+bias[:,None]
        return out.t() if should_transpose_dense else out

def pretended(w): return Pretended(w.shape, w.clone(), None, None, None, None)

def test_tensors_of_torch(gpu):
    "A tensor that computes by code of its own is stored, called and told apart as a plain one is not"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = (obeying(nn.Linear(64, 64, bias=o))[0] for o in (True,True,False))
        def forward(self, x): return self.c(self.b(self.a(x).view(2, 4, 64))[:,1:].clone())*self.b.weight.abs().mean()
    gpu.store = pretended
    model = Net()
    new,rows,_ = convert(model)
    assert [o['kept as'] for o in rows.values()]==['semi-structured','dense','semi-structured']
    assert 'the model does not run with it: NotImplementedError' in rows['b']['why']
    assert isinstance(new.a.weight, Pretended) and isinstance(new.a.weight, nn.Parameter) and type(new.b.weight) is nn.Parameter and not new.a.weight.requires_grad
    with torch.no_grad(): assert _apart(model(inputs()), new(inputs()))<=_allowed(half)
    with pytest.raises(ValueError, match='a.weight is a Pretended of torch.float16 and not a plain tensor'): to_semi_structured(new, inputs())

def test_rows_with_gaps(gpu):
    "Torch views the rows of a semi-structured layer as a matrix, which those of a slice are not"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = obeying(nn.Linear(64, 64))[0]
        def forward(self, x): return self.a(x.view(2, 4, 64)[:,1:])
    gpu.store = pretended
    row,_ = dense_alone(Net(), 'cusparselt does not run: ', layer='a')

def test_bare_layer(gpu):
    new,rows,_ = convert(obeying(nn.Linear(64, 64))[0])
    assert rows['']['kept as']=='semi-structured' and type(new) is nn.Linear

def test_model_without_linear_layers():
    new,rows,said = convert(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8), warns=True)
    assert rows=={} and 'has no Linear layer' in said

def test_training_mode_and_hooks_stay(gpu):
    model = obeying(nn.Linear(64, 64), nn.Dropout(), nn.BatchNorm1d(64)).train()
    n = len(nn.modules.module._global_forward_pre_hooks)
    convert(model)
    assert len(nn.modules.module._global_forward_pre_hooks)==n

def test_wrappers(gpu):
    model = mlp()
    assert list(convert(model)[1])==list(to_semi_structured(torch.nn.DataParallel(model), inputs(), report=True)[1].layer)
    with torch.inference_mode(): assert type(to_semi_structured(model, inputs())) is nn.Sequential

def test_inputs_are_found(gpu): assert to_semi_structured(mlp(), report=True)[1]['kept as'].eq('semi-structured').all()

@pytest.mark.parametrize('model,kind,words', [(3,TypeError,'a model is an nn.Module, not 3'), (nn.Linear,TypeError,'make one'), ({},TypeError,'nn.Module'),
    (lambda: torch.jit.script(nn.Linear(4, 4)),ValueError,'TorchScript'), (lambda: nn.Sequential(nn.LazyLinear(4)),ValueError,'0.weight has no shape yet'),
    (lambda: nn.Sequential(nn.Linear(4, 4, device='meta')),ValueError,'0.weight is on the meta device and has no values')])
def test_refused(model, kind, words):
    with warnings.catch_warnings(), pytest.raises(kind, match=words):
        warnings.simplefilter('ignore')
        to_semi_structured(model() if type(model) is type(lambda: 0) else model, torch.zeros(2, 4))

def test_inputs_that_do_not_run():
    with pytest.raises(ValueError, match='does not run with example_inputs'): to_semi_structured(mlp(), inputs(n=32))

# in earnest

if on_gpu:  # of compute capability 8.0, and with --device cuda
    @pytest.mark.parametrize('believe', [True,False], ids=['as measured','as if faster'])
    def test_in_earnest(monkeypatch, believe):
        model = nn.Sequential(nn.Linear(4096, 4096)).half().eval()
        Sparsifier(model, '2:4', layer_type=nn.Linear).sparsify_model(50)
        assert _crowded(model[0].weight)==(0, 4096*1024)
        if not believe: monkeypatch.setattr(semi_structured, '_milliseconds', lambda calls, device: [1.]+[.5]*(len(calls)-1))
        x = torch.randn(2048, 4096).half()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            new,report = to_semi_structured(model, x, report=True)
        row = report.iloc[0]
        kept = isinstance(new[0].weight, torch.sparse.SparseSemiStructuredTensor)
        assert kept==(row['kept as']=='semi-structured') and type(model[0].weight) is nn.Parameter
        assert row['ratio']>0 and (kept if not believe else kept==(row['ratio']>1)), row['why']
        with torch.no_grad():
            assert _apart(model(x), new(x))<=_allowed(half)
            exact = F.linear(x.double(), model[0].weight.double(), model[0].bias.double())
            assert float((new(x).double()-exact).abs().max()/exact.abs().max())<=_allowed(half)
            assert _apart(model(x[:3]), new(x[:3]))<=_allowed(half)  # torch fills up what is no multiple of eight
