"""The compressed file beside other ways to store the same weights: bytes, and how fast they are written and read.

    python benchmarks/compressed_file.py [MODEL] [STATE ...]

MODEL is a network of torchvision (by default vgg16_bn: 138 million weights, in no order that a training would give them), or a trained one of trained.py: `reader`, `classifier`. STATE is one of
`dense` (float32), `shared` (Deep Compression's case: linear layers 92 % zero and shared in 5 bits, the others 70 % zero and 8 bits) and `bfloat16`; by default all.

MB/s are uncompressed bytes by wall-clock time, the median of three calls, by as many threads as PyTorch has. General compressors get the safetensors file, whose bytes are all there is to read or write: zstd the whole of it (Python
3.14, or the package `zstandard`), zlib and lzma, which take minutes, a part from its middle.
"""
import lzma, os, sys, tempfile, time, zlib
import torch, torchvision
from safetensors.torch import load, save
from fasterai.quantize.compressed_file import compression_report, load_compressed, save_compressed
from trained import classifier, reader
try: from compression import zstd
except ImportError: zstd = None
try: import zstandard
except ImportError: zstandard = None

PART = 4<<20  # bytes that the slow ones get

def made(name): return dict(reader=reader, classifier=classifier)[name]() if name in ('reader','classifier') else getattr(torchvision.models, name)(weights=None).eval()

@torch.no_grad()
def shared(model):
    "Of each layer, the smallest weights become zero, and the others the nearest of evenly spaced values"
    for p in model.parameters():
        if p.dim()<2: continue
        left,bits = (.08,5) if p.dim()==2 else (.3,8)
        n = int(p.numel()*(1-left))
        step = p.abs().max()/2**(bits-1)
        kept = p.abs()>p.abs().flatten().sort().values[n-1] if n else torch.ones_like(p, dtype=torch.bool)
        most = 2**(bits-1)-.5
        p.copy_(torch.where(kept, ((p/step).floor()+.5).clamp(-most, most)*step, 0))
    return model

STATES = dict(dense=lambda m: m, shared=shared, bfloat16=lambda m: m.bfloat16())

def timed(f, *args, repeats=3):
    "What `f` returns, and the median of its seconds"
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        res = f(*args)
        seconds.append(time.perf_counter()-start)
    return res,sorted(seconds)[repeats//2]

def tell(label, size, plain, write, read, note=''):
    "A row: `size` bytes, of `plain` before; seconds"
    print(f'  {label:16} {size/1e6:8.2f} MB  ×{plain/size:6.2f}  write {plain/1e6/write:6.0f} MB/s  read {plain/1e6/read:6.0f} MB/s  {note}', flush=True)

def compressors(plain):
    "Name, functions, and the bytes that they get"
    if zstd: yield 'zstd -3', zstd.compress, zstd.decompress, plain
    elif zstandard: yield 'zstd -3', zstandard.ZstdCompressor(3).compress, zstandard.ZstdDecompressor().decompress, plain
    part = plain[len(plain)//3:][:PART]
    yield 'zlib -6', zlib.compress, zlib.decompress, part
    yield 'lzma -6', lzma.compress, lzma.decompress, part

def run(name, state):
    torch.manual_seed(0)
    model,fresh = STATES[state](made(name)),made(name)
    if state=='bfloat16': fresh.bfloat16()
    tensors = {k:v.contiguous() for k,v in model.state_dict().items()}
    n = sum(v.nbytes for v in tensors.values())
    print(f'{name}, {state}: {n/1e6:.1f} MB', flush=True)
    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, 'm')
        write,read = timed(save_compressed, model, path)[1],timed(load_compressed, path, fresh)[1]
        assert all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), fresh.state_dict().values()))
        total = compression_report(path).loc['total']
        tell('compressed file', total['bytes'], n, write, read, f'positions {total.positions/1e6:.2f}, code books {total.code_book/1e6:.2f}, values {total["values"]/1e6:.2f} MB')
        plain,write = timed(save, tensors)
        tell('safetensors', len(plain), n, write, timed(load, plain)[1], 'in memory')
    for label,pack,unpack,data in compressors(plain):
        packed,write = timed(pack, data, repeats=1)
        _,read = timed(unpack, packed)
        tell(label, len(packed)*len(plain)/len(data), n, write*n/len(data), read*n/len(data), '' if len(data)==len(plain) else f'of {len(data)/1e6:.1f} MB')

def main(name='vgg16_bn', *states):
    print(f'{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}')
    for o in states or STATES: run(name, o)

if __name__=='__main__': main(*sys.argv[1:])
