"Table 5: lottery tickets, rewound to the start of training or to its second epoch"
from fasterai.sparse.all import Schedule, SparsifyCallback
from .common import SPARSITIES, dense, run
from .findings import BASELINE, Cell, Finding, Table, numbers
from .table4 import sched_iterative_5

ROUNDS = 6  # one before each of five removals, and one after the last

def lottery(bench, seed, sparsity, rewind_epoch=0):
    "Each round has the epochs of a training"
    model = bench.network(seed)
    schedule = Schedule(sched_iterative_5, start_pct=1/ROUNDS)
    bench.fit(model, ROUNDS*bench.recipe.epochs, cbs=SparsifyCallback(sparsity, 'weight', 'global', 'large_final', schedule, lth=True, rewind_epoch=rewind_epoch))
    return bench.measured(model)

columns = [f'{s} %' for s in SPARSITIES]
def tickets(rewind_epoch): return [Cell(run(lottery, sparsity=s, rewind_epoch=rewind_epoch)) for s in SPARSITIES]
def mean(at, row): return sum(at(row, c) for c in columns)/len(columns)
def both(at, column): return (at('LTH', column)+at('LTH with rewinding', column))/2

paper = numbers("""
LTH: 80.05±0.72 81.86±0.40 84.59±0.09 84.79±0.37
LTH with rewinding: 80.65±1.02 82.97±1.15 83.92±0.49 84.77±0.46
""")

TABLE = Table(5, 'Lottery tickets, granularity weight, context global, criteria large_final, schedule iterative', columns,
    {'baseline': [Cell(run(dense))]*4, 'dense, as many epochs': [Cell(run(dense, rounds=ROUNDS))]*4,
     'LTH': tickets(0), 'LTH with rewinding': tickets(1)},
    {'baseline': [BASELINE[0]]*4}|paper, [
        Finding('rewinding to the second epoch gives what rewinding to the start gives, up to a point: mean of the sparsities',
            lambda at: mean(at, 'LTH with rewinding')-mean(at, 'LTH'), within=1.),
        Finding('tickets with 90 % of zeros are better than the dense network', lambda at: both(at, '90 %')-at('baseline', '90 %')),
        Finding('tickets with 90 % of zeros are better than the dense network that is trained for as long',
            lambda at: both(at, '90 %')-at('dense, as many epochs', '90 %')),
        Finding('tickets get better with sparsity: 90 % beside 30 %', lambda at: both(at, '90 %')-both(at, '30 %'))],
    note=f'A ticket is trained for {ROUNDS} rounds, a fifth of its zeros after each but the last; each round has the epochs of the baseline.')

if __name__=='__main__':
    from .page import main
    main(TABLE, __doc__)
