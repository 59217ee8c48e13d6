"Table 8: normalizations folded into the convolutions before them"
from fasterai.misc.all import BN_Folder
from .common import run
from .findings import BASELINE, Cell, Finding, Table

def count(model): return sum(p.numel() for p in model.parameters())

def folded(bench, seed):
    model = bench.network(seed)
    bench.fit(model)
    before = bench.classes(model)
    small = BN_Folder(bench.norm(bench.valid[0][:2])).fold(model)
    after = bench.classes(small)
    counts = dict(changed=int((before!=after).sum()), params=count(model), folded_params=count(small))
    return dict(accuracy=bench.right(before), folded=bench.right(after))|counts

this = run(folded)
TABLE = Table(8, 'Folding of BatchNorm', ['trained','folded'],
    {'accuracy': [Cell(this), Cell(this, 'folded')], 'parameters': [Cell(this, 'params'), Cell(this, 'folded_params')],
     'images with another class': [None, Cell(this, 'changed')]},
    {'accuracy': [BASELINE[0]]*2, 'parameters': [(11_228_838,),(11_224_038,)]},
    [Finding('folding costs no accuracy', lambda at: at('accuracy', 'folded')-at('accuracy', 'trained'), within=.01)])

if __name__=='__main__':
    from .page import main
    main(TABLE, __doc__)
