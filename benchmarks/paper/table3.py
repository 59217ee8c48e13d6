"Table 3: criteria, from random and from pretrained weights"
from statistics import fmean
from .common import STARTS, sparsified
from .findings import BOTH, Finding, Table, baseline, grid, numbers, paper_baseline

NAMES = dict(random='random', large_final='large f', small_final='small f', squared_final='sq f', large_init='large i', small_init='small i',
    large_init_large_final='large i,f', small_init_small_final='small i,f', magnitude_increase='mag inc', movement='mov', mov_large_final='mov_large_f', mov_mag='movmag')

def spread(at, column): "Between the best and the worst criteria"; return max(at(o, column) for o in NAMES)-min(at(o, column) for o in NAMES)

def about(start):
    at_90 = f'{start}, 90 %'
    def less(a, b): return lambda at: at(a, at_90)-at(b, at_90)
    return [
        Finding(f'{start}: criteria differ less at 30 % than at 90 %', lambda at: spread(at, at_90)-spread(at, f'{start}, 30 %')),
        Finding(f'{start}: large_final is better than random at 90 %', less('large_final','random')),
        Finding(f'{start}: small_final is worse than random at 90 %', less('random','small_final')),
        Finding(f'{start}: small_init is worse than large_init at 90 %', less('large_init','small_init')),
        Finding(f'{start}: small_init_small_final is worse than random at 90 %', less('random','small_init_small_final'))]

SAME = Finding('squared_final gives what large_final gives: squares of weights have the order of their magnitudes',
    lambda at: fmean(abs(at('squared_final', c)-at('large_final', c)) for c in BOTH), within=.01)

paper = numbers("""
random: 80.53±0.70 80.38±0.23 80.01±0.94 66.34±0.92 90.24±1.47 90.32±0.55 86.38±0.80 30.23±4.25
large_final: 80.03±1.07 80.93±0.97 80.82±0.48 77.99±0.72 91.41±0.43 91.17±0.32 91.41±1.08 88.09±0.45
small_final: 79.05±0.66 75.42±0.44 48.49±1.42 19.38±3.42 84.37±0.61 74.20±0.50 18.76±0.27 0.91±0.52
squared_final: 80.76±0.71 79.34±1.10 79.58±0.58 78.61±0.23 91.39±0.35 90.99±0.30 90.97±0.12 88.97±0.92
large_init: 80.42±0.85 79.67±0.44 79.61±0.73 75.62±0.25 91.56±0.52 92.58±0.49 92.34±1.13 90.30±0.49
small_init: 80.67±0.90 80.78±1.19 79.60±0.74 73.19±0.50 86.52±0.09 85.61±1.03 83.42±1.20 0.88±0.31
large_init_large_final: 80.03±0.43 80.07±0.54 79.18±0.57 72.37±0.78 92.21±0.43 92.43±0.89 91.74±0.12 88.00±0.67
small_init_small_final: 80.25±0.97 76.39±0.83 65.50±0.76 23.27±1.66 85.23±0.83 76.75±1.07 31.27±1.31 3.48±3.88
magnitude_increase: 80.40±0.44 80.27±0.34 79.72±0.16 79.19±1.99 90.83±0.92 90.06±0.52 88.88±0.38 83.13±0.61
movement: 80.45±0.63 79.98±0.43 80.20±0.39 78.26±0.37 89.73±0.19 89.99±0.43 88.58±0.63 80.56±1.23
mov_large_final: 80.16±1.16 82.24±0.67 81.47±0.38 79.12±0.14 90.90±0.14 90.96±0.99 89.93±0.22 86.18±0.48
mov_mag: 80.05±0.37 80.99±0.97 80.32±0.61 79.69±0.57 90.12±1.52 90.55±0.83 90.06±0.34 88.22±0.25
""")

TABLE = Table(3, 'Criteria, granularity weight, context local, schedule one_cycle', BOTH,
    {'baseline': baseline()}|{o: grid(sparsified, criteria=o) for o in NAMES},
    {'baseline': paper_baseline()}|paper, [f for start in STARTS for f in about(start)]+[SAME], names=NAMES)

if __name__=='__main__':
    from .page import main
    main(TABLE, __doc__)
