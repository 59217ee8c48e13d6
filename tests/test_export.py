"Networks that become files: right, or refused in words, whatever was brought and whatever the library has made of it"
import os, subprocess, sys, warnings
from copy import deepcopy
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from fastai.torch_core import TensorImage
from fasterai.analyze.all import n_macs
from fasterai.export import cpu
from fasterai.export.all import ONNXModel, accelerate_model_for_cpu, export_onnx, optimize_for_cpu, to_exported, verify_onnx
from fasterai.misc.all import BN_Folder, Conv_Decomposer, FC_Decomposer
from fasterai.prune.all import Pruner, drop_blocks
from fasterai.quantize.all import KMeansQuantizer
from fasterai.repair.all import repair
from fasterai.sparse.all import Sparsifier
from tiny import WRAPPERS, Net, warnings_are

onnx = pytest.importorskip('onnx')

class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv,self.norm = nn.Conv2d(n, n, 3, padding=1),nn.BatchNorm2d(n)
    def forward(self, x): return x+torch.relu(self.norm(self.conv(x)))

def net(seed=0):
    "A small residual network whose norms have seen something"
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(8), Block(8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    for _ in range(2): model(torch.randn(4, 3, 8, 8))
    return model

X = torch.randn(3, 3, 8, 8, generator=torch.Generator(device='cpu').manual_seed(1), device='cpu').to(torch.empty(0).device)

def shared(m): KMeansQuantizer(3).quantize(m); return m
def sparse(m, granularity='weight'): Sparsifier(m, granularity).sparsify_model(50); return m
def masked(m): l1_unstructured(m[7], 'weight', .5); return m
def shallower(m): drop_blocks(m, 1, X); return m
def repaired(m):
    teacher,small = deepcopy(m),Pruner(m, 40).prune_model()
    repair(small, teacher, X)
    return small

MADE = dict(plain=lambda m: m, pruned=lambda m: Pruner(m, 50).prune_model(), lossless=lambda m: Pruner().prune_model(sparse(m, 'filter')), folded=lambda m: BN_Folder().fold(m),
    linear=lambda m: FC_Decomposer().decompose(m, .6), convs=lambda m: Conv_Decomposer().decompose(m, .6), shared=shared, sparse=sparse, repaired=repaired, masked=masked,
    shallower=shallower, all=lambda m: shared(FC_Decomposer().decompose(BN_Folder().fold(Pruner(m, 40).prune_model()), .6)))

def outputs(model, *args, **kwargs):
    with torch.no_grad(): return deepcopy(model).eval()(*args, **kwargs)

@pytest.mark.parametrize('how', MADE)
def test_made(how, tmp_path):
    "What the library makes is the same in a file, for numbers of samples that nobody has tried before"
    with warnings_are('ignore'): model = MADE[how](net())
    file = export_onnx(model, X, tmp_path/'m.onnx')
    assert file.difference<1e-5 and file.samples==(3,1,5) and file.n_bytes==os.path.getsize(file)
    runs = ONNXModel(file)
    for n in (2,7):
        x = torch.randn(n, 3, 8, 8)
        torch.testing.assert_close(runs(x), outputs(model, x), rtol=1e-4, atol=1e-5)
    assert verify_onnx(model, file, X).difference<1e-5

@dataclass
class Found:
    scores:torch.Tensor
    parts:list
    n:int=3

class Several(nn.Module):
    "Ids, numbers and an option come in, an object goes out; the last layer's weight is the first one's"
    def __init__(self):
        super().__init__()
        self.table,self.layer,self.out = nn.Embedding(50, 8),nn.Linear(8, 8),nn.Linear(8, 50, bias=False)
        self.out.weight = self.table.weight
    def forward(self, ids, shift, scale=2., drop=None):
        h = self.layer(self.table(ids))+shift.unsqueeze(1)*scale
        return Found(self.out(h), [h,dict(mean=h.mean(1), none=drop)])

def test_forms(tmp_path):
    "Arguments by place and by name, options that are part of the graph, and an output that is an object; a tied weight is written once"
    torch.manual_seed(0)
    model,ids,shift = Several(),torch.randint(0, 50, (4,6)),torch.randn(4, 8)
    file = export_onnx(model, (ids,shift), tmp_path/'m.onnx')
    assert list(file.inputs)==['ids','shift'] and list(file.outputs)==['scores','parts_0','parts_1_mean'] and file.inputs['ids']==('batch',6)
    assert sum(o.name.endswith('weight') and list(o.dims)==[50,8] for o in onnx.load(file).graph.initializer)==1
    expected,runs = outputs(model, ids[:2], shift[:2]),ONNXModel(file)
    for out in (runs(ids[:2], shift[:2]),runs(ids[:2], shift=shift[:2]),runs(dict(shift=shift[:2], ids=ids[:2])),runs(shift=shift[:2].numpy(), ids=ids[:2].int())):
        torch.testing.assert_close((out.scores,out.parts[0],out['parts'][1].mean), (expected.scores,expected.parts[0],expected.parts[1]['mean']), rtol=1e-4, atol=1e-5)
    by_name = export_onnx(model, dict(ids=ids, shift=shift, scale=3.), tmp_path/'n.onnx', output_names=['a','b','c'], input_names=['i','j'])
    assert (list(by_name.inputs),list(by_name.outputs))==(['i','j'],['a','b','c'])
    with pytest.raises(ValueError, match='scale=2.0 cannot be passed'): ONNXModel(by_name)(i=ids, j=shift, scale=2.)
    verify_onnx(model, by_name, dict(ids=ids, shift=shift, scale=3.))
    with pytest.raises(ValueError, match='and this Several give different outputs'): verify_onnx(model, by_name, (ids,shift))

def test_nested(tmp_path):
    "Tensors in lists and dicts; one that is no part of the batch, and one that comes out as it went in"
    model = Net(lambda m, xs, more: (xs[0]*more['by']+m.layer(xs[1])@more['table'],xs[0]), layer=nn.Linear(3, 3))
    inputs = [torch.randn(2, 3),torch.randn(2, 3)],dict(by=torch.randn(2, 1), table=torch.eye(3), note='x')
    file = export_onnx(model, inputs, tmp_path/'m.onnx')
    assert [o[0] for o in file.inputs.values()]==['batch','batch','batch',3]
    out = ONNXModel(file)(*inputs)
    torch.testing.assert_close(out, outputs(model, *inputs), rtol=1e-4, atol=1e-5)
    assert torch.equal(out[1], inputs[0][0])

def test_left_as_it_is(tmp_path):
    "Flags, buffers, hooks, gradients and the generators of the model's owner"
    model,seen = net().train(),[]
    model[1].eval()
    hook = lambda m, args, out: seen.append(type(out))
    model[0].register_forward_hook(hook)
    model[7].weight.grad = torch.ones_like(model[7].weight)
    state,flags,generator = deepcopy(model.state_dict()),[m.training for m in model.modules()],torch.get_rng_state()
    export_onnx(model, X, tmp_path/'m.onnx')
    to_exported(model, X)
    assert [m.training for m in model.modules()]==flags and list(model[0]._forward_hooks.values())==[hook] and torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, state[k]) for k,v in model.state_dict().items()) and all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert model[7].weight.grad.eq(1).all() and torch.is_grad_enabled()

def test_outside_of_the_batch(tmp_path):
    "An array that is as long as the batch by chance stays as it is"
    model = Net(lambda m, x, table: m.layer(x)@table, layer=nn.Linear(3, 3))
    assert list(export_onnx(model, (torch.randn(3, 3),torch.eye(3)), tmp_path/'m.onnx').inputs.values())==[('batch',3),(3,3)]

@pytest.mark.parametrize('how', WRAPPERS)
def test_wrappers(how, tmp_path):
    model = net()
    file = export_onnx(WRAPPERS[how](model), TensorImage(X), tmp_path/'m.onnx')
    torch.testing.assert_close(ONNXModel(file)(TensorImage(X)), outputs(model, X), rtol=1e-4, atol=1e-5)

def test_surroundings(tmp_path):
    "Inference mode, autocast and a sample in an array change nothing"
    model = net()
    with torch.inference_mode(), torch.autocast('cpu'): file = export_onnx(model, X.numpy(), tmp_path/'m.onnx')
    assert verify_onnx(model, file, X).difference<1e-5

LAYERS = {0:'1, a BatchNorm2d',3:'3.norm, a BatchNorm2d',7:'7, a Linear',9:'9, a Linear'}  # in a file, a norm is one with its convolution

def test_another_network_is_not_verified(tmp_path):
    "Whichever layer is another one, it is named; so is a file whose batch is fixed, and one of another form"
    model = net()
    file = export_onnx(model, X, tmp_path/'m.onnx')
    for i,name in LAYERS.items():
        other = deepcopy(model)
        layer = other[i].conv if i==3 else other[i]
        with torch.no_grad(): layer.weight[1] *= -1.1
        with pytest.raises(ValueError, match=f'(?s)give different outputs with 3 samples: output differs by .*the first layer that differs is {name}'): verify_onnx(other, file, X)
    with pytest.raises(ValueError, match='has the shape'): verify_onnx(net()[:-1], file, X)
    with pytest.raises(ValueError, match='takes input, but the network'): verify_onnx(Several(), file, (torch.zeros(2, 6).long(),torch.zeros(2, 8)))
    fixed = export_onnx(model, X, tmp_path/'f.onnx', dynamic_batch=False)
    assert fixed.inputs['input']==(3,3,8,8) and fixed.samples==(3,)
    verify_onnx(model, fixed, X, dynamic_batch=False)
    with pytest.raises(ValueError, match=r'f.onnx does not run with input \[1, 3, 8, 8\].*its sizes are fixed'): verify_onnx(model, fixed, X)

def test_a_layer_that_does_not_show(tmp_path):
    "Outputs are the same as long as what comes after a layer is zero: the layers themselves are compared"
    model = net()
    nn.init.zeros_(model[9].weight)
    file = export_onnx(model, X, tmp_path/'m.onnx')
    other = deepcopy(model)
    with torch.no_grad(): other[7].weight *= 1.5
    with pytest.raises(ValueError, match='outputs of the network agree here, but not those of layer 7, a Linear'): verify_onnx(other, file, X)

def test_zeros_show_something(tmp_path):
    "A sample of zeros proves little: one that is drawn is compared as well"
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    file = export_onnx(model, torch.zeros(2, 4), tmp_path/'m.onnx')
    with pytest.raises(ValueError, match='with 5 samples'): verify_onnx(nn.Sequential(nn.Linear(4, 4, bias=False)), file, torch.zeros(2, 4))

class Deciding(nn.Module):
    def forward(self, x): return x+1 if x.sum()>0 else x

REFUSED = dict(
    decides=(Deciding, torch.ones(2, 3), 'cannot make a graph of this Deciding.*GuardOnDataDependentSymNode.*line'),
    complex=(lambda: Net(lambda m, x: torch.fft.fft(x)), torch.ones(2, 3), 'complex numbers, which ONNX does not have'),
    unknown=(lambda: Net(lambda m, x: torch.linalg.svd(x)[1]), torch.randn(2, 3, 3), 'ONNX cannot represent this Net: .*linalg_svd'),
    fixed=(lambda: Net(lambda m, x: x.view(2, 3)), torch.randn(2, 3), 'accepts only 2 samples.*dynamic_batch=False'),
    branches=(lambda: Net(lambda m, x: x+1 if len(x)<4 else x), torch.randn(2, 3), 'The batch cannot be open: `dynamic_batch=False`'),
    draws=(lambda: Net(lambda m, x: x+torch.rand_like(x)), torch.randn(2, 3), 'The network draws random numbers'),
    nothing=(lambda: Net(lambda m, x: None), torch.randn(2, 3), 'returns no tensor'),
    shape=(net, (3,3,8,8), 'is a shape, not an input'))

@pytest.mark.parametrize('what', REFUSED)
def test_refused(what, tmp_path, capfd):
    "With the reason; a file that was there stays, nothing is left beside it, and nothing is printed"
    make,x,said = REFUSED[what]
    path = tmp_path/'m.onnx'
    path.write_text('what was there')
    with pytest.raises(ValueError, match=f'(?s){said}'): export_onnx(make(), x, path)
    assert path.read_text()=='what was there' and os.listdir(tmp_path)==['m.onnx'] and capfd.readouterr()==('','')

WRONG = [(dict(quantize_mode='int8'), "'int8' is not one of dynamic, static"), (dict(quantize=True, quantize_mode='static'), 'needs calibration_data'), (dict(calibration_data=X), 'is for quantize=True'),
    (dict(input_names=['a','b']), 'one for each of input'), (dict(output_names=['a','a']), 'one for each of output'), (dict(dynamic_batch=2), 'dynamic_batch must be True or False'), (dict(batch_axis=-1), 'batch_axis must be 0, 1'),
    (dict(rtol='small'), 'rtol must be a number'), (dict(opset_version=9), 'opset_version=9 cannot represent this')]

@pytest.mark.parametrize('given,said', WRONG, ids=lambda o: ','.join(o) if isinstance(o, dict) else '')
def test_wrong_arguments(given, said, tmp_path):
    with pytest.raises(ValueError, match=said): export_onnx(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3), tmp_path/'m.onnx', **given)
    assert not os.listdir(tmp_path)

def test_places(tmp_path):
    "A path is told apart from a sample, a folder from a file"
    with pytest.raises(ValueError, match=r'export_onnx\(model, sample, path\)'): export_onnx(net(), 'm.onnx')
    with pytest.raises(IsADirectoryError): export_onnx(net(), X, tmp_path)
    if Path('/proc').is_dir():
        with pytest.raises(OSError, match='no file can be written there.*/proc'): export_onnx(net(), X, '/proc/m.onnx')
    with pytest.raises(FileNotFoundError, match='no folder'): export_onnx(net(), X, tmp_path/'a'/'m.onnx')
    with pytest.raises(FileNotFoundError, match='there is no file'): ONNXModel(tmp_path/'m.onnx')
    (tmp_path/'m.onnx').write_text('not a network')
    with pytest.raises(ValueError, match='ONNX Runtime cannot run m.onnx'): ONNXModel(tmp_path/'m.onnx')

def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'ONNX files need onnxscript: pip install fasterai\[onnx\]'): export_onnx(net(), X, tmp_path/'m.onnx')
    code = 'import sys, fasterai.export.all; assert not {"onnx","onnxruntime","onnxscript","torch._dynamo"} & {*sys.modules}'
    assert subprocess.run([sys.executable, '-c', code]).returncode==0

def test_the_file_tells_nothing_of_this_computer(tmp_path):
    text = open(export_onnx(net(), X, tmp_path/'m.onnx'), 'rb').read()
    assert not any(o in text for o in (b'site-packages',b'.py',os.fsencode(os.getcwd()),os.fsencode(tmp_path)))
    names = {o.name for o in onnx.load(tmp_path/'m.onnx').graph.initializer}
    assert {'0.weight','3.conv.weight','7.weight'}<=names

RNNS = dict(lstm=nn.LSTM, gru=nn.GRU)

@pytest.mark.parametrize('how', RNNS)
def test_recurrent(how, tmp_path):
    "Samples along the first axis, or along another one if that is said"
    rnn = RNNS[how](4, 5, bidirectional=True)
    with pytest.raises(ValueError, match='batch_axis'): export_onnx(rnn, torch.randn(6, 2, 4), tmp_path/'m.onnx')
    file = export_onnx(rnn, torch.randn(6, 2, 4), tmp_path/'m.onnx', batch_axis=1)
    assert list(file.inputs.values())==[(6,'batch',4)]
    x = torch.randn(6, 7, 4)
    torch.testing.assert_close(ONNXModel(file)(x)[0], outputs(rnn, x)[0], rtol=1e-4, atol=1e-5)

def test_fused_attention(tmp_path):
    "Layers of torch that would run as one operation, with a mask"
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    inputs = dict(src=torch.randn(2, 5, 16), src_key_padding_mask=torch.tensor([[False]*5,[False]*3+[True]*2]))
    assert export_onnx(model, inputs, tmp_path/'m.onnx').difference<1e-5

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 16
    def __getitem__(self, i): return X[i%3]+i/16,i%4

@pytest.mark.parametrize('mode,data', [('static',[X]), ('static',torch.utils.data.DataLoader(Rows(), 5)), ('dynamic',None)], ids=['batches','loader','dynamic'])
def test_int8(mode, data, tmp_path):
    "A smaller file whose batch is open, near to the network"
    model = BN_Folder().fold(nn.Sequential(*net(), nn.ReLU(), nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 512)))
    file = export_onnx(model, X, tmp_path/'m.onnx', quantize=True, quantize_mode=mode, calibration_data=data)
    assert file.n_bytes<.4*os.path.getsize(export_onnx(model, X, tmp_path/'f.onnx')) and file.inputs['input'][0]=='batch' and 1e-5<file.difference<.1
    assert ONNXModel(file)(torch.randn(7, 3, 8, 8)).shape==(7,512) and sorted(os.listdir(tmp_path))==['f.onnx','m.onnx']

def test_int8_refused(tmp_path):
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="use 'static', which also quantizes convolutions"): export_onnx(conv, X, tmp_path/'m.onnx', quantize=True)
    for data,said in (([],'has no batches'),([()],'has 0 tensors')):
        with pytest.raises(ValueError, match=said): export_onnx(conv, X, tmp_path/'m.onnx', quantize=True, quantize_mode='static', calibration_data=data)
    assert not os.listdir(tmp_path)

def test_to_exported():
    "A program that is called as the network is, by place and by name"
    model = net()
    for sample in (X,dict(input=X)):
        run = to_exported(model, sample).module()
        x = torch.randn(6, 3, 8, 8)
        torch.testing.assert_close(run(input=x) if isinstance(sample, dict) else run(x), outputs(model, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='torch.export cannot make a graph of this Several: .*Found'): to_exported(Several(), (torch.zeros(2, 6).long(),torch.zeros(2, 8)))

def faster(by):
    "In the place of `latency`: the second model is `by` times faster"
    return lambda *models, **kwargs: np.array([[1.]*15,[1/by]*15])

def test_optimize_for_cpu(monkeypatch):
    "What is faster is returned, and else the model itself, with a warning that says by how much"
    model = net().eval()
    monkeypatch.setattr(cpu, 'latency', faster(2))
    for backend in ('script','channels_last'):
        with warnings_are('error'): fast = optimize_for_cpu(model, X, backend)
        assert fast is not model and model[0].weight.is_contiguous()
        with torch.no_grad(): torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(cpu, 'latency', faster(.9))
    with pytest.warns(UserWarning, match='is not faster here: ×0.90'): assert optimize_for_cpu(model, X, 'script') is model
    with pytest.warns(FutureWarning, match='old spelling'), warnings_are('always'): assert accelerate_model_for_cpu(model, X) is model
    with pytest.raises(ValueError, match='is not one of compile, script, channels_last'): optimize_for_cpu(model, X, 'fast')
    with pytest.raises(ValueError, match="compile_mode is for backend='compile'"): optimize_for_cpu(model, X, 'script', 'max-autotune')
    with pytest.raises(ValueError, match="compile_mode 'max-autotun' is not known: did you mean 'max-autotune"): optimize_for_cpu(model, X, compile_mode='max-autotun')

def test_optimize_for_cpu_is_right(monkeypatch):
    "What gives something else with another number of samples is not returned, however fast"
    monkeypatch.setattr(cpu, 'latency', faster(9))
    model = Net(lambda m, x: m.layer(x)/len(x), layer=nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="does not accept this Net .*with 1 samples"): assert optimize_for_cpu(model, torch.ones(2, 3), 'script') is model

def test_weights_beside_the_file(tmp_path, monkeypatch):
    "A network of more than 2 GB has its weights in a second file: both are there at the end, and are found"
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, 'save', lambda program, path: save(program, path, external_data=True))
    model = net()
    file = export_onnx(model, X, tmp_path/'m.onnx')
    assert sorted(os.listdir(tmp_path))==['m.onnx','m.onnx.data'] and file.n_bytes==sum(os.path.getsize(tmp_path/o) for o in os.listdir(tmp_path))
    assert verify_onnx(model, file, X).layers>5

def test_batches_by_name(tmp_path):
    "Batches of calibration have the names of the network's arguments, whatever the file calls them, and labels beside"
    torch.manual_seed(0)
    model,batch = Several(),dict(shift=torch.randn(4, 8), ids=torch.randint(0, 50, (4,6)), labels=torch.zeros(4))
    sample = {k:batch[k] for k in ('ids','shift')}
    file = export_onnx(model, sample, tmp_path/'m.onnx', quantize=True, quantize_mode='static', calibration_data=[batch,batch], input_names=['shift','ids'])
    assert file.inputs=={'shift':('batch',6), 'ids':('batch',8)} and file.difference<.2

def test_others_are_heard():
    "What an exporter prints of its error is left out, and what another thread writes meanwhile is not"
    import sys, threading
    from contextlib import redirect_stderr
    from io import StringIO
    from fasterai.export.program import _WithoutMine
    heard = StringIO()
    with redirect_stderr(heard), redirect_stderr(_WithoutMine(heard)):
        print('mine', file=sys.stderr)
        other = threading.Thread(target=lambda: print('theirs', file=sys.stderr, flush=True))
        other.start(), other.join()
    assert heard.getvalue()=='theirs\n'

class Ends(nn.Module):
    "Outputs that a function makes of two layers"
    def __init__(self, made):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.b,self.made = nn.Linear(16, 64),nn.Linear(64, 64),made
    def forward(self, x): return self.made(self, x)

ENDS = dict(
    relu=lambda s, x: s.a(x).relu(), clip=lambda s, x: s.a(x).clamp(-.6, .6), relu_softmax=lambda s, x: s.a(x).relu().softmax(-1), relu_shaped=lambda s, x: s.a(x).relu().unflatten(-1, (8,8)),
    relu_inside=lambda s, x: (h := s.a(x).relu(),s.b(h)), scores_inside=lambda s, x: (h := s.a(x),h.relu()), softmax=lambda s, x: s.b(s.a(x).relu()).softmax(-1),
    classes=lambda s, x: s.a(x).argmax(-1), rows=lambda s, x: s.a(x[:,None].expand(-1, 3, -1)), given=lambda s, x: (x,s.a(x)), weight=lambda s, x: (s.a(x),s.a.weight),
    names=lambda s, x: dict(y=(h := s.a(x)), y_inside_=s.b(h)))

@pytest.mark.parametrize('made', ENDS.values(), ids=ENDS)
def test_int8_ends(made, tmp_path):
    "Whatever comes after the last layer is there in static int8, and scores have as many levels as floats"
    torch.manual_seed(0)
    model,x = Ends(made).eval(),torch.randn(64, 16)
    found = ONNXModel(export_onnx(model, x, tmp_path/'m.onnx', quantize=True, quantize_mode='static', calibration_data=[x]))(x)
    each = lambda o: list(o.values()) if isinstance(o, dict) else list(o) if isinstance(o, (tuple,list)) else [o]
    for a,b in zip(each(model(x)), each(found), strict=True):
        assert a.dtype==b.dtype and (a.float()-b.float()).abs().max()<.05*a.float().abs().max() or not a.is_floating_point() and (a==b).float().mean()>.9
    if made in (ENDS['softmax'],ENDS['rows']): assert len(b.unique())>.5*b[:,-1].numel()
    if made is ENDS['given']: assert torch.equal(each(found)[0], x)

def test_int8_names(tmp_path):
    with pytest.raises(ValueError, match="'x' is the name of both an input and an output"): export_onnx(nn.Linear(2, 2), torch.randn(3, 2), tmp_path/'m.onnx', input_names='x', output_names='x')

def test_constants_that_are_no_numbers(tmp_path):
    "What exporters compute of them, as of T5's distances, is no warning to a user"
    class Distances(nn.Module):
        def forward(self, x): return x+torch.where(torch.arange(4)<2, 0, torch.log(torch.arange(4).float()).long())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        export_onnx(Distances(), torch.randn(2,4), tmp_path/'a.onnx')
    assert not [o for o in said if issubclass(o.category, RuntimeWarning)]

def test_numbers_that_onnx_runtime_has_not(tmp_path):
    "Its own words are not those of the error"
    for m in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),nn.Sequential(nn.Flatten(), nn.Linear(192, 2))):
        with pytest.raises(ValueError, match=r'^ONNX Runtime cannot run this Sequential, which has numbers of type torch.bfloat16: export `model.float\(\)`$'):
            export_onnx(m.bfloat16(), X.bfloat16(), tmp_path/'m.onnx')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('data, said', [([X*torch.nan], 'int8'), ([X,X*torch.inf], 'int8 has no range for .* finite'), ([X[:,:,:4]], 'ONNX Runtime cannot quantize this Sequential to int8'), ([X[0]], 'ONNX Runtime cannot quantize this Sequential to int8')],
    ids=['nan','inf','sizes','axes'])
def test_data_that_give_no_ranges(tmp_path, data, said):
    "Whatever stops ONNX Runtime's quantizer, or goes through it, is an error of ours, and no file is written"
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises(ValueError, match=said): export_onnx(m, X, tmp_path/'m.onnx', quantize=True, quantize_mode='static', calibration_data=data)
    assert not list(tmp_path.iterdir())

class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 2)
    def forward(self, a, b): return dict(out=self.l(a)+b)

@pytest.mark.parametrize('inputs', [[torch.ones(3,4),torch.ones(3,2)],UserDict(a=torch.ones(3,4), b=torch.ones(3,2))], ids=['list','mapping'])
def test_script_takes_what_others_take(inputs):
    "A list of arguments, and any mapping, as `BatchEncoding` of transformers"
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'backend.*does not accept')
        warnings.filterwarnings('ignore', 'backend.*is not faster')
        optimize_for_cpu(ByName(), inputs, 'script')
    assert n_macs(ByName(), inputs)>0

def test_a_difference_leaves_no_trace(tmp_path):
    "Whatever mode the network is in: what is found out for the message trains nothing, and dropout draws nothing then"
    def make(c): return nn.Sequential(nn.Conv2d(3, c, 3), nn.BatchNorm2d(c), nn.Dropout(.5), nn.Flatten(), nn.Linear(36*c, 2))
    file,other = export_onnx(make(2), X, tmp_path/'m.onnx'),make(3).train()
    state,drawn = deepcopy(other.state_dict()),torch.get_rng_state()
    with pytest.raises(ValueError, match='output differs') as e: verify_onnx(other, file, X)
    assert 'random' not in str(e.value) and torch.equal(torch.get_rng_state(), drawn) and other.training
    assert all(torch.equal(v, state[k]) for k,v in other.state_dict().items())
