"""A checkpoint that is made on the spot, sparsified without a model, beside `cp -r` of the same folder, in turn: speed, and memory beside the largest tensor.

16 shards of matrices as a Llama has them, in bfloat16 and in float32; 50 % of all weights together, and 2:4. The last sparse one is compressed, and comes back. Before each run, what the system keeps of the files is dropped where that is allowed (Linux, root), and some seconds
pass, so that a virtual machine has given its free memory back: whoever begins sooner would be faster. Twice the size has to be free on the disk.

    python benchmarks/checkpoint.py [gigabytes] [folder] [turns] [threads] [dtype]      default: 8, a temporary folder, 2, 2, both. Linux
"""
import json, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import torch

SHARDS,HIDDEN,INNER,PAUSE = 16,4096,11008,12
LAYERS = [('self_attn.q_proj',HIDDEN,HIDDEN),('self_attn.k_proj',HIDDEN,HIDDEN),('self_attn.v_proj',HIDDEN,HIDDEN),('self_attn.o_proj',HIDDEN,HIDDEN),
    ('mlp.gate_proj',INNER,HIDDEN),('mlp.up_proj',INNER,HIDDEN),('mlp.down_proj',HIDDEN,INNER)]
HOW = {'50 % global':('weight','global'), '2:4':('2:4','local'), '50 % local':('weight','local')}

def make(folder, size, dtype):
    "A folder of about `size` bytes"
    folder.mkdir()
    name,width = ('BF16',2) if dtype is torch.bfloat16 else ('F32',4)
    numbers = (torch.randn(2**25, generator=torch.Generator().manual_seed(0))*.02).to(dtype).view(torch.uint8).numpy()
    where,i = {},0
    for shard in range(SHARDS):
        head,end = {},0
        while True:
            layer,rows,cols = LAYERS[i%len(LAYERS)]
            n = rows*cols*width
            if head and end+n>size/SHARDS: break
            head[f'model.layers.{i//len(LAYERS)}.{layer}.weight'] = dict(dtype=name, shape=[rows,cols], data_offsets=[end,end+n])
            end,i = end+n,i+1
        file = f'model-{shard+1:05}-of-{SHARDS:05}.safetensors'
        text = json.dumps(dict(head, __metadata__=dict(format='pt'))).encode()
        text += b' '*(-len(text)%8)
        with open(folder/file, 'wb') as f:
            f.write(len(text).to_bytes(8, 'little')+text)
            while end: end -= f.write(numbers[:min(end, len(numbers))])
        where |= dict.fromkeys(head, file)
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=where)))

def settle():
    os.sync()
    try: Path('/proc/sys/vm/drop_caches').write_text('3')
    except OSError: pass
    time.sleep(PAUSE)

def one(source, target, granularity, context, threads):
    "In a process of its own: seconds, peak of memory and what of that was there before, zeros"
    from fasterai.quantize.checkpoint import compress_checkpoint, decompress_checkpoint
    from fasterai.sparse.checkpoint import sparsify_checkpoint
    import pandas
    def peak(): return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])*1024  # ru_maxrss begins with that of the process that called
    before,start = peak(),time.perf_counter()
    if granularity=='compress': compress_checkpoint(source, target, progress=False)
    elif granularity=='decompress': decompress_checkpoint(source, target, progress=False)
    else: table = sparsify_checkpoint(source, target, 50, granularity, context, threads=int(threads), progress=False)
    told = [float(100*table.zeros.sum()/table.weights.sum())] if context else []
    print(json.dumps([time.perf_counter()-start, peak(), before, *told]))

def timed(command):
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter()-start

def measured(source, target, *how):
    "Seconds, a text of memory, and what else is told"
    done = subprocess.run([sys.executable,__file__,'--one',source,target,*map(str, how)], check=True, capture_output=True, text=True)
    s,peak,before,*told = json.loads(done.stdout)
    return s,f'memory {(peak-before)/2**20:.0f} MiB above the {before/2**20:.0f} before it began; load {os.getloadavg()[0]:.1f}',*told

def compare(folder, dtype, turns, threads):
    source,target = folder/'source',folder/'target'
    size,largest = sum(o.stat().st_size for o in source.iterdir()),INNER*HIDDEN*dtype.itemsize
    for _ in range(turns):
        settle()
        copied = timed(['cp','-r',source,target])
        shutil.rmtree(target)
        print(f'{dtype}, {size/1e9:.1f} GB: cp {copied:.1f} s, {size/copied/1e6:.0f} MB/s; largest tensor {largest/2**20:.0f} MiB; load {os.getloadavg()[0]:.1f}', flush=True)
        for name,how in HOW.items():
            shutil.rmtree(target, ignore_errors=True)
            settle()
            s,told,zeros = measured(source, target, *how, threads)
            print(f'  {name}: {s:.1f} s, {size/s/1e6:.0f} MB/s, ×{copied/s:.2f} of the speed of cp; {zeros:.2f} % zeros; {told}', flush=True)
        for name,a,b in (('compress',target,folder/'small'),('decompress',folder/'small',folder/'back')):
            settle()
            s,told = measured(a, b, name, '', threads)
            packed = sum(o.stat().st_size for o in (folder/'small').iterdir())
            print(f'  {name}: {s:.1f} s, {size/s/1e6:.0f} MB/s; {size/packed:.2f} times smaller; {told}', flush=True)
        for o in ('target','small','back'): shutil.rmtree(folder/o)

if __name__=='__main__':
    if sys.argv[1:2]==['--one']: one(*sys.argv[2:])
    else:
        gigabytes,folder,turns,threads,*dtypes = [*sys.argv[1:], *[8,None,2,2][len(sys.argv)-1:]]
        folder = Path(tempfile.mkdtemp(dir=folder))
        try:
            for dtype in [getattr(torch, o) for o in dtypes or ('bfloat16','float32')]:
                make(folder/'source', float(gigabytes)*1e9, dtype)
                compare(folder, dtype, int(turns), int(threads))
                shutil.rmtree(folder/'source')
        finally: shutil.rmtree(folder)
