"A training step that distils resnet34 into resnet18 beside what it cannot do without, the student's step and the teacher's forward pass, in turn: 32 images of 64 pixels"
import statistics
from rows import attempt, main, tell
from training_step import in_turn

STEPS,WARM,UNIT = 16,2,'× both'

def measured(case, how): # What `KnowledgeDistillationCallback` takes beside the teacher
    from distillation import sides
    with attempt(case, UNIT):
        ours,step,teach = (statistics.median(o[WARM:]) for o in in_turn(sides(STEPS, how), STEPS))
        tell(case, ours/(step+teach), UNIT, 'low', detail=f'{1e3*ours:.0f} beside {1e3*step:.0f} + {1e3*teach:.0f} ms')

def ours(case):
    from distillation import HOW
    measured(case, HOW[case])

def before(case):
    from fasterai.distill.all import SoftTarget
    measured(case, dict(loss=SoftTarget))

WAYS = {'ours':ours, 'fasterai 0.4.1':before}
LACKS = dict.fromkeys(('torch-pruning','torch-simplify','torch.nn.utils.prune'), 'does not distil')

if __name__=='__main__': main(WAYS, LACKS)
