"Table 1: granularities, each layer by itself, from random and from pretrained weights"
from statistics import fmean
from .common import STARTS, sparsified
from .findings import BOTH, Finding, Table, baseline, grid, numbers, paper_baseline

GRANULARITIES = ['weight','column','row','shared_weight','channel','kernel','shared_channel','shared_column','shared_row','vertical_slice','horizontal_slice',
    'shared_vertical_slice','shared_horizontal_slice','shared_kernel','filter']
LINES,SLABS = ['column','row','shared_weight','channel'],['shared_kernel','filter']  # blocks along one axis of a weight, and along three, of which a layer has many
NOTE = ('A 3×3 kernel has three columns and three rows, so that one or two of its shared vertical or horizontal slices are zeroed at most; a layer never loses its last block. '
    'one_cycle reaches its target in the last step: where that is a whole number of few blocks, as half of 8, 16 and 32 filters, the last block of each layer goes when training is over.')

def rows(**args): return {'baseline': baseline()}|{o: grid(sparsified, granularity=o, **args) for o in GRANULARITIES}

def about_structure(start):
    "What tables 1 and 2 say of the size of blocks, at 90 %"
    def mean(at, names): return fmean(at(o, f'{start}, 90 %') for o in names)
    return [
        Finding(f'{start}: single weights are better than any larger block at 90 %',
            lambda at: at('weight', f'{start}, 90 %')-max(at(o, f'{start}, 90 %') for o in GRANULARITIES[1:])),
        Finding(f'{start}: blocks along one axis (column, row, shared weight, channel) are better than blocks along three (shared kernel, filter) at 90 %',
            lambda at: mean(at, LINES)-mean(at, SLABS))]

def drop(at, start): return fmean(at('baseline', f'{start}, 90 %')-at(o, f'{start}, 90 %') for o in GRANULARITIES)
LOSES_MORE = Finding('a pretrained network loses more at 90 % than one from scratch, mean of all granularities', lambda at: drop(at, 'finetune')-drop(at, 'scratch'))

def fine_at_30(at, start): return fmean(at(o, f'{start}, 30 %') for o in ('weight','column','row'))-at('baseline', f'{start}, 30 %')

paper = numbers("""
weight: 80.40±0.22 80.20±0.71 79.74±0.85 78.46±0.40 91.39±0.14 91.67±0.56 91.43±0.10 88.75±0.90
column: 81.04±0.46 80.58±0.15 80.34±0.22 75.60±0.50 91.85±0.59 91.23±0.34 90.43±0.47 83.55±1.53
row: 81.13±1.01 80.18±0.56 79.80±0.19 75.97±0.65 91.56±0.79 90.57±0.54 90.88±1.06 85.12±0.97
shared_weight: 80.49±0.69 80.14±0.19 78.57±1.03 66.23±0.97 90.83±1.20 90.06±0.25 88.40±0.67 46.97±0.87
channel: 81.29±0.43 79.50±0.62 79.81±0.63 65.85±0.32 91.16±0.41 90.34±1.03 86.60±0.43 44.97±0.62
kernel: 80.27±0.49 79.50±0.51 79.52±1.52 67.34±1.57 91.79±0.43 91.25±0.43 89.88±0.73 77.64±0.80
shared_channel: 79.54±0.87 80.85±0.98 78.21±0.56 38.60±3.12 90.75±0.55 90.55±0.52 86.20±1.34 23.03±0.92
shared_column: 79.69±0.64 79.87±0.23 80.23±0.40 59.90±1.71 90.70±0.69 89.93±0.31 86.00±0.32 41.28±3.53
shared_row: 80.51±0.34 79.78±0.29 77.92±0.56 57.99±0.89 90.30±0.51 89.88±0.53 85.38±0.57 40.43±0.92
vertical_slice: 80.01±0.85 80.43±0.91 78.28±0.35 48.09±1.55 90.59±0.45 89.46±0.71 82.90±0.30 29.81±1.78
horizontal_slice: 80.22±0.79 79.19±0.82 77.13±1.60 43.95±1.02 91.01±0.87 88.75±0.36 82.48±0.96 29.60±2.35
shared_vertical_slice: 79.91±0.84 80.40±0.50 76.97±0.47 74.98±0.92 89.28±0.35 89.17±0.62 75.47±0.75 73.49±1.09
shared_horizontal_slice: 79.81±0.76 80.07±0.64 76.22±0.11 74.58±0.35 89.77±0.22 88.60±0.58 73.41±1.21 69.15±0.77
shared_kernel: 79.96±0.11 81.00±0.21 75.84±1.60 48.56±0.94 89.77±0.43 89.30±0.48 81.25±0.27 31.86±1.23
filter: 80.76±1.65 78.41±1.01 72.92±2.40 37.47±1.90 89.86±0.85 87.78±0.18 77.52±1.84 29.05±0.09
""")

TABLE = Table(1, 'Granularities, context local, criteria large_final, schedule one_cycle', BOTH, rows(context='local'), {'baseline': paper_baseline()}|paper,
    [f for start in STARTS for f in about_structure(start)]
    +[Finding(f'{start}: 30 % of weights, columns or rows less is better than the dense network', lambda at, start=start: fine_at_30(at, start)) for start in STARTS]
    +[LOSES_MORE], note=NOTE)

if __name__=='__main__':
    from .page import main
    main(TABLE, __doc__)
