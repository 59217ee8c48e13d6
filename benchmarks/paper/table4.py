"Table 4: schedules, from random and from pretrained weights"
from statistics import fmean
from fasterai.core.schedule import sched_agp, sched_iterative, sched_one_cycle, sched_one_shot
from fasterai.sparse.all import Schedule
from .common import STARTS, sparsified
from .findings import BOTH, Finding, Table, baseline, grid, numbers, paper_baseline

def sched_iterative_5(start, end, pos): "Five steps, as in the paper's Listing 6"; return sched_iterative(start, end, pos, n_steps=5)

PLACES = 'early','whole','late'
WINDOWS = dict(early=(0,.5), whole=(0,1), late=(.5,1))  # from where to where in training
STEPS = dict(early=0, whole=.5, late=.75)  # a single step: before training, in its middle, and later
SCHEDULES = {f'one_shot, {o}': Schedule(sched_one_shot, start_pct=at) for o,at in STEPS.items()}
FUNCTIONS = dict(iterative=sched_iterative_5, gradual=sched_agp, one_cycle=sched_one_cycle)
SCHEDULES |= {f'{name}, {o}': Schedule(f, *WINDOWS[o]) for name,f in FUNCTIONS.items() for o in PLACES}
ALL = ['one_shot',*FUNCTIONS]

def mean(at, start, names=ALL, places=PLACES): "Accuracy at 90 %"; return fmean(at(f'{n}, {p}', f'{start}, 90 %') for n in names for p in places)
def late_costs(at, start): return mean(at, start, places=['early'])-mean(at, start, places=['late'])
def spread(at, start, name):
    found = [mean(at, start, [name], [p]) for p in PLACES]
    return max(found)-min(found)

def about(start):
    smooth,steps = ['gradual','one_cycle'],['one_shot','iterative']
    return [
        Finding(f'{start}: late removal is worse than early removal at 90 %, mean of the functions', lambda at: late_costs(at, start)),
        Finding(f'{start}: gradual and one_cycle are better than one_shot and iterative at 90 %', lambda at: mean(at, start, smooth)-mean(at, start, steps)),
        Finding(f'{start}: the place of gradual and one_cycle matters less than that of one_shot and iterative at 90 %',
            lambda at: fmean(spread(at, start, o) for o in steps)-fmean(spread(at, start, o) for o in smooth)),
        Finding(f'{start}: one_cycle is better than each other function at 90 %, mean of the places',
            lambda at: mean(at, start, ['one_cycle'])-max(mean(at, start, [o]) for o in ALL if o!='one_cycle'))]

letters = numbers("""
a: 79.60±1.02 79.69±0.69 79.29±0.38 77.33±0.25 91.47±0.54 91.48±0.27 91.63±0.13 91.08±0.34
b: 80.32±0.95 81.02±0.39 80.31±0.31 78.59±0.94 91.99±0.56 91.28±0.18 91.65±0.36 90.55±0.73
c: 80.58±0.73 80.12±0.34 80.49±0.61 79.45±1.00 91.90±0.74 90.94±0.48 91.34±0.57 89.28±0.34
d: 80.73±0.14 80.31±0.71 80.31±0.43 77.94±1.05 91.59±0.94 91.28±0.25 91.32±0.20 88.42±0.18
e: 80.65±1.12 80.49±1.07 81.33±0.80 72.39±1.34 90.86±0.18 90.65±0.50 90.34±0.63 85.47±0.67
f: 81.05±0.67 81.05±0.52 79.80±0.72 69.91±3.01 90.90±0.34 90.63±0.34 91.08±0.31 80.94±0.57
g: 80.78±0.55 80.01±0.41 80.65±0.69 79.54±0.83 90.96±0.43 90.43±0.65 91.52±0.57 90.94±0.49
h: 80.31±0.86 81.24±0.58 80.47±0.54 79.96±0.42 91.34±0.28 91.05±0.97 90.96±0.41 89.72±0.47
i: 81.25±1.18 81.35±0.88 80.65±1.21 78.26±0.94 90.86±0.69 91.36±0.43 91.25±0.66 87.24±0.65
j: 80.56±0.76 80.74±0.26 81.27±0.69 79.60±0.12 91.45±0.53 91.89±0.05 92.01±0.65 91.87±0.22
k: 80.74±0.27 80.11±0.86 79.08±0.35 78.83±0.38 91.58±0.50 91.94±0.56 92.03±0.85 90.61±0.45
l: 80.32±0.36 81.25±0.33 80.80±0.43 79.46±0.62 91.58±0.23 90.83±0.19 91.87±0.51 88.13±0.20
""")
NAMES = dict(zip(SCHEDULES, (f'({o})' for o in letters)))

TABLE = Table(4, 'Schedules, granularity weight, context local, criteria large_final', BOTH,
    {'baseline': baseline()}|{k: grid(sparsified, schedule=o) for k,o in SCHEDULES.items()},
    {'baseline': paper_baseline()}|dict(zip(SCHEDULES, letters.values())),
    [f for start in STARTS for f in about(start)]
    +[Finding('late removal costs a pretrained network more than one from scratch, at 90 %', lambda at: late_costs(at, 'finetune')-late_costs(at, 'scratch'))],
    names=NAMES, note='Early is the first half of training, whole all of it, late the second half; `one_shot` is at 0, 50 and 75 %. The paper names its schedules (a) to (l) by the curves of a figure. '
    'They stand here in the order of its Listing 6, three for each function, from early to late: its accuracies at 90 % from pretrained weights fall within each three. This is a reading, and the places of the curves may be others.')

if __name__=='__main__':
    from .page import main
    main(TABLE, __doc__)
