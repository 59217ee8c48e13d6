"Zeroing half of the 138 million weights of vgg16_bn at once, all layers together: time, and how far the peak of resident memory rises"
import threading, time
import torch
from torch import nn
from torchvision.models import vgg16_bn
from rows import Wrong, attempt, main, tell

LAYERS = nn.Conv2d,nn.Linear

def ours(model):
    from fasterai.sparse.all import Sparsifier
    return lambda: Sparsifier(model, 'weight', 'global', layer_type=LAYERS).sparsify_model(50)

def before(model):
    from fasterai.sparse.all import Sparsifier, large_final
    return lambda: Sparsifier(model, 'weight', 'global', large_final, layer_type=LAYERS).sparsify_model(.5)

def torchs(model):
    from torch.nn.utils import prune
    weights = [(m,'weight') for m in model.modules() if isinstance(m, LAYERS)]
    return lambda: prune.global_unstructured(weights, prune.L1Unstructured, amount=.5)

def resident(): return int(open('/proc/self/statm').read().split()[1])*4096

def timed(f):
    "Seconds of `f()`, and bytes by which the peak of resident memory rises"
    base,peak,stop = resident(),[0],threading.Event()
    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try: f()
    finally:
        took = time.perf_counter()-start
        stop.set()
        watcher.join()
    return took,max(peak[0], resident())-base

def measured(make): # Function of a model that gives what is to be timed
    def way(case):
        torch.manual_seed(0)
        model = vgg16_bn()
        with attempt(case, 's', 'MiB'):
            took,more = timed(make(model))
            found = [m.weight for m in model.modules() if isinstance(m, LAYERS)]
            share = sum(int((w==0).sum()) for w in found)/sum(w.numel() for w in found)
            if not .49<share<.51: raise Wrong(f'{100*share:.1f} % are zero')
            tell(case, took, 's', 'low')
            tell(case, more/2**20, 'MiB', 'low')
    return way

WAYS = {'ours':measured(ours), 'fasterai 0.4.1':measured(before), 'torch.nn.utils.prune':measured(torchs)}
LACKS = {'torch-pruning':'zeroes nothing', 'torch-simplify':'zeroes nothing'}

if __name__=='__main__': main(WAYS, LACKS)
