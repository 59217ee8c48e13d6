"""Other libraries beside this one, in one run: `python benchmarks/peers/run.py [MEASURE ...]`, or `make peers`

Each library has an environment of its own under build/peers, which finds PyTorch and all else where the interpreter of this run has it, as far as versions fit. Libraries take turns, a process for each case.
Results are kept in build/peers, and a run goes on where the last one stopped; the page is made of them."""
import argparse, json, os, resource, signal, subprocess, sys, sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT,SCRIPTS = HERE.parent.parent,HERE
sys.path += [str(HERE),str(ROOT/'tools')]
from matrix import environment
from page import OURS, page
from rows import told, without_folders

FOLDER,PAGE,THREADS = ROOT/'build'/'peers',HERE/'README.md',2
PATIENCE = 10  # how many times longer than its time of the processor a process may take, on a busy machine

@dataclass(frozen=True)
class Library:
    needs:tuple|None=() # What pip installs; None: the interpreter of this run
    only:str=''         # The measure that it is there for; by default all
    ours:bool=False     # Does it see the library of this checkout?

LIBRARIES = {OURS:Library(ours=True), 'fasterai 0.4.1':Library(('fasterai==0.4.1',)), 'torch-pruning':Library(('torch-pruning==1.6.1',)), 'torch-simplify':Library(('torch-simplify==1.1.4',)),
    'torch.nn.utils.prune':Library(), 'scikit-learn':Library(('scikit-learn',), 'kmeans'), 'xz':Library(only='size', ours=True)}

@dataclass(frozen=True)
class Measure:
    cases:tuple       # What its script is called with, a process for each
    rounds:int=1      # How often: several where time is measured
    seconds:int=300   # Of the processor, that a process may take
    workers:int=1     # Processes at a time, of one thread if these are several

GRAPHS = 'resnet18 resnet50 mobilenet_v2 densenet121 shufflenet_v2_x1_0 convnext_tiny vit_b_16 swin_t'
NETWORKS = ('alexnet vgg11_bn resnet18 resnext50_32x4d densenet121 googlenet inception_v3','mnasnet0_5 mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_y_400mf shufflenet_v2_x0_5 squeezenet1_0',
    'convnext_tiny vit_b_16 swin_t swin_v2_t maxvit_t')
MEASURES = {
    'exact': Measure(('resnet18','a layer'), workers=2),
    'one_shot': Measure(('vgg16_bn',), rounds=3),
    'step': Measure(('weight, local','weight, global','weight, local, movement','zeros are held'), rounds=2),
    'networks': Measure(NETWORKS, seconds=900, workers=2),
    'graph': Measure((GRAPHS,), rounds=2),
    'latency': Measure(('resnet18 resnet50 mobilenet_v2 vgg16_bn',), rounds=2),
    'size': Measure(('90 % zero','90 % zero, 32 values a layer','half of the channels'), workers=2),
    'distill': Measure(('logits',), rounds=2),
    'kmeans': Measure(('64 clusters',), rounds=3)}

def jobs(measures):
    "What is to be run, in order: measure, round, case and library, so that libraries take turns"
    for m in measures:
        for i in range(MEASURES[m].rounds):
            for case in MEASURES[m].cases:
                yield from ((m,i,case,o) for o,library in LIBRARIES.items() if library.only in ('',m))

def ending(said): # What a process wrote to its standard error
    "The first line of the exception that ended a process"
    lines = said.strip().splitlines()
    frames = [i for i,o in enumerate(lines) if o.startswith('  ')]
    return without_folders((lines[frames[-1]+1:] if frames else lines[-1:] or [''])[0])

def run(python, job, threads): # Interpreter of the library's environment
    "The rows of a job; what ends it is a row as well"
    measure,_,case,library = job
    path = [HERE,HERE.parent,ROOT/'tools',*([ROOT] if LIBRARIES[library].ours else [])]
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join(map(str, path)), 'OMP_NUM_THREADS':str(threads)}
    command = [python, '-W', 'ignore', SCRIPTS/f'{measure}.py', library, case]
    seconds,why = MEASURES[measure].seconds,None
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors='replace') as process:
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (seconds,seconds+1))
        try: out,said = process.communicate(timeout=PATIENCE*seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            (out,said),why = process.communicate(),f'over {seconds} s'
    code = process.returncode
    if code==-signal.SIGXCPU: why = f'over {seconds} s'
    elif code and not why: why = f'ended by signal {-code}' if code<0 else ending(said)
    return told(out)+([dict(library=library, measure=measure, case=case, error=why)] if why else [])

def python_of(library, folder, pip_args):
    "The interpreter of a library, whose environment is made if it is not there"
    if library.needs is None: return sys.executable
    return environment(sys.executable, library.needs, library.needs, folder, pip_args, sysconfig.get_path('purelib'))/'bin'/'python'

def stored(path):
    "Rows by job, of a file of results"
    if not path.exists(): return {}
    return {tuple(o['job']):o['rows'] for o in map(json.loads, path.read_text(encoding='utf-8').splitlines())}

def lacks(found, measure, library):
    "Has a process said that the library has no way at all?"
    return any('why' in r and r['case'] is None for (m,_,_,o),rows in list(found.items()) if (m,o)==(measure,library) for r in rows)

def turns():
    "The jobs of each turn, in which every library has the same case"
    found = {}
    for job in jobs(MEASURES): found.setdefault(job[:3], []).append(job)
    return found

def whole(found): return {k for k,o in turns().items() if all(job in found for job in o)}

def all_rows(found):
    "The rows of turns that every library has had: where one was not tried, nothing can be compared"
    return [r for k,o in turns().items() if k in whole(found) for job in o for r in found[job]]

def missing(found):
    "Cases that are not measured in any whole turn, by measure"
    there = {(m,case) for m,_,case in whole(found)}
    return {m:cases for m,o in MEASURES.items() if (cases := [c for c in o.cases if (m,c) not in there])}

def run_all(measures, folder, pip_args=(), again=False):
    "Run what has no result yet, and give all results by job"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder/'results.jsonl'
    found = stored(path)
    if again: found = {k:v for k,v in found.items() if k[0] not in measures}
    path.write_text(''.join(json.dumps(dict(job=k, rows=v))+'\n' for k,v in found.items()), encoding='utf-8')
    pythons,unmade = {},{}
    for name in {o[3]:None for o in jobs(measures) if o not in found}:
        try: pythons[name] = python_of(LIBRARIES[name], folder, pip_args)
        except subprocess.CalledProcessError: unmade[name] = 'pip cannot make its environment'
    for m in measures:
        todo = [o for o in jobs([m]) if o not in found]
        def one(job):
            if job[3] in unmade: found[job] = [dict(library=job[3], measure=m, case=job[2], error=unmade[job[3]])]
            elif lacks(found, m, job[3]): found[job] = []
            else: found[job] = run(pythons[job[3]], job, THREADS if MEASURES[m].workers==1 else 1)
            return job
        with ThreadPoolExecutor(MEASURES[m].workers) as ex:
            for job in ex.map(one, todo):
                for r in found[job]: print(r, flush=True)
                if job[3] in unmade: continue
                with path.open('a', encoding='utf-8') as f: f.write(json.dumps(dict(job=job, rows=found[job]))+'\n')
    return found

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('measures', nargs='*', help=f'{", ".join(MEASURES)}; by default all')
    a.add_argument('--again', action='store_true', help='measure them once more')
    a.add_argument('--folder', type=Path, default=FOLDER, help='where environments and results are')
    a.add_argument('--pip-args', type=str.split, default=[], help='more options for pip')
    a = a.parse_args()
    if unknown := set(a.measures)-set(MEASURES): raise SystemExit(f'{", ".join(unknown)}: no measure of these; there are {", ".join(MEASURES)}')
    found = run_all(a.measures or list(MEASURES), a.folder, a.pip_args, a.again)
    PAGE.write_text(page(all_rows(found), list(LIBRARIES), THREADS, missing(found)), encoding='utf-8')

if __name__=='__main__': main()
