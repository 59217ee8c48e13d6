"Table 2: granularities, all layers compared with each other, from random and from pretrained weights"
from statistics import fmean
from .common import STARTS
from .findings import BOTH, Finding, Table, numbers, paper_baseline
from .table1 import GRANULARITIES, LOSES_MORE, NOTE, about_structure, rows

def gain(at, start): "Of global over local, at 90 %"; return fmean(at(o, f'{start}, 90 %')-at(o, f'{start}, 90 %', table=1) for o in GRANULARITIES)

paper = numbers("""
weight: 80.58±1.21 80.42±0.73 80.31±1.01 79.63±0.59 91.12±0.59 91.17±0.19 91.79±0.35 89.90±0.14
column: 80.51±0.58 80.78±0.48 80.03±1.08 78.87±0.85 91.54±0.50 90.90±0.46 91.43±0.61 87.48±0.44
row: 81.13±1.30 80.65±0.71 79.50±1.52 78.57±0.45 91.19±0.88 91.72±0.26 91.32±0.90 87.78±0.48
shared_weight: 79.96±0.57 80.45±0.30 76.84±0.72 58.92±3.78 90.99±0.23 90.96±0.68 84.65±1.28 35.83±1.12
channel: 80.78±0.52 80.53±0.12 77.79±1.31 63.91±0.74 91.27±0.22 90.55±0.38 80.91±0.70 18.29±1.88
kernel: 81.89±0.39 80.49±0.29 79.74±0.41 72.08±1.91 91.08±0.37 91.05±0.52 90.43±0.36 85.25±0.66
shared_channel: 79.01±1.33 78.70±0.72 73.54±0.92 72.87±1.10 89.00±0.35 85.65±1.72 74.03±1.52 61.82±1.69
shared_column: 80.87±0.93 79.74±0.39 75.78±0.54 68.85±3.59 90.28±0.22 89.26±0.51 72.14±0.52 18.47±5.31
shared_row: 80.36±0.87 80.80±0.67 74.58±1.68 68.31±1.23 91.21±0.45 89.57±0.11 65.55±4.13 23.01±6.27
vertical_slice: 80.34±0.99 78.72±0.54 75.09±0.39 45.40±4.10 90.81±0.62 87.98±0.64 76.68±0.66 25.36±1.99
horizontal_slice: 80.36±0.67 79.83±0.34 75.47±0.22 47.52±1.77 90.85±0.41 87.96±0.34 78.46±0.62 27.66±2.97
shared_vertical_slice: 79.54±0.36 78.67±0.27 78.14±1.03 78.39±0.90 90.04±0.43 87.56±0.86 85.45±0.40 81.89±0.85
shared_horizontal_slice: 79.72±0.23 79.19±0.45 78.79±0.49 78.36±0.79 89.30±0.42 86.49±1.05 85.39±0.43 83.39±0.47
shared_kernel: 79.18±0.56 76.79±1.32 75.64±1.47 75.05±1.64 86.34±0.47 84.76±1.43 75.33±6.07 25.60±2.26
filter: 79.36±1.22 78.52±0.65 72.83±1.44 68.09±4.39 90.39±0.89 84.43±0.11 62.64±1.58 44.15±1.64
""")

TABLE = Table(2, 'Granularities, context global, criteria large_final, schedule one_cycle', BOTH, rows(context='global'), {'baseline': paper_baseline()}|paper,
    [f for start in STARTS for f in about_structure(start)]+[LOSES_MORE]
    +[Finding(f'{start}: global is better than local at 90 %, mean of all granularities', lambda at, start=start: gain(at, start)) for start in STARTS]
    +[Finding(f'{start}: global is better than local at 90 % of single weights',
        lambda at, c=f'{start}, 90 %': at('weight', c)-at('weight', c, table=1)) for start in STARTS]
    +[Finding('global gains more over local from scratch than from pretrained weights, at 90 %', lambda at: gain(at, 'scratch')-gain(at, 'finetune'))], note=NOTE)

if __name__=='__main__':
    from .page import main
    main(TABLE, __doc__)
