"""How many times faster networks are without half of their channels: one image of 224 pixels, dense and pruned in turn, medians. Then the same with norms folded into convolutions.

Widths are multiples of 8 where the library rounds them. Weights are random."""
import statistics
from copy import deepcopy
import torch, torchvision
import half
from rows import attempt, main, tell
from training_step import in_turn

REPEATS,WARM,UNIT,SECONDS = 15,3,'× faster',90

def faster(dense, small, x):
    "How many times faster `small` is, and milliseconds of both"
    calls = [lambda i: dense(x), lambda i: small(x)]
    with torch.inference_mode(): a,b = (statistics.median(o[WARM:]) for o in in_turn(calls, WARM+REPEATS))
    return a/b,f'{1e3*a:.1f} → {1e3*b:.1f} ms'

def measured(prune, fold=None, as_it_is=True): # Functions of a model and its inputs; whether `prune` leaves norms as they are
    def way(case):
        for name in case.split():
            torch.manual_seed(0)
            dense,x = torchvision.models.get_model(name, weights=None).eval(),torch.randn(1, 3, 224, 224)
            folded = f'{name}, norms folded'
            small = None
            with attempt(name, UNIT, seconds=SECONDS):
                small = prune(deepcopy(dense), x).eval()
                times,detail = faster(dense, small, x)
                tell(name if as_it_is else folded, times, UNIT, 'high', detail=detail)
            if not as_it_is: tell(name, why='folds norms first')
            elif fold is None: tell(folded, why='folds no norms')
            elif small is not None:
                with attempt(folded, UNIT, seconds=SECONDS):
                    times,detail = faster(dense, fold(small), x)
                    tell(folded, times, UNIT, 'high', detail=detail)
    return way

def ours_folded(model):
    from fasterai.misc.all import BN_Folder
    return BN_Folder().fold(model)

WAYS = {'ours': measured(lambda m, x: half.ours(m, x, 8), ours_folded), 'fasterai 0.4.1': measured(lambda m, x: half.before(m, x, 8), ours_folded),
    'torch-pruning': measured(lambda m, x: half.torch_pruning(m, x, 8)), 'torch-simplify': measured(half.torch_simplify, as_it_is=False)}
LACKS = {'torch.nn.utils.prune': 'removes nothing'}

if __name__=='__main__': main(WAYS, LACKS)
