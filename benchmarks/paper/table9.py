"Table 9: the fully connected layer as two thin ones"
from fasterai.misc.all import FC_Decomposer
from .common import run
from .findings import BASELINE, Cell, Finding, Table
from .table8 import count

REMOVED = 25,50,75  # percent of singular values

def decomposed(bench, seed):
    model = bench.network(seed)
    bench.fit(model)
    res = bench.measured(model)|dict(params=count(model.fc))
    for p in REMOVED:
        small = FC_Decomposer().decompose(model, p/100)
        res |= {f'{p} %': bench.right(bench.classes(small)), f'params, {p} %': count(small.fc)}
    return res

this = run(decomposed)
columns = ['trained',*(f'{p} %' for p in REMOVED)]
def loss(at, column): return at('accuracy', 'trained')-at('accuracy', column)

TABLE = Table(9, 'Decomposition of the fully connected layer, by the share of singular values that goes', columns,
    {'accuracy': [Cell(this), *(Cell(this, f'{p} %') for p in REMOVED)],
     'parameters of the layer': [Cell(this, 'params'), *(Cell(this, f'params, {p} %') for p in REMOVED)]},
    {'accuracy': [BASELINE[0],(80.84,.17),(80.67,.61),(77.24,.74)],
     'parameters of the layer': [(52_326,),(46_766,),(31_416,),(15_452,)]},
    [Finding(f'without {p} % of singular values, accuracy is the same up to a point', lambda at, p=p: -loss(at, f'{p} %'), within=1.) for p in (25,50)]
    +[Finding('without 75 % of singular values, accuracy is lost', lambda at: loss(at, '75 %'))])

if __name__=='__main__':
    from .page import main
    main(TABLE, __doc__)
