"""Prune, fold and compress the classification models of torchvision and compare outputs and bits: `python tools/zoo.py [NAME...]` (default: all that fit), or `make zoo NAMES="resnet18 vit_b_32"`

Random weights and random statistics of the normalizations; 40 % of the filters are zeroed, tied ones together, and removed without loss; then 30 % are removed by ratio; and the
norms of the original are folded. The compressed file is written and read three times: weights as they are, nine of ten zero, and those sharing 16 values in bfloat16. A process for each model, so that one that fails or does not fit in memory does not end the run."""
import argparse,json,subprocess,sys,time
from concurrent.futures import ThreadPoolExecutor

MEMORY = 1300  # MB of float32 parameters at most

def make(name):
    import torchvision
    return torchvision.models.get_model(name, weights=None, **(dict(aux_logits=False) if name in ('googlenet','inception_v3') else {})).eval()

def randomize(model, seed=0):
    "Random statistics, scales and shifts for normalizations"
    import torch
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n,b in model.named_buffers():
            if n.endswith('running_mean'): b.copy_(torch.randn(b.shape, generator=gen)*.1)
            if n.endswith('running_var'): b.copy_(torch.rand(b.shape, generator=gen)+.5)
        for p in model.parameters():
            if p.numel() and (p==p.flatten()[0]).all(): p.copy_(torch.randn(p.shape, generator=gen)*.1)  # a head or a layer scale that starts as (nearly) nothing
        for m in model.modules():
            if 'Norm' in type(m).__name__ and getattr(m, 'weight', None) is not None:
                m.weight.copy_(torch.rand(m.weight.shape, generator=gen)+.5)
                if getattr(m, 'bias', None) is not None: m.bias.copy_(torch.randn(m.bias.shape, generator=gen)*.1)

def takes(model, x):
    "Does `model` run on images of another size as well?"
    from fasterai.core.running import call_with,untouched
    try:
        with untouched(model): call_with(model, x)
    except (RuntimeError,AssertionError,ValueError): return False
    return True

def folded(model, inputs, larger):
    "The columns of a table that are about folding; `larger` inputs are tried as well, if any"
    from fasterai.core.proof import difference,random_like
    from fasterai.misc.bn_folding import BN_Folder
    folder,start = BN_Folder(),time.time()
    new = folder.fold(model, inputs)
    row = dict(fold_seconds=time.time()-start, folded=len(folder.into), norms=len(folder.into)+len(folder.left))
    return {**row, 'fold_difference':max(difference(model, new, o)[0] for o in (random_like(inputs, 3),*larger))}

def one(name):
    "What pruning and folding do to model `name`: a row of the table"
    import torch
    from torch import nn
    from fasterai.core.running import tensors_of,call_with,example_inputs_for,untouched
    from fasterai.core.proof import difference,random_like
    from fasterai.prune.pruner import Pruner
    from fasterai.sparse.sparsifier import Sparsifier
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row,size = dict(model=name),lambda m: sum(p.numel() for p in m.parameters())
    model = make(name)
    randomize(model)
    small = 4*size(model)<250e6
    if small: model = model.double()
    inputs = example_inputs_for(model)
    Sparsifier(model, 'filter', 'local', layer_type=(nn.Conv2d,nn.Conv3d,nn.Linear,nn.MultiheadAttention), coupled=True, example_inputs=inputs).sparsify_model(40)
    was = {k:v.clone() for k,v in model.state_dict().items()}
    start = time.time()
    slim = Pruner().prune_model(model, inputs)
    row |= dict(seconds=time.time()-start, before=size(model), after=size(slim))
    row['difference'],dtype = difference(model, slim, random_like(inputs, 3))
    larger = torch.randn(1, 3, inputs[0].shape[-2]+32, inputs[0].shape[-1]+64).to(inputs[0])
    larger = [larger] if takes(model, larger) else []
    row['difference'] = max([row['difference'], *(difference(model, slim, o)[0] for o in larger)])
    row['dtype'] = str(dtype).removeprefix('torch.')
    row['untouched'] = all(torch.equal(v, was[k]) for k,v in model.state_dict().items())
    del slim
    row |= folded(model, inputs, larger)
    row['untouched'] &= all(torch.equal(v, was[k]) for k,v in model.state_dict().items())
    del was,model
    model = make(name)
    start = time.time()
    inputs = tuple(o.float() for o in inputs)
    Pruner(model, 30, 'local', example_inputs=inputs).prune_model()
    with untouched(model): out = call_with(model, inputs)
    row |= dict(ratio_seconds=time.time()-start, ratio_after=size(model), outputs=all(o.shape[-1]==1000 for o in tensors_of(out)))
    row['ok'] = row['difference']<=(1e-4 if dtype==torch.float64 else 1e-3) and row['fold_difference']<=(1e-10 if dtype==torch.float64 else 1e-3) and row['untouched'] and row['outputs'] and row['after']<row['before'] and row['ratio_after']<row['before']
    return row

def filed(name):
    "Whether all bits of model `name` come back from its compressed file, how many times smaller that is, and the seconds of all writing and reading"
    import os,tempfile,torch
    from copy import deepcopy
    from torch import nn
    from fasterai.quantize.all import KMeansQuantizer,load_compressed,save_compressed
    from fasterai.sparse.sparsifier import Sparsifier
    torch.manual_seed(0)
    model = make(name)
    randomize(model)
    sparse = lambda m: Sparsifier(m, 'weight', 'local', layer_type=(nn.Conv2d,nn.Linear,nn.MultiheadAttention)).sparsify_model(90)
    row,bits = dict(bits=True, ratios=[], file_seconds=0.),lambda t: t.reshape(-1).view(torch.uint8)
    for change in (lambda m: None, sparse, lambda m: KMeansQuantizer(4).quantize(m).bfloat16()):
        change(model)
        state,blank = model.state_dict(),deepcopy(model)
        for v in blank.state_dict().values(): v.zero_()
        with tempfile.TemporaryDirectory() as d:
            start = time.time()
            save_compressed(model, f'{d}/m')
            load_compressed(f'{d}/m', blank)
            row['file_seconds'] += time.time()-start
            row['ratios'].append(sum(v.nbytes for v in state.values())/os.path.getsize(f'{d}/m'))
        row['bits'] &= all(torch.equal(bits(v), bits(state[k])) for k,v in blank.state_dict().items())
    return row

def run(name, seconds):
    "`one` and `filed` in a process of its own"
    try: p = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', name], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired: return dict(model=name, ok=False, error=f'more than {seconds} s')
    lines = p.stdout.strip().splitlines()
    if p.returncode or not lines: return dict(model=name, ok=False, error=(p.stderr.strip().splitlines() or [f'exit {p.returncode}'])[-1][:200])
    return json.loads(lines[-1])

def show(r):
    if 'error' in r: return f"{r['model']:24} FAIL {r['error']}"
    return (f"{r['model']:24} {r['before']:>11,} {r['after']:>11,} {r['difference']:>8.0e} {r['dtype']:8} {r['seconds']:>6.1f} s | {r['ratio_after']:>11,} {r['ratio_seconds']:>6.1f} s "
            f"| {r['folded']:>3} of {r['norms']:>3} {r['fold_difference']:>8.0e} {r['fold_seconds']:>6.1f} s {'outputs same' if r['outputs'] else 'OUTPUTS CHANGED'} "
            f"| {' '.join(f'×{o:.1f}' for o in r['ratios']):18} {r['file_seconds']:>6.1f} s {'bits same' if r['bits'] else 'BITS CHANGED'} {'ok' if r['ok'] else 'FAIL'}")

def names():
    "All that fit, as told by their weights' metadata"
    from torchvision import models
    params = lambda n: next(iter(models.get_model_weights(n))).meta['num_params']
    return [n for n in models.list_models(module=models) if params(n)*4<MEMORY*1e6]

if __name__=='__main__':
    a = argparse.ArgumentParser()
    a.add_argument('names', nargs='*'); a.add_argument('--one', action='store_true'); a.add_argument('--workers', type=int, default=2); a.add_argument('--timeout', type=int, default=1800)
    a = a.parse_args()
    if a.one:
        row,file = one(a.names[0]),filed(a.names[0])
        print(json.dumps({**row, **file, 'ok':row['ok'] and file['bits']}))
    else:
        print(f"{'model':24} {'before':>11} {'after':>11} {'differ':>8} {'':8} {'time':>6}   | {'30 % less':>11} {'time':>6}   | {'folded':>10} {'differ':>8} {'time':>6}   | {'file: dense, sparse, shared bfloat16':>36}")
        rows = []
        with ThreadPoolExecutor(a.workers) as ex:
            for r in ex.map(lambda n: run(n, a.timeout), a.names or names()): rows.append(r); print(show(r), flush=True)
        print(f"{sum(r['ok'] for r in rows)} of {len(rows)} ok")
        sys.exit(not all(r['ok'] for r in rows))
