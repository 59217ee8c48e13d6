"Bytes of a file of resnet18, as each library writes it: 90 % of weights zero; the others shared as well, 32 values a layer; half of the channels gone. Read again, it gives the same outputs"
import lzma, os, tempfile
from copy import deepcopy
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet18
import half
from rows import Wrong, attempt, main, tell

LAYERS,SPARSE,SHARED,HALF = (nn.Conv2d,nn.Linear),'90 % zero','90 % zero, 32 values a layer','half of the channels'

def compare(a, b, x):
    with torch.no_grad(): differs = (a(x)-b(x)).abs().max()
    if differs>1e-6: raise Wrong(f'what is read again differs by {differs:.0e}')

def measured(ways): # By case: a function that changes a model and gives it with what writes it to a path, and one that reads it
    def way(case):
        if case not in ways: return tell(case, why=NO_WAY[case])
        make,read = ways[case]
        with attempt(case, 'MB'), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            x,path = torch.randn(1, 3, 224, 224),os.path.join(folder, 'model')
            model,write = make(resnet18().eval(), x)
            write(path)
            compare(model.eval(), read(path).eval(), x)
            tell(case, os.path.getsize(path)/1e6, 'MB', 'low')
    return way

def then(change, write): # Functions of a model and its inputs, and of a model and a path
    def make(model, x):
        model = change(model, x)
        return model,lambda path: write(model, path)
    return make

# --- ours

def sparse(model, x):
    from fasterai.sparse.all import Sparsifier
    return Sparsifier(model, 'weight', 'global', layer_type=LAYERS).sparsify_model(90)

def shared(model, x):
    from fasterai.quantize.all import KMeansQuantizer
    return KMeansQuantizer(5).quantize(sparse(model, x))

def write_compressed(model, path):
    from fasterai.quantize.all import save_compressed
    save_compressed(model, path)

def read_compressed(path):
    from fasterai.quantize.all import load_compressed
    return load_compressed(path, resnet18())

def write_pruned(model, path):
    from fasterai.prune.all import save_pruned
    save_pruned(model, path)

def read_pruned(path):
    from fasterai.prune.all import load_pruned
    return load_pruned(path, resnet18())

# --- others

def whole(path): return torch.load(path, weights_only=False)
def write_state(model, path): torch.save(model.state_dict(), path)
def read_state(path):
    model = resnet18()
    model.load_state_dict(torch.load(path))
    return model

def sparse_before(model, x):
    from fasterai.sparse.all import Sparsifier, large_final
    sparsifier = Sparsifier(model, 'weight', 'global', large_final, layer_type=LAYERS)
    sparsifier.sparsify_model(.9)
    return model,sparsifier.save_model

def sparse_torch(model, x):
    weights = [(m,'weight') for m in model.modules() if isinstance(m, LAYERS)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=.9)
    for m,name in weights: prune.remove(m, name)
    return model

def write_xz(model, path):
    from safetensors.torch import save
    with lzma.open(path, 'wb') as f: f.write(save({k:v.contiguous() for k,v in model.state_dict().items()}))

def read_xz(path):
    from safetensors.torch import load
    model = resnet18()
    with lzma.open(path) as f: model.load_state_dict(load(f.read()))
    return model

def a_half(change): return {HALF:(then(change, torch.save),whole)}  # as all three documentations have it

WAYS = {
    'ours': measured({SPARSE:(then(sparse, write_compressed),read_compressed), SHARED:(then(shared, write_compressed),read_compressed), HALF:(then(half.ours, write_pruned),read_pruned)}),
    'fasterai 0.4.1': measured({SPARSE:(sparse_before,whole), **a_half(half.before)}),
    'torch-pruning': measured(a_half(half.torch_pruning)),
    'torch-simplify': measured(a_half(half.torch_simplify)),
    'torch.nn.utils.prune': measured({SPARSE:(then(sparse_torch, write_state),read_state)}),
    'xz': measured({SPARSE:(then(sparse, write_xz),read_xz), SHARED:(then(shared, write_xz),read_xz)})}
NO_WAY = {SPARSE:'zeroes nothing', SHARED:'shares no weights', HALF:'removes no channels'}

if __name__=='__main__': main(WAYS, {})
