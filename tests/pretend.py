"""A device without hardware: `pytest --device pretend` finds what a GPU would find of tensors that are in the wrong place.

Its memory is the CPU's, but nobody can tell: `.numpy()`, a tensor of the CPU among its own, a generator of the CPU are errors there as on a GPU,
and recurrent layers run as cuDNN has them. It is compiled once (`pretend.cpp`). Digits are the CPU's, and so is the speed; sparse and quantized tensors,
autocast, collectives, code of compilers and kernels of our own are out of its reach."""
import re
from pathlib import Path
from types import ModuleType
import torch, torchgen
from torch import nn
from torch.utils import cpp_extension

def lenient():
    "Operations that check no devices themselves on a GPU, as PyTorch's table of them says"
    table = (Path(torchgen.__file__).parent/'packaged/ATen/native/native_functions.yaml').read_text()
    return ['aten::'+o[:o.index('(')] for o in re.split(r'^- func: ', table, flags=re.M)[1:] if re.search(r'^  device_check: NoCheck', o, re.M)]

def module():
    "What PyTorch asks of a device, `torch.pretend`"
    m,ops = ModuleType('torch.pretend'),torch.ops.pretend
    class On:
        "Everything is on the only one"
        def __init__(self, *args): pass
        def __enter__(self): return self
        def __exit__(self, *args): pass
    yes,no,zero,nothing = (lambda *a: True),(lambda *a: False),(lambda *a: 0),(lambda *a, **kw: None)
    m.__dict__.update(device=On, device_of=On, is_available=yes, is_initialized=yes, _is_in_bad_fork=no, device_count=lambda: 1, current_device=zero,
        _lazy_init=nothing, set_device=nothing, synchronize=nothing, empty_cache=nothing, _exchange_device=zero, _maybe_exchange_device=zero,
        manual_seed=ops.seed, manual_seed_all=ops.seed, get_rng_state=lambda *a: ops.state(), set_rng_state=lambda s,*a: ops.set_state(s),
        get_amp_supported_dtype=lambda: [torch.float16,torch.bfloat16])
    return m

def flatten_parameters(self, real=nn.RNNBase.flatten_parameters):
    "Recurrent layers on the device put their weights in one chunk when layers on a GPU do"
    ws = self._flat_weights
    if len(ws)!=len(self._flat_weights_names) or not all(isinstance(w, torch.Tensor) for w in ws): return
    if ws[0].device.type!='pretend': return real(self)
    if any(w.dtype!=ws[0].dtype or w.device!=ws[0].device for w in ws) or len({w.data_ptr() for w in ws})!=len(ws): return
    mode = {'RNN_RELU':0,'RNN_TANH':1,'LSTM':2,'GRU':3}[self.mode]
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(ws, 2+2*self.bias+(self.proj_size>0), self.input_size, mode, self.hidden_size, self.proj_size, self.num_layers, self.batch_first, bool(self.bidirectional))

def compiled(*args, real=torch.compile, **kwargs):
    "No compiler makes code for the device: what is compiled is traced, and runs as it is"
    return real(*args, **{'backend':'eager', **kwargs})

def load(verbose=False):
    "Compile the device and make it known"
    cpp_extension.load('pretend', str(Path(__file__).with_suffix('.cpp')), extra_cflags=['-O1'], is_python_module=False, verbose=verbose)
    torch.utils.rename_privateuse1_backend('pretend')
    torch._register_device_module('pretend', module())
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[torch.quint8,torch.quint4x2,torch.quint2x4,torch.qint8,torch.qint32])
    torch.ops.pretend.lenient(lenient())
    nn.RNNBase.flatten_parameters,torch.compile = flatten_parameters,compiled
