"""Run the core of the tests on the oldest releases that `settings.ini` allows and on the newest that pip finds: `python tools/matrix.py [oldest] [newest]`, or `make matrix`

Each has a virtual environment of its own, of some gigabytes, in `--folder`: named by a hash of what was asked for, it is made once and used again.
The oldest: the lower bound of each requirement, on the oldest Python. What these require in turn, and the tools of the tests, are the newest that fit."""
import argparse,hashlib,json,os,re,shutil,subprocess,sys,time
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = '''house graph spellings brought surgery exact pruner pruner_unseen pruner_random prune_callback callback resume doors threads folding decompose distill regularize weight_sharing codecs compressed_file repair obs_data admm blocks targets zoo'''.split()
NOTEBOOKS,KERNELS = 'nbs/core','15_kernels'
TOOLS = 'pytest hypothesis nbdev'.split()
SHOWN = 'torch torchvision fastai safetensors constriction tensorly numpy'.split()

def settings():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def lines(text): return [o for o in text.split('\n') if o]
def name_of(requirement): return re.match(r'[\w.-]+', requirement)[0]

def oldest(requirement):
    "`requirement` with its lower bound as the only version"
    bound = re.search(r'>=\s*([\w.]+)', requirement)
    if not bound: raise ValueError(f'{requirement} has no lower bound: what is the oldest release that is meant?')
    return f'{name_of(requirement)}=={bound[1]}'

def asked(release):
    "What to install for `release`"
    have = settings()
    requirements = lines(have['requirements'])
    if release=='oldest': requirements = [oldest(o) for o in requirements]
    return requirements + [o for o in lines(have['dev_requirements']) if name_of(o) in TOOLS]

def runs(python):
    "Does the command `python` start? (pyenv has commands that only say that they are not there)"
    return python and subprocess.run([python, '-c', ''], capture_output=True).returncode==0

def python_for(release):
    "The interpreter of `release`: the oldest that the package allows, or this one"
    if release!='oldest': return sys.executable
    version = settings()['min_python']
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home()/'.pyenv'))/'versions'
    found = [shutil.which(f'python{version}'), *map(str, sorted(pyenv.glob(f'{version}.*/bin/python')))]
    for o in found:
        if runs(o): return o
    raise SystemExit(f'Python {version}, the oldest that settings.ini allows, is not on the PATH: install it, or name it with --python')

def newest(python, requirements, pip_args):
    "The newest releases of `requirements` that pip finds; together they need not fit"
    pip = [python, '-m', 'pip', 'install', '-qq', '--dry-run', '--ignore-installed', '--no-deps', '--report', '-']
    report = subprocess.run([*pip, *pip_args, *requirements], stdout=subprocess.PIPE, text=True, check=True).stdout
    return [f"{o['metadata']['name']}=={o['metadata']['version']}" for o in json.loads(report)['install']]

def environment(python, requirements, key, folder, pip_args, sees=None): # Sees: a folder of packages that it finds as well, after its own
    "A virtual environment with `requirements`; an existing one of the same `key` is used again"
    said = '\n'.join([python, *key, *([sees] if sees else [])])
    venv = folder/f'fasterai-matrix-{hashlib.sha1(said.encode()).hexdigest()[:12]}'
    if not (venv/'.made').exists():
        subprocess.run([python, '-m', 'venv', '--clear', venv], check=True)
        if sees: (next(venv.glob('lib/python*/site-packages'))/'seen.pth').write_text(f'{sees}\n')
        if requirements: subprocess.run([venv/'bin'/'pip', 'install', '-qq', *pip_args, *requirements], check=True)
        (venv/'.made').write_text(said)
    return venv

def versions(venv):
    "The Python and the packages in `venv`"
    code = f'import platform,importlib.metadata as m; print("Python", platform.python_version(), *(f", {{o}} {{m.version(o)}}" for o in {SHOWN}))'
    return subprocess.run([venv/'bin'/'python', '-c', code], capture_output=True, text=True, check=True).stdout.strip().replace(' ,', ',')

def has_kernels(venv):
    "Is Triton in `venv` one that the kernels run with?"
    code = 'from fasterai.core.pool import _triton; print(_triton())'
    return subprocess.run([venv/'bin'/'python', '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()=='True'

def run(venv, command, log):
    "Whether `command` succeeds in `venv`, and its output, which goes to the end of `log` as well"
    env = {**os.environ, 'PATH':f'{venv/"bin"}:{os.environ["PATH"]}', 'PYTHONPATH':str(ROOT), 'OMP_NUM_THREADS':'1', 'VIRTUAL_ENV':str(venv)}
    done = subprocess.run([venv/'bin'/command[0], *command[1:]], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    with open(log, 'a') as f: f.write(done.stdout)
    ended = [f'ended by signal {-done.returncode}'] if done.returncode<0 else []
    return done.returncode==0, done.stdout.splitlines()+ended

def one(release, a):
    "Whether all succeeds on `release`; a line is printed for each part that is run, in a process of its own, and for each failure"
    python = a.python if a.python and release=='oldest' else python_for(release)
    requirements = asked(release)
    key = newest(python, requirements, a.pip_args) if release=='newest' else requirements
    venv = environment(python, requirements, key, a.folder, a.pip_args)
    log = venv/'matrix.log'
    log.write_text('')
    print(f'{release}: {versions(venv)}; all output in {log}', flush=True)
    pytest = ['pytest', '-q', '-p', 'no:cacheprovider']
    parts = {o:[*pytest, f'tests/test_{o}.py'] for o in a.tests or TESTS}
    if not a.tests:
        parts[NOTEBOOKS] = ['nbdev-test', NOTEBOOKS, '--n-workers', '0']
        if not has_kernels(venv):
            print(f'{release} {NOTEBOOKS}: without {KERNELS}, which need a newer Triton', flush=True)
            parts[NOTEBOOKS] += ['--skip-file-re', KERNELS]
    good = True
    for name,command in parts.items():
        start = time.time()
        ok,said = run(venv, command, log)
        failed = [] if ok else [o for o in said if re.match(r'(FAILED|ERROR|ended by) ', o)] or said[-20:]
        print('\n    '.join([f'{release} {name}: {"ok" if ok else "FAILED"} in {time.time()-start:.0f} s: {said[-1].strip("= ") if said else ""}', *failed]), flush=True)
        good &= ok
    return good

if __name__=='__main__':
    a = argparse.ArgumentParser()
    a.add_argument('releases', nargs='*', default=['oldest','newest'], choices=['oldest','newest'])
    a.add_argument('--folder', type=Path, default=Path(os.environ.get('XDG_CACHE_HOME', Path.home()/'.cache')), help='where the environments are')
    a.add_argument('--python', help='the oldest Python that settings.ini allows, if it is not found')
    a.add_argument('--tests', nargs='+', help='these test modules instead, as in `graph exact`')
    a.add_argument('--workers', type=int, default=1, help='releases at a time')
    a.add_argument('--pip-args', type=str.split, default=[], help='more options for pip')
    a = a.parse_args()
    with ThreadPoolExecutor(a.workers) as ex: good = list(ex.map(lambda o: one(o, a), a.releases))
    sys.exit(not all(good))
