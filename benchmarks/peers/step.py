"A training step that zeroes weights, or holds them at zero, beside the same step without, in turn: resnet18, 10 classes, 32 images of 64 pixels"
import statistics
from torch import nn
from torchvision.models import resnet18
from rows import attempt, main, tell
from training_step import begin, in_turn, learner, with_and_without

STEPS,WARM,UNIT = 26,2,'× the step'
SCHEDULED = {'weight, local':('local','large_final'), 'weight, global':('global','large_final'), 'weight, local, movement':('local','movement')}
HELD = 'zeros are held'

def told(case, times):
    "A row for the seconds of steps with and without"
    ours,base = (statistics.mean(o[WARM:]) for o in times)  # not every step chooses what is zero
    tell(case, ours/base, UNIT, 'low', detail=f'{1e3*ours:.0f} beside {1e3*base:.0f} ms')

def half_zero(num_classes):
    "A resnet18 half of whose convolutions' weights are zero"
    model = resnet18(num_classes=num_classes)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            w = m.weight.data
            w[w.abs()<=w.abs().flatten().median()] = 0
    return model

def ours(case):
    import fasterai.sparse.all as s
    with attempt(case, UNIT):
        if case==HELD: times = with_and_without(s.KeepSparsity(), STEPS, model=half_zero)
        else:
            context,criteria = SCHEDULED[case]
            times = with_and_without(s.SparsifyCallback(50, 'weight', context, criteria, 'one_cycle'), STEPS)
        told(case, times)

def before(case):
    import fasterai.core.all as core
    from fasterai.sparse.all import SparsifyCallback
    if case==HELD: return tell(case, why='zeros are held in the fit that makes them, and not in a later one')
    with attempt(case, UNIT):
        context,criteria = SCHEDULED[case]
        told(case, with_and_without(SparsifyCallback(.5, 'weight', context, getattr(core, criteria), core.one_cycle), STEPS))

def torchs(case):
    from torch.nn.utils import prune
    if case!=HELD: return tell(case, why='has no schedule')
    def masked(num_classes):
        model = half_zero(num_classes)
        for m in model.modules():
            if isinstance(m, nn.Conv2d): prune.l1_unstructured(m, 'weight', amount=.5)
        return model
    with attempt(case, UNIT):
        both = [learner(STEPS, model=o) for o in (masked, half_zero)]
        for learn,_ in both: begin(learn, [])
        told(case, in_turn([lambda i, learn=learn, batch=batch: learn.one_batch(i, batch) for learn,batch in both], STEPS))

WAYS = {'ours':ours, 'fasterai 0.4.1':before, 'torch.nn.utils.prune':torchs}
LACKS = {'torch-pruning':'zeroes nothing in training', 'torch-simplify':'zeroes nothing'}

if __name__=='__main__': main(WAYS, LACKS)
