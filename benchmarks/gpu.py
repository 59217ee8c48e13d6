"""The library on a GPU, beside its peers and beside what it cannot do without: a Markdown table.

Each figure is a median, with the least, the most and the number of runs in brackets. Memory is that of the device at its
peak, above what was in use before. Settings are PyTorch's own: convolutions of float32 may compute in TF32.

    python benchmarks/gpu.py [--only NAME,…] [--json FILE]      made to take less than four minutes on an H100
    python benchmarks/gpu.py --device cpu --small               does it run? Small stand-ins, whose figures mean nothing
"""
import argparse, gc, json, os, platform, statistics, tempfile, time, warnings
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
warnings.filterwarnings('ignore', category=FutureWarning)
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.models import mobilenet_v3_small, resnet18, resnet50, squeezenet1_1, vgg16_bn
from distillation import HOW, sides
from training_step import in_turn, with_and_without
from fasterai.core.graph import ChannelGraph
from fasterai.core.pool import select
from fasterai.core.selection import Scores
from fasterai.misc.all import BN_Folder, FC_Decomposer
from fasterai.prune.all import Pruner
from fasterai.quantize.all import KMeansCallback, KMeansQuantizer, load_compressed, save_compressed
from fasterai.regularize.all import RegularizationCallback, RegularizeCallback
from fasterai.sparse.all import Sparsifier, SparsifyCallback

REPEATS = 5
ENOUGH = 5  # seconds of a figure's runs, after which no further one begins
WARM_STEPS = 5  # of a training, not counted
MIB = 2**20

# What a figure is

def number(x): return f'{x:,.0f}' if x>=100 else f'{x:.3g}'

def spread(seconds):
    "Median, least and most in one unit, and of how many"
    middle = statistics.median(seconds)
    unit,k = ('s',1) if middle>=1 else ('ms',1e3)
    around = f'{number(k*min(seconds))} to {number(k*max(seconds))}, {len(seconds)} runs' if len(seconds)>1 else 'once'
    return f'{number(k*middle)} {unit} ({around})'

@dataclass
class Times:
    "Seconds of some runs and of their parts, and the memory that they took"
    seconds:list
    parts:dict = field(default_factory=dict) # Seconds of each run, by name
    extra:int|None = None # Bytes
    @property
    def median(self): return statistics.median(self.seconds)
    def __str__(self): return spread(self.seconds)

def now():
    "Seconds on the clock when the device has done all it was given"
    if torch.cuda.is_initialized(): torch.cuda.synchronize()
    return time.perf_counter()

def memory_before():
    "Bytes of the device in use, from where `memory_above` counts; `None` where nobody counts"
    gc.collect()
    if not torch.cuda.is_initialized(): return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()

def memory_above(before): return None if before is None else torch.cuda.max_memory_allocated()-before

def lasts(f):
    "Seconds from the call of `f` until the device has done it: of a GPU, by its own events"
    start = now()
    if not torch.cuda.is_initialized():
        f()
        return now()-start
    begin,end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)/1e3

def timed(f, n=REPEATS, warm=1): # How many runs at most, after how many to warm up
    "`Times` of `f`"
    for _ in range(warm): f()
    seconds = []
    while len(seconds)<n and sum(seconds)<ENOUGH: seconds.append(lasts(f))
    return Times(seconds)

def afresh(make, **parts): # Gives what the first part takes; each part takes what the one before gave
    "`Times` of `parts` in order, each run with something new from `make`, after one to warm up; memory is the last run's"
    runs = []
    while len(runs)<=REPEATS and sum(map(sum, runs[1:]))<ENOUGH:
        x = None  # what the last run made must be gone before memory is counted
        x = make()
        before,seconds = memory_before(),[]
        for part in parts.values():
            start = now()
            x = part(x)
            seconds.append(now()-start)
        extra = memory_above(before)
        runs.append(seconds)
    each = dict(zip(parts, map(list, zip(*runs[1:]))))
    return Times([sum(o) for o in runs[1:]], each if len(parts)>1 else {}, extra)

# What a row is

def told(f):
    "What `f()` gives, or which error it ended with"
    try: return f()
    except Exception as e: return ' '.join(f'{type(e).__name__}: {e}'.split())[:160]
    finally:
        gc.collect()
        if torch.cuda.is_initialized(): torch.cuda.empty_cache()

def row(what, ours, beside=None, name='', note=''): # Name of what is beside; functions that give `Times`, or what they gave
    "A row of the table"
    ours,beside = (told(o) if callable(o) else o for o in (ours, beside))
    both = [o for o in (ours, beside) if isinstance(o, Times)]
    notes = [note] if note else []
    notes += [f'{part} {spread(seconds)}' for o in both for part,seconds in o.parts.items()]
    for o in both:
        if o.extra is not None: notes.append(f'memory{"" if o is ours else f" of {name}"} {number(o.extra/MIB)} MiB')
    ratio = ours.median/beside.median if len(both)==2 else None
    return dict(what=what, ours=ours, beside=beside, name=name, ratio=ratio, note='; '.join(notes))

def line(o):
    "Row `o` in Markdown"
    beside = '' if o['beside'] is None else f'{o["name"]}: {o["beside"]}'
    ratio = '' if o['ratio'] is None else f'×{o["ratio"]:.3g}'
    cells = o['what'],o['ours'],beside,ratio,o['note']
    return '| '+' | '.join(str(cell).replace('|', '\\|') for cell in cells)+' |'

# Sections: generators of rows

def tiny(num_classes=10):
    "Stands in for vgg16_bn where things are small"
    def conv(i, o): return nn.Conv2d(i, o, 3, padding=1),nn.BatchNorm2d(o),nn.ReLU(),nn.MaxPool2d(2)
    classifier = nn.Linear(512, 64),nn.ReLU(),nn.Linear(64, num_classes)
    return nn.Sequential(*conv(3, 16), *conv(16, 32), nn.AdaptiveAvgPool2d(4), nn.Flatten(), *classifier)

def network(make, device, **kwargs):
    "What `make` gives, made on `device`"
    torch.manual_seed(0)
    with torch.device(device): return make(**kwargs).eval()

def zeroed(model, types, granularity, context):
    "`Times` of zeroing half of the weights"
    def construct(m): return Sparsifier(m, granularity, context, 'large_final', layer_type=types)
    return afresh(lambda: deepcopy(model), construction=construct, sparsify_model=lambda sp: sp.sparsify_model(50))

def zeroed_by_torch(model, types):
    "The same by `torch.nn.utils.prune`, of all layers together"
    def zero(m):
        weights = [(o,'weight') for o in m.modules() if isinstance(o, types)]
        prune.global_unstructured(weights, prune.L1Unstructured, amount=.5)
    return afresh(lambda: deepcopy(model), prune=zero)

def n_weights(model): return f'{sum(p.numel() for p in model.parameters() if p.dim()>1):,} weights'

def one_shot(device, small):
    "Half of the weights of a network at once"
    make,types = tiny if small else vgg16_bn,(nn.Conv2d,nn.Linear)
    model = network(make, device)
    yield row(f'one shot: global 50 % of {make.__name__}, float32', lambda: zeroed(model, types, 'weight', 'global'),
              lambda: zeroed_by_torch(model, types), 'torch.nn.utils.prune', n_weights(model))

def large(device, small):
    "The same of a billion weights, and a pattern of them"
    n,width = (2,64) if small else (16,8192)
    torch.manual_seed(0)
    def linear(): return nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16)
    model = nn.Sequential(*(linear() for _ in range(n)))
    yield row('large: global 50 %, bfloat16', lambda: zeroed(model, nn.Linear, 'weight', 'global'),
              lambda: zeroed_by_torch(model, nn.Linear), 'torch.nn.utils.prune', n_weights(model))
    @torch.no_grad()
    def read():
        for p in model.parameters(): p.sum()
    yield row('large: 2:4, bfloat16', lambda: zeroed(model, nn.Linear, '2:4', 'local'),
              lambda: timed(read), 'one read', n_weights(model))

def callbacks(n):
    "What makes the callbacks that are measured, by name; masks are renewed `n` times"
    def sparsify(granularity='weight', context='local', criteria='large_final', n_updates=n, **kwargs):
        return SparsifyCallback(50, granularity, context, criteria, 'one_cycle', n_updates=n_updates, **kwargs)
    return {'weight/local': sparsify,
            'weight/local, default `n_updates`': partial(sparsify, n_updates=None),
            'weight/global': partial(sparsify, context='global'),
            'weight/local/movement': partial(sparsify, criteria='movement'),
            'filter/local, coupled': partial(sparsify, 'filter', coupled=True),
            '`KMeansCallback(4)`': partial(KMeansCallback, 4),
            "`RegularizationCallback('filter')`": partial(RegularizationCallback, 'filter'),
            "`RegularizeCallback('group_lasso', 'filter')`": partial(RegularizeCallback, 'group_lasso', 'filter')}

def compared(what, ours, beside, name):
    "A row of two lists of steps, of which the first do not count; the ratio of their means is noted"
    ours,beside = ours[WARM_STEPS:],beside[WARM_STEPS:]
    means = statistics.mean(ours),statistics.mean(beside)
    note = f'means {number(1e3*means[0])} beside {number(1e3*means[1])} ms = ×{means[0]/means[1]:.3g}'
    return row(what, Times(ours), Times(beside), name, note)

def setting_a(small):
    model,n_images,px = (squeezenet1_1,4,32) if small else (resnet18,32,64)
    return dict(model=model, n_images=n_images, px=px)

def setting_b(small):
    model,n_images,px = (squeezenet1_1,2,32) if small else (resnet50,64,224)
    return dict(model=model, n_images=n_images, px=px, layout=torch.channels_last)

def told_setting(model, n_images, px, layout=None):
    return f'{model.__name__}, {n_images} images of {px} px{", channels_last" if layout else ""}'

def steps(device, small):
    "Training steps with masks renewed at each, beside the same without a callback"
    for setting,n in ((setting_a(small), 120), (setting_b(small), 40)):
        n = WARM_STEPS+3 if small else n
        for name,make in callbacks(n).items():
            times = told(lambda: with_and_without(make(), n, now, device=device, **setting))
            what = f'step of {told_setting(**setting)}: {name}'
            yield row(what, times) if isinstance(times, str) else compared(what, *times, 'without')

def distill(device, small):
    "A step with a teacher, beside the student's step and the teacher's forward pass"
    n,setting = WARM_STEPS+3 if small else 60,setting_a(small)
    ours,student,teacher = in_turn(sides(n, HOW['logits'], device=device, **setting), n, now)
    both = [a+b for a,b in zip(student, teacher)]
    what = f'distillation step, resnet34 to {told_setting(**setting)}'
    yield compared(what, ours, both, "student's step + teacher's forward")

def graph(device, small):
    "Which channels are the same channel"
    make,px = (resnet18,64) if small else (resnet50,224)
    model,x,what = network(make, device),torch.randn(1, 3, px, px, device=device),f'`ChannelGraph` of {make.__name__}'
    def theirs():
        if find_spec('torch_pruning') is None: raise ModuleNotFoundError('torch-pruning is not installed')
        import torch_pruning as tp
        return timed(lambda: tp.DependencyGraph().build_dependency(model, x))
    ours = told(lambda: timed(lambda: ChannelGraph(model, x)))
    with torch.inference_mode(): forward = timed(lambda: model(x))
    yield row(what, ours, forward, 'a forward')
    yield row(what, ours, theirs, 'torch-pruning')

def file(device, small):
    "A compressed file of shared values, beside `torch.save`"
    make = mobilenet_v3_small if small else resnet50
    model,quantize = network(make, device),KMeansQuantizer(4).quantize
    yield row(f'16 shared values a layer of {make.__name__}', lambda: timed(lambda: quantize(deepcopy(model)), 2, warm=0))
    quantize(model)
    with tempfile.TemporaryDirectory() as d:
        small_file,plain = os.path.join(d, 'small'),os.path.join(d, 'plain')
        saved = told(lambda: timed(lambda: save_compressed(model, small_file), 2, warm=0))
        theirs = timed(lambda: torch.save(model.state_dict(), plain), 2, warm=0)
        sizes = [f'{os.path.getsize(o)/1e6:.3g}' if os.path.exists(o) else 'no' for o in (small_file, plain)]
        yield row('`save_compressed` of it', saved, theirs, '`torch.save`', f'{" beside ".join(sizes)} MB')
        yield row('`load_compressed`', lambda: timed(lambda: load_compressed(small_file, model), 2, warm=0),
                  lambda: timed(lambda: model.load_state_dict(torch.load(plain)), 2, warm=0), '`torch.load`')

def graphed(model, x):
    "A replay of one captured forward"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): model(x)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured): model(x)
    return captured.replay

def compiled(model, x):
    torch.compiler.reset()
    return partial(torch.compile(model), x)

MODES = {'plain':partial, 'CUDA graph':graphed, '`torch.compile`':compiled}

def latency(stage, mode, dtype, x):
    "`Times` of a forward of a copy of `stage`"
    model,x = deepcopy(stage).to(dtype),x.to(dtype)
    with torch.inference_mode(): return timed(MODES[mode](model, x), 30, warm=10)

def walk(device, small):
    "The stages of the walkthrough, each beside the dense network"
    network_of,most,px = (tiny,4,32) if small else (vgg16_bn,64,224)
    torch.manual_seed(0)
    x = torch.randn(most, 3, px, px, device=device)
    def thinner(model):
        model = deepcopy(model)
        Sparsifier(model, 'filter', 'local', example_inputs=x[:1]).sparsify_model(40)
        return Pruner(progress=False).prune_model(model, x[:1])
    makers = dict(pruned=thinner, folded=lambda m: BN_Folder().fold(m, x[:1]),
                  decomposed=lambda m: FC_Decomposer().decompose(m, percent_removed=.5, example_inputs=x[:1]))
    stages = dict(dense=network(network_of, device, num_classes=10))
    for name,make in makers.items():
        def made():
            start = now()
            stages[name] = make(list(stages.values())[-1])
            return Times([now()-start])
        took = told(made)
        note = f'{sum(p.numel() for p in stages[name].parameters()):,} parameters' if name in stages else ''
        yield row(f'walkthrough, {network_of.__name__}: making of {name}', took, note=note)
    cuda,last = torch.device(device).type=='cuda',list(stages)[-1]
    for dtype in (torch.float32, torch.float16):
        for n in (1, most):
            for mode in MODES:
                if mode=='CUDA graph' and not cuda: continue
                once = mode=='`torch.compile`'
                if once and (n>1 or dtype!=torch.float16): continue
                dense = told(lambda: latency(stages['dense'], mode, dtype, x[:n]))
                for name in ([last] if once else list(stages)[1:]):
                    what = f'walkthrough, {n} image{"s"*(n>1)}, {str(dtype)[6:]}, {mode}: {name}'
                    yield row(what, lambda: latency(stages[name], mode, dtype, x[:n]), dense, 'dense')
    missing = [f'`torch.compile` but for dense and {last} at 1 image, float16']
    if not cuda: missing.append('CUDA graphs (no GPU)')
    yield row('walkthrough, not run', '; '.join(missing))

def selection(device, small):
    "Half of some scores, beside what torch has for it"
    for n in (10_000, 200_000) if small else (11_000_000, 138_000_000):
        torch.manual_seed(0)
        scores = torch.randn(n, device=device).abs()
        def by(f): return told(lambda: afresh(lambda: scores, f=f))
        ours,what = by(lambda s: select([Scores(s)], 0, n//2)),f'selection: half of {n:,} scores'
        yield row(what, ours, by(lambda s: s.topk(n//2, sorted=False)), '`torch.topk`')
        yield row(what, ours, by(torch.sort), '`torch.sort`')

SECTIONS = {o.__name__:o for o in (one_shot, large, steps, distill, graph, file, selection, walk)}

def rows_of(name, device, small):
    "Rows of a section; an error that ends it is its last"
    rows = SECTIONS[name](device, small)
    while True:
        o = told(lambda: next(rows, None))
        if o is None: return
        if isinstance(o, str):
            yield row(name, o)
            return
        yield o

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--small', action='store_true', help='tiny sizes, to see that the script runs')
    parser.add_argument('--only', default=','.join(SECTIONS), help='sections to run, with commas between: %(default)s')
    parser.add_argument('--json', help='file for the raw numbers')
    args = parser.parse_args()
    names = args.only.split(',')
    unknown = ', '.join(o for o in names if o not in SECTIONS)
    if unknown: parser.error(f'no section {unknown}; there are {", ".join(SECTIONS)}')
    cuda = torch.device(args.device).type=='cuda'
    if cuda: torch.cuda.init()
    card = torch.cuda.get_device_name() if cuda else f'{platform.machine()}, {torch.get_num_threads()} threads'
    start,rows = now(),[]
    warning = ' (small stand-ins: these figures mean nothing)' if args.small else ''
    print(f'{card}, torch {torch.__version__}{warning}\n')
    print('| | ours | beside | ours ÷ beside | |\n|---|---|---|---|---|', flush=True)
    for name in names:
        for o in rows_of(name, args.device, args.small):
            print(line(o), flush=True)
            rows.append(dict(section=name, **{k:asdict(v) if isinstance(v, Times) else v for k,v in o.items()}))
        if not args.json: continue
        found = dict(card=card, torch=torch.__version__, small=args.small, rows=rows)
        with open(args.json, 'w') as f: json.dump(found, f, indent=1)
    print(f'\n{now()-start:.0f} s in all')

if __name__=='__main__': main()
