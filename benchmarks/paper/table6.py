"Table 6: a deeper, pretrained network teaches one with random weights"
from functools import lru_cache
from fasterai.distill.all import KnowledgeDistillationCallback
from .common import STARTS, dense, run
from .findings import BASELINE, Cell, Finding, Table, numbers

WEIGHTS = .3,.5,.7,.9  # of what the teacher says, beside the labels

@lru_cache(1)
def teacher(bench, seed, start):
    model = bench.network(seed, start, deep=True)
    bench.fit(model)
    return model

def taught(bench, seed, loss, weight, teacher_start='finetune'):
    deep = teacher(bench, seed, teacher_start)
    model = bench.network(seed)
    layers = list(model.stages) if loss=='Attention' else None
    bench.fit(model, cbs=KnowledgeDistillationCallback(deep, loss=loss, weight=weight, activations_student=layers, activations_teacher=layers))
    return bench.measured(model)|dict(teacher=bench.right(bench.classes(deep)))

columns = [f'{o:g}' for o in WEIGHTS]
def mean(at, row): return sum(at(row, c) for c in columns)/len(columns)
def row(loss): return [Cell(run(taught, loss=loss, weight=o)) for o in WEIGHTS]
soft = row('SoftTarget')

paper = numbers("""
SoftTarget: 83.32±0.14 84.65±0.31 84.74±0.49 84.34±0.17
Attention: 81.56±0.25 81.55±0.41 81.64±0.27 81.73±0.67
""")

TABLE = Table(6, 'Knowledge distillation, by the weight of the teacher', columns,
    {'teacher': [Cell(o.run, 'teacher') for o in soft], 'baseline': [Cell(run(dense))]*4, 'SoftTarget': soft, 'Attention': row('Attention')},
    {'baseline': [BASELINE[0]]*4}|paper, [
        Finding('SoftTarget is better than Attention, mean of the weights', lambda at: mean(at, 'SoftTarget')-mean(at, 'Attention')),
        Finding('SoftTarget is better than no teacher, mean of the weights', lambda at: mean(at, 'SoftTarget')-mean(at, 'baseline')),
        Finding('Attention is better than no teacher, mean of the weights', lambda at: mean(at, 'Attention')-mean(at, 'baseline'))],
    note='Attention compares the outputs of all stages.')

if __name__=='__main__':
    from .page import main
    main(TABLE, __doc__)
