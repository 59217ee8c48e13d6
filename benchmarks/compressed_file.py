"""The compressed file beside general compressors of the same state: size and time. `python benchmarks/compressed_file.py [MODEL] [SPARSITY] [BITS]`

The weights of MODEL (by default torchvision's vgg16_bn: 138 million, in no order that a training would give them) are zeroed by magnitude and shared, `2**BITS` values a layer. Ratios
are to the float32 safetensors file, times are of the processor (all run in one thread). zlib and lzma take minutes for the whole of a large model: they get a part from its middle, and their size and time
are scaled up."""
import lzma, os, sys, tempfile, time, zlib
import torch, torchvision
from safetensors.torch import save
from torch import nn
from fasterai.quantize.compressed_file import compression_report, load_compressed, save_compressed
from fasterai.sparse.sparsifier import Sparsifier

@torch.no_grad()
def shared(model, bits):
    "Each weight of a layer becomes the nearest of `2**bits` evenly spaced values; zeros stay"
    for p in model.parameters():
        if p.dim()>1:
            step = p.abs().max()/2**(bits-1)
            p.copy_(torch.where(p==0, 0., ((p/step).floor()+.5).clamp(-2**(bits-1)+.5, 2**(bits-1)-.5)*step))
    return model

def timed(f, *args):
    start = time.process_time()
    res = f(*args)
    return res,time.process_time()-start

def main(name='vgg16_bn', sparsity=90, bits=5, part=4<<20):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    Sparsifier(model, 'weight', 'local', layer_type=(nn.Conv2d,nn.Linear)).sparsify_model(float(sparsity))
    shared(model, int(bits))
    fresh = getattr(torchvision.models, name)().eval()
    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, 'm')
        write,read = timed(save_compressed, model, path)[1],timed(load_compressed, path, fresh)[1]
        assert all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), fresh.state_dict().values()))
        size = os.path.getsize(path)
        print(compression_report(path).loc['total'].to_string())
    plain = save({k:v.contiguous() for k,v in model.state_dict().items()})
    print(f'{name}, {sparsity} % zero, {bits} bits: safetensors {len(plain)/1e6:.1f} MB')
    print(f'{"compressed file":18} {size/1e6:8.2f} MB  ×{len(plain)/size:6.2f}  write {write:7.1f} s  read {read:6.1f} s')
    part = plain[len(plain)//3:][:int(part)]
    for label,pack,unpack in (('zlib -9', lambda b: zlib.compress(b, 9), zlib.decompress), ('lzma (xz -6)', lzma.compress, lzma.decompress)):
        packed,write = timed(pack, part)
        _,read = timed(unpack, packed)
        scale = len(plain)/len(part)
        print(f'{label:18} {len(packed)*scale/1e6:8.2f} MB  ×{len(part)/len(packed):6.2f}  write {write*scale:7.1f} s  read {read*scale:6.1f} s  (of {len(part)/1e6:.0f} MB)')

if __name__=='__main__': main(*sys.argv[1:])
