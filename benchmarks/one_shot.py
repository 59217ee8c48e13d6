"""Zeroing half of the 138 million weights of vgg16_bn at once, beside torch.nn.utils.prune: time and extra memory.

Each runs in a process of its own, in turn, and tells its time and how far its peak of resident memory rises.

    python benchmarks/one_shot.py [repeats]      default: 3
"""
import json, subprocess, sys, threading, time

def ours(model):
    from torch import nn
    from fasterai.sparse.sparsifier import Sparsifier
    return lambda: Sparsifier(model, 'weight', 'global', 'large_final', layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(50)

def torchs(model):
    from torch import nn
    from torch.nn.utils import prune
    ps = [(m,'weight') for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return lambda: prune.global_unstructured(ps, prune.L1Unstructured, amount=.5)

def resident(): return int(open('/proc/self/statm').read().split()[1])*4096

def measure(which):
    import torch
    from torchvision.models import vgg16_bn
    torch.manual_seed(0)
    model = vgg16_bn()
    f,peak,stop = globals()[which](model),[0],threading.Event()
    base = resident()
    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(.001)
    t = threading.Thread(target=watch)
    t.start()
    start = time.perf_counter()
    f()
    took = time.perf_counter()-start
    stop.set()
    t.join()
    zeros = sum(int((m.weight==0).sum()) for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    print(json.dumps(dict(seconds=took, mib=(max(peak[0], resident())-base)/2**20, zeros=zeros)))

if __name__=='__main__':
    if sys.argv[1:2]==['--one']: measure(sys.argv[2])
    else:
        for _ in range(int(sys.argv[1]) if sys.argv[1:] else 3):
            a,b = (json.loads(subprocess.run([sys.executable, __file__, '--one', o], capture_output=True, text=True, check=True).stdout.splitlines()[-1]) for o in ('ours','torchs'))
            print(f'fasterai {a["seconds"]:.2f} s, {a["mib"]:.0f} MiB, {a["zeros"]:,} zeros; torch.nn.utils.prune {b["seconds"]:.2f} s, {b["mib"]:.0f} MiB, {b["zeros"]:,} zeros; ×{b["seconds"]/a["seconds"]:.1f} faster', flush=True)
