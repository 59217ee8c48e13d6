"Table 7: penalties on the weights, by granularity"
from statistics import fmean
from fasterai.regularize.all import RegularizationCallback
from .common import dense, run
from .findings import BASELINE, Cell, Finding, Table, numbers
from .table1 import GRANULARITIES

ALPHAS = 1e-7,1e-5,1e-3,1e-1

def regularized(bench, seed, granularity, alpha):
    model = bench.network(seed)
    bench.fit(model, cbs=RegularizationCallback(granularity, alpha))
    return bench.measured(model)

columns = [f'{o:g}' for o in ALPHAS]
def mean(at, column, names=GRANULARITIES): return fmean(at(o, column) for o in names)
FINE,COARSE = ['weight','column','row'],['shared_vertical_slice','shared_horizontal_slice','shared_kernel','filter']

paper = numbers("""
weight: 80.91±0.44 79.45±0.88 54.50±0.94 23.91±0.54
column: 80.45±0.29 81.02±1.32 65.68±1.32 25.91±0.41
row: 80.62±1.31 79.39±0.58 65.35±0.49 25.67±0.92
shared_weight: 80.11±0.30 80.49±0.65 80.67±0.42 66.05±0.59
channel: 80.40±0.49 81.56±0.31 80.67±0.11 63.02±1.14
kernel: 80.34±0.14 81.29±0.16 73.16±0.14 27.81±0.84
shared_channel: 80.35±0.63 79.94±0.59 80.31±0.90 81.00±1.22
shared_column: 80.09±1.14 80.80±0.31 81.46±0.23 72.96±0.49
shared_row: 80.71±0.91 81.47±0.30 80.29±0.83 74.25±0.21
vertical_slice: 80.46±0.92 80.45±0.52 80.43±0.35 72.96±0.84
horizontal_slice: 80.73±0.40 80.85±0.85 80.98±0.76 71.85±0.63
shared_vertical_slice: 81.02±0.74 81.31±0.39 80.58±0.74 80.56±1.52
shared_horizontal_slice: 80.40±0.14 80.98±0.89 80.12±1.07 81.33±1.92
shared_kernel: 81.42±0.59 80.93±0.57 81.66±0.41 77.70±0.84
filter: 81.13±0.43 81.15±1.31 80.56±0.47 76.48±1.01
""")

TABLE = Table(7, 'Penalties, by granularity and factor', columns,
    {'baseline': [Cell(run(dense))]*4}|{o: [Cell(run(regularized, granularity=o, alpha=a)) for a in ALPHAS] for o in GRANULARITIES},
    {'baseline': [BASELINE[0]]*4}|paper, [
        Finding('a stronger penalty is worse: 0.1 beside 1e-7, mean of all granularities', lambda at: mean(at, '1e-07')-mean(at, '0.1')),
        Finding('large blocks are penalized less: at 0.1, blocks along three axes are better than weights, columns and rows',
            lambda at: mean(at, '0.1', COARSE)-mean(at, '0.1', FINE)),
        Finding('the same at 0.001', lambda at: mean(at, '0.001', COARSE)-mean(at, '0.001', FINE))])

if __name__=='__main__':
    from .page import main
    main(TABLE, __doc__)
