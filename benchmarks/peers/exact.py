"Blocks that are zero beside those that were asked for, over granularities, contexts and ratios, on resnet18; and in one layer whose weights are hard to tell apart"
from copy import deepcopy
import torch
from torch import nn
from torchvision.models import resnet18
from rows import attempt, main, tell

# axes along which the blocks of a convolution's weight (o, i, h, w) differ
AXES = dict(weight='oihw', column='oiw', row='oih', shared_weight='ihw', channel='ohw', kernel='oi', shared_channel='hw', shared_column='iw', shared_row='ih', vertical_slice='ow',
    horizontal_slice='oh', shared_vertical_slice='w', shared_horizontal_slice='h', shared_kernel='i', filter='o', layer='')
CONTEXTS,RATIOS,UNIT = ('local','global'),(10,30,50,75,90),'exact'
WEIGHTS = { # 288 weights of one layer, and the percentage that is to go
    'all weights equal': (torch.full((288,), .3), 50),
    'two magnitudes': (torch.tensor([1.,-2.,-1.,2.]).repeat(72), 75),
    'weights of about 1e-15': (1e-15*(1+torch.arange(288.)), 50)}

def blocks(w, axes):
    "How many blocks of `w` are zero, and how many there are"
    over = [i for i,o in enumerate('oihw') if o not in axes]
    left = (w!=0).amax(over) if over else w!=0
    return int((~left).sum()),left.numel()

def off(model, axes, context, percent):
    "How many blocks more or fewer are zero than were asked for: in the layer that is worst, or in all together"
    found = [blocks(m.weight, axes) for m in model.modules() if isinstance(m, nn.Conv2d)]
    if context=='global': found = [[sum(o) for o in zip(*found)]]
    return max(abs(zeros-n*percent/100) for zeros,n in found)

def over_ratios(zero, contexts): # Functions of model, granularity, context and percentage; and of a granularity
    torch.manual_seed(0)
    whole = resnet18()
    for granularity,axes in AXES.items():
        if not contexts(granularity):
            tell(granularity, why='not one of its granularities')
            continue
        with attempt(granularity, UNIT):
            offs = []
            for context in contexts(granularity):
                for percent in RATIOS:
                    model = deepcopy(whole)
                    zero(model, granularity, context, percent)
                    offs.append(off(model, axes, context, percent))
            exact = sum(o<1 for o in offs)  # either rounding will do
            tell(granularity, exact, UNIT, 'high', of=len(offs), detail=f'{max(offs):,.0f} off' if exact<len(offs) else None)

def in_a_layer(zero):
    for name,(weights,percent) in WEIGHTS.items():
        with attempt(name, UNIT):
            conv = nn.Conv2d(4, 8, 3)
            conv.weight.data = weights.view(8, 4, 3, 3).clone()
            zero(nn.Sequential(conv), 'weight', 'local', percent)
            asked,zeros = 288*percent//100,int((conv.weight==0).sum())
            tell(name, int(zeros==asked), UNIT, 'high', of=1, detail=f'{zeros} zeros for {asked}' if zeros!=asked else None)

def with_all(zero, contexts=lambda granularity: CONTEXTS):
    def way(case):
        if case=='resnet18': over_ratios(zero, contexts)
        else: in_a_layer(zero)
    return way

def ours(model, granularity, context, percent):
    from fasterai.sparse.all import Sparsifier
    Sparsifier(model, granularity, context).sparsify_model(percent)

def before(model, granularity, context, percent):
    from fasterai.sparse.all import Sparsifier, large_final
    Sparsifier(model, granularity, context, large_final).sparsify_model(percent/100)

def torchs(model, granularity, context, percent):
    from torch.nn.utils import prune
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if context=='global': prune.global_unstructured([(m,'weight') for m in layers], prune.L1Unstructured, amount=percent/100)
    for m in layers:
        if context=='local' and granularity=='weight': prune.l1_unstructured(m, 'weight', amount=percent/100)
        if granularity in DIMENSIONS: prune.ln_structured(m, 'weight', amount=percent/100, n=2, dim=DIMENSIONS[granularity])
        prune.remove(m, 'weight')

DIMENSIONS = dict(filter=0, shared_kernel=1)  # of `ln_structured`
def torch_contexts(granularity): return CONTEXTS if granularity=='weight' else CONTEXTS[:1] if granularity in DIMENSIONS else ()

WAYS = {'ours': with_all(ours), 'fasterai 0.4.1': with_all(before), 'torch.nn.utils.prune': with_all(torchs, torch_contexts)}
LACKS = {'torch-pruning': 'removes channels, and zeroes none', 'torch-simplify': 'removes what is zero, and zeroes nothing'}

if __name__=='__main__': main(WAYS, LACKS)
