"""Networks of torchvision, one or more of each family, with random weights, statistics, scales and shifts: does what comes out run, is it smaller, and is it right?

- lossless: two of five filters of each layer but the last are zero, with the scales and shifts of their norms, the same ones everywhere, so that additions keep them zero. What can go without changing the outputs is removed.
- half: half of the channels of each layer go. The outputs keep their shape."""
import os
from copy import deepcopy
import torch, torchvision
import half
from rows import Wrong, attempt, main, tell
import zoo

LOSSLESS,HALF,SAME = '% of parameters left, lossless','% of parameters left, half of the channels',1e-3  # largest relative difference of outputs, in float32
SECONDS = 60  # that a removal may take

def network(name):
    "The network without heads that run in training alone"
    options = dict(aux_logits=False, init_weights=False) if name in ('googlenet','inception_v3') else {}
    torch.manual_seed(0)
    return zoo.randomize(torchvision.models.get_model(name, weights=None, **options)).eval()

def inputs(name, seed=0): return zoo.images(1, 3, *[299 if name=='inception_v3' else 224]*2, seed=seed)

@torch.no_grad()
def outputs(model, name): return model(inputs(name, seed=1))

def left(model, n):
    "Percentage of `n` parameters that `model` has; fewer, or it is wrong"
    share = 100*zoo.size(model)/n
    if share>=100: raise Wrong(f'no smaller: {share:.0f} % of the parameters')
    return share

def lossless(name, remove):
    with attempt(name, LOSSLESS, seconds=SECONDS):
        model = zoo.zero_by_hand(network(name))
        was,n = outputs(model, name),zoo.size(model)
        small = remove(deepcopy(model), inputs(name)).eval()
        now = outputs(small, name)
        if now.shape!=was.shape: raise Wrong(f'outputs of shape {tuple(now.shape)}')
        differs = ((now-was).abs().max()/was.abs().max()).item()
        if not differs<=SAME: raise Wrong(f'outputs differ by {100*differs:.1g} %')
        tell(name, left(small, n), LOSSLESS, 'low')

def by_half(name, remove):
    with attempt(name, HALF, seconds=SECONDS):
        model = network(name)
        was,n,filters = outputs(model, name),zoo.size(model),zoo.filters(model)
        small = remove(model, inputs(name)).eval()
        now = outputs(small, name)
        if now.shape!=was.shape: raise Wrong(f'outputs of shape {tuple(now.shape)}')
        tell(name, left(small, n), HALF, detail=f'{100-100*zoo.filters(small)/filters:.0f} % of filters gone')

def ours_lossless(model, x):
    from fasterai.prune.all import Pruner
    return Pruner().prune_model(model, x)

WAYS = {'ours':(ours_lossless,half.ours), 'fasterai 0.4.1':(None,half.before), 'torch-pruning':(None,half.torch_pruning), 'torch-simplify':(half.simplified,None)}
LACKS = {'torch.nn.utils.prune':'removes nothing'}
NO_LOSSLESS,NO_HALF = 'does not look for channels that are zero','removes channels that are zero, and chooses none'

def each(library): # Of `WAYS`
    "The way of a library: a process for each network, which may end without harm to the others"
    remove,ratio = WAYS[library]
    def one(name):
        if remove: lossless(name, remove)
        else: tell(name, unit=LOSSLESS, why=NO_LOSSLESS)
        if ratio: by_half(name, ratio)
        else: tell(name, unit=HALF, why=NO_HALF)
    def way(case):
        for name in case.split():
            process = os.fork()
            if not process:
                one(name)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if code: tell(name, error=f'ended with {code}')
    return way

if __name__=='__main__': main({o:each(o) for o in WAYS}, LACKS)
