"""Are zeros faster on a CPU? Linear layers of a text encoder and 1×1 convolutions in each way that may leave out zeros, in turn with dense ones, one thread. Ratios: how many times faster than PyTorch's dense layer

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/sparse_cpu.py [--networks] [--quick]      one core: ExecuTorch takes all that it sees

A way that is not installed is said in one line. Outputs of all ways are compared with the dense layer of the same zeros: floats up to 1e-4 of the largest, int8 up to 1 % of the variance.
`--networks`: whole networks with zeros in place of layers, beside other programs, channels removed, and int8."""
import importlib.util, math, sys, tempfile, warnings
from copy import deepcopy
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
from fasterai.analyze.counts import latency, speedup
from fasterai.core.granularity import block
from fasterai.export.all import sparse_for_cpu
from fasterai.export.runtimes import in_runtimes
from fasterai.export.sparse_cpu import SparseConv2d, SparseLinear
from fasterai.misc.all import BN_Folder
from fasterai.prune.all import Pruner
from fasterai.quantize.int8 import Int8Conv2d, Int8Linear, Quantizer
from fasterai.sparse.all import Sparsifier

warnings.filterwarnings('ignore')
SHARES = 50,80,90,95,98 # percent of zeros
LINEAR = (768,768),(768,3072),(3072,768) # inputs, outputs
TOKENS = 1,16,128
POINT = (96,576,28),(256,1024,14) # channels in, out, pixels of a side
REPEATS = 7
ALLOWED,ALLOWED_INT8 = 1e-4,1e-2 # of the largest output; of the variance, squared

class Way(nn.Module):
    "A function in the place of a layer"
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, x): return self.f(x)

def is_conv(layer): return isinstance(layer, nn.Conv2d)

def by_columns(layer, times):
    "The layer, computed by `times`, which takes and gives [channels, samples]"
    bias = layer.bias.detach()[:,None]
    def linear(x): return (times(x.t().contiguous())+bias).t().contiguous()
    def point(x): return (times(x.flatten(2)[0])+bias).view(1, -1, *x.shape[2:])
    return Way(point if is_conv(layer) else linear)

def by_rows(layer, rows):
    "The layer, computed by `rows`, which takes and gives [samples, channels]"
    def point(x): return rows(x.flatten(2)[0].t().contiguous()).t().contiguous().view(1, -1, *x.shape[2:])
    return Way(point if is_conv(layer) else rows)

def matrix(layer): return layer.weight.detach().flatten(1)

# Ways without zeros

def packed(layer, x):
    "With weights in the order that oneDNN likes, as `torch.compile` has them when it freezes a network"
    ops,w,b = torch.ops.mkldnn,layer.weight.detach(),layer.bias.detach()
    if is_conv(layer):
        new = ops._reorder_convolution_weight(w, [0,0], [1,1], [1,1], 1, list(x.shape))
        return Way(lambda x: ops._convolution_pointwise(x, new, b, [0,0], [1,1], [1,1], 1, 'none', [], ''))
    new = ops._reorder_linear_weight(w, len(x))
    return Way(lambda x: ops._linear_pointwise(x, new, b, 'none', [], ''))

def int8(layer, x): return (Int8Conv2d if is_conv(layer) else Int8Linear)(layer, float(x.min()), float(x.max()))

def onnx_session(layer, x, sparse):
    import onnxruntime as ort
    from onnx import TensorProto, helper as h, numpy_helper as nh
    w = layer.weight.detach().numpy()
    where = w.ravel().nonzero()[0]
    values = h.make_sparse_tensor(nh.from_array(w.ravel()[where], 'w'), nh.from_array(where, 'where'), w.shape) if sparse else nh.from_array(w, 'w')
    node = h.make_node('Conv' if is_conv(layer) else 'Gemm', ['x','w','b'], ['y'], **({} if is_conv(layer) else dict(transB=1)))
    ends = [h.make_tensor_value_info('x', TensorProto.FLOAT, x.shape)],[h.make_tensor_value_info('y', TensorProto.FLOAT, None)]
    bias = nh.from_array(layer.bias.detach().numpy(), 'b')
    graph = h.make_graph([node], 'layer', *ends, [bias] if sparse else [values,bias], sparse_initializer=[values] if sparse else [])
    model = h.make_model(graph, opset_imports=[h.make_opsetid('', 17)], ir_version=8).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    run = ort.InferenceSession(model, options, providers=['CPUExecutionProvider']).run
    return Way(lambda x: torch.from_numpy(run(None, {'x':x.numpy()})[0])),len(model)

def onnx(layer, x): return onnx_session(layer, x, False)[0]
def onnx_sparse(layer, x): return onnx_session(layer, x, True)[0]

def openvino_program(layer, x, whole, rate):
    import openvino as ov
    from openvino import opset13 as op
    w = layer.weight.detach().numpy()
    inputs = op.parameter(list(x.shape), np.float32, name='x')
    weights,arriving = op.constant(w),inputs
    if whole:
        steps = np.abs(w).reshape(len(w), -1).max(1).reshape(-1, *[1]*(w.ndim-1))/127
        weights = op.multiply(op.convert(op.constant(np.round(w/steps).astype(np.int8)), 'f32'), op.constant(steps))
        most = float(x.abs().max())
        arriving = op.fake_quantize(inputs, *(op.constant(np.float32(o)) for o in (-most,most,-most,most)), levels=256)
    b = layer.bias.detach().numpy()
    if is_conv(layer): out = op.add(op.convolution(arriving, weights, [1,1], [0,0], [0,0], [1,1]), op.constant(b[None,:,None,None]))
    else: out = op.add(op.matmul(arriving, weights, False, True), op.constant(b[None]))
    how = dict(INFERENCE_NUM_THREADS=1, PERFORMANCE_HINT='LATENCY', INFERENCE_PRECISION_HINT='f32', CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=rate)
    run = ov.Core().compile_model(ov.Model([out], [inputs]), 'CPU', how)
    return Way(lambda x: torch.from_numpy(run([x.numpy()])[0]))

def openvino(layer, x): return openvino_program(layer, x, False, 1.)
def openvino_int8(layer, x): return openvino_program(layer, x, True, 1.)
def openvino_sparse(layer, x): return openvino_program(layer, x, True, .5)

def executorch(layer, x):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    with torch.enable_grad(): program = torch.export.export(deepcopy(layer).eval(), (x,))
    loaded = Runtime.get().load_program(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)
    method = loaded.load_method('forward')
    way = Way(lambda x: method.execute([x])[0].clone())
    way.kept = loaded
    return way

# Ways with zeros

def csr(layer, x): return (SparseConv2d if is_conv(layer) else SparseLinear)(layer)

def bsr(size):
    def way(layer, x):
        w = matrix(layer).to_sparse_bsr((size,size))
        w = torch.sparse_bsr_tensor(w.crow_indices().int(), w.col_indices().int(), w.values(), w.shape)
        return by_columns(layer, lambda x: w@x)
    return way

def scipy(kind, *size):
    def way(layer, x):
        import scipy.sparse
        w = matrix(layer).numpy()
        w = scipy.sparse.csr_array(w) if kind=='csr' else scipy.sparse.bsr_array(w, blocksize=size)
        return by_columns(layer, lambda x: torch.from_numpy(w@x.numpy()))
    return way

def fbgemm(layer, x):
    "PyTorch's sparse int8 layer: blocks of 1×4"
    w,engine = matrix(layer),torch.backends.quantized.engine
    with torch.no_grad(): out = layer(x)
    def levels(t, most):
        step = max(float(t.max().clamp(min=0)-t.min().clamp(max=0))/most, 1e-12)
        return step,int((-t.min().clamp(max=0)/step).round())
    into,onto = levels(x, 127),levels(out, 255) # 7 bits: with 8, its sums of 16 bits overflow
    steps = (w.abs().amax(1)/127).clamp(min=1e-12).double()
    try:
        torch.backends.quantized.engine = 'fbgemm'
        kept = torch.ops.sparse.qlinear_prepack(torch.quantize_per_channel(w, steps, torch.zeros(len(w), dtype=torch.long), 0, torch.qint8), layer.bias.detach(), 1, 4)
    finally: torch.backends.quantized.engine = engine
    return by_rows(layer, lambda x: torch.ops.sparse.qlinear(torch.quantize_per_tensor(x, *into, torch.quint8), kept, *onto).dequantize())

def pruned(layer, share):
    "The layer without `share` percent of its outputs: `Pruner` takes the channels between it and another one away"
    pair = nn.Sequential(deepcopy(layer), nn.ReLU(), nn.Conv2d(layer.out_channels, 8, 1) if is_conv(layer) else nn.Linear(layer.out_features, 8)).eval()
    inputs = torch.randn(1, layer.in_channels, 4, 4) if is_conv(layer) else torch.randn(1, layer.in_features)
    return Pruner(pair, share, example_inputs=inputs).prune_model()[0]

DENSE = { # names: the package they need, function of a layer and its input, is it int8
    'PyTorch, packed (oneDNN)':('torch',packed,False), 'ONNX Runtime':('onnxruntime',onnx,False), 'OpenVINO':('openvino',openvino,False), 'XNNPACK (ExecuTorch)':('executorch',executorch,False),
    'int8, `Quantizer`':('torch',int8,True), 'int8, OpenVINO':('openvino',openvino_int8,True)}
ZEROS = { # the same, and the granularity of zeros
    'PyTorch CSR, `sparse_for_cpu`':('torch',csr,False,'weight'), 'the same, blocks of 1×4':('torch',csr,False,block(1, 4)), 'the same, blocks of 4×1':('torch',csr,False,block(4, 1)),
    'PyTorch BSR, blocks of 4×4':('torch',bsr(4),False,block(4, 4)), 'PyTorch BSR, blocks of 16×16':('torch',bsr(16),False,block(16, 16)),
    'SciPy CSR':('scipy',scipy('csr'),False,'weight'), 'SciPy BSR, blocks of 1×4':('scipy',scipy('bsr', 1, 4),False,block(1, 4)), 'SciPy BSR, blocks of 4×1':('scipy',scipy('bsr', 4, 1),False,block(4, 1)),
    'ONNX Runtime, sparse initializer':('onnxruntime',onnx_sparse,False,'weight'), 'XNNPACK (ExecuTorch), zeros':('executorch',executorch,False,'weight'),
    'int8 with zeros, OpenVINO, sparse rate .5':('openvino',openvino_sparse,True,'weight'), 'int8 with zeros, PyTorch (FBGEMM), blocks of 1×4':('torch',fbgemm,True,block(1, 4))}

REMOVED = 'no zeros: that share of channels removed by `Pruner`'
BY_SHARE = 'PyTorch CSR, `sparse_for_cpu`','int8 with zeros, PyTorch (FBGEMM), blocks of 1×4',REMOVED

def installed(ways):
    "Those ways whose package is here; of the others one line"
    here = {k:o for k,o in ways.items() if importlib.util.find_spec(o[0])}
    for k,o in ways.items():
        if k not in here: print(f'not installed: {o[0]} ({k})')
    return here

def zeroed(layer, granularity, share):
    layer = deepcopy(layer)
    Sparsifier(layer, granularity, 'local', layer_type=type(layer)).sparsify_model(share)
    return layer

def checked(name, way, layer, x, is_int8):
    with torch.no_grad(): out,now = layer(x),way(x)
    apart = float(((now-out).square().sum()/(out-out.mean()).square().sum()) if is_int8 else (now-out).abs().max()/out.abs().max())
    assert now.shape==out.shape and apart<=(ALLOWED_INT8 if is_int8 else ALLOWED), f'{name}: {apart}'
    return way

def measure(layer, x, shares, said):
    "How many times faster than the dense layer, by way and share of zeros (None: without), and its milliseconds"
    ways = {(k,None):checked(k, make(layer, x), layer, x, whole) for k,(_,make,whole) in installed_dense.items()}
    for share in shares:
        same = {}
        for k,(_,make,whole,granularity) in installed_zeros.items():
            if str(granularity) not in same: same[str(granularity)] = zeroed(layer, granularity, share)
            zeros = same[str(granularity)]
            try: ways[k,share] = checked(k, make(zeros, x), zeros, x, whole)
            except (RuntimeError,NotImplementedError) as e: said.add(f'{k}: {str(e).partition(chr(10))[0]}')
        ways[REMOVED,share] = pruned(layer, share)
    found,dense = {},[]
    for share in (None,*shares):  # few at a time, so that all are near the dense layer in time
        some = [k for k in ways if k[1]==share]
        ms = latency(layer, *(ways[k] for k in some), example_inputs=x, repeats=REPEATS, threads=1, progress=False)
        found.update({k:speedup(ms[0], o).median for k,o in zip(some, ms[1:])})
        dense.append(np.median(ms[0]))
    return found,float(np.median(dense))

def table(columns, found, keys):
    "A row for each of `keys`: way and share"
    lines = ['| times faster than PyTorch dense | zeros | '+' | '.join(columns)+' |', '|---|---|'+'---|'*len(columns)]
    for k,share in keys:
        if any((k,share) in o for o in found):
            lines.append(f'| {k} | {"" if share is None else f"{share} %"} | '+' | '.join(f'{o[k,share]:.2f}' if (k,share) in o else '' for o in found)+' |')
    return '\n'.join(lines)

def layers(quick):
    for i,o in LINEAR[:1] if quick else LINEAR:
        for n in TOKENS: yield f'{i}→{o}, {n}',nn.Linear(i, o),torch.randn(n, i)
    for i,o,n in POINT[:1] if quick else POINT: yield f'1×1 {i}→{o}, {n}²',nn.Conv2d(i, o, 1),torch.randn(1, i, n, n)

# Whole networks

def text_encoder():
    from transformers import BertConfig, BertModel
    return BertModel(BertConfig(vocab_size=1000, hidden_size=768, num_hidden_layers=4, num_attention_heads=12, intermediate_size=3072), add_pooling_layer=False).eval()

class Hidden(nn.Module):
    "A text encoder from tokens to vectors"
    def __init__(self):
        super().__init__()
        self.encoder = text_encoder()
    def forward(self, tokens): return self.encoder(input_ids=tokens).last_hidden_state

def network(name):
    "A network with random weights and folded norms, and its input"
    if name.startswith('encoder'): return Hidden().eval(),torch.randint(1000, (1,int(name.split()[1])))
    import torchvision
    x = torch.randn(1, 3, 224, 224)
    return BN_Folder().fold(torchvision.models.get_model(name, weights=None).eval(), x),x

NETWORKS = 'encoder 1','encoder 16','encoder 128','mobilenet_v2','resnet18'

def with_fbgemm(model, x, share):
    "All linear layers as `fbgemm` has them, with ranges of what arrives with `x`"
    model,arrived = deepcopy(model),{}
    Sparsifier(model, block(1, 4), 'local', layer_type=nn.Linear).sparsify_model(share)
    layers = {m:n for n,m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [m.register_forward_pre_hook(lambda m, args: arrived.update({m:args[0]})) for m in layers]
    with torch.no_grad(): model(x)
    for o in hooks: o.remove()
    def rows(way): return lambda x: way(x.flatten(0, -2)).view(*x.shape[:-1], -1)
    for m,n in layers.items(): model.set_submodule(n, Way(rows(fbgemm(m, arrived[m].flatten(0, -2)))))
    return model

def n_weights(model): return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear,nn.Conv2d)))

def of_network(name, share):
    "Line of a table: how many times faster than the dense network in PyTorch"
    dense,x = network(name)
    zeros = deepcopy(dense)
    for kind in (nn.Linear,nn.Conv2d):
        if any(isinstance(m, kind) for m in zeros.modules()): Sparsifier(zeros, 'weight', 'local', layer_type=kind).sparsify_model(share)
    sparse,rows = sparse_for_cpu(zeros, x, report=True)
    ways = {'`sparse_for_cpu`':sparse}
    if name.startswith('encoder'): ways['int8 with zeros, PyTorch (FBGEMM), blocks of 1×4'] = with_fbgemm(dense, x, share)
    with tempfile.TemporaryDirectory() as folder:
        found,missing = in_runtimes(dense, x, [o for o,package in (('onnx','onnxruntime'),('openvino','openvino')) if importlib.util.find_spec(package)], folder, threads=1)
        for k,why in missing.items(): print(f'{name}, {k}: {why}')
        ways.update(found)
        ways['int8 in all layers, `Quantizer`'] = Quantizer(measure=False).quantize(dense, [x])
        for cut in (share,100*(1-math.sqrt(1-share/100))):  # if rows and columns of all weights go, the second leaves as many weights as are not zero
            smaller = Pruner(deepcopy(dense), cut, example_inputs=x).prune_model()
            ways[f'{cut:.0f} % of channels removed, {100*n_weights(smaller)/n_weights(dense):.0f} % of weights left'] = smaller
        ms = latency(dense, *ways.values(), example_inputs=x, repeats=REPEATS, threads=1, progress=False)
    n_sparse = int(rows.is_sparse[:-1].sum())
    said = [f'{k} ×{speedup(ms[0], o).median:.2f}' for k,o in zip(ways, ms[1:])]
    return f'| {name}, {share} % | {np.median(ms[0]):.1f} ms | {n_sparse} of {len(rows)-1} layers | '+' | '.join(said)+' |'

if __name__=='__main__':
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quick = '--quick' in sys.argv
    shares = SHARES[2:3] if quick else SHARES
    if '--networks' in sys.argv:
        for name in NETWORKS[1:2] if quick else NETWORKS: print(of_network(name, 90), flush=True)
        sys.exit()
    installed_dense,installed_zeros = installed(DENSE),installed(ZEROS)
    columns,found,said = [],[],set()
    for name,layer,x in layers(quick):
        ratios,ms = measure(layer.eval(), x, shares, said)
        columns.append(f'{name} ({ms:.2f} ms)')
        found.append(ratios)
    for o in sorted(said): print(o)
    print(table(columns, found, [*((k,None) for k in DENSE), *((k,90) for k in (*ZEROS,REMOVED))]))
    print()
    print(table(columns, found, [(k,share) for k in BY_SHARE for share in shares]))
