"""The house's own rules: who may import whom, what importing costs, what a star import brings, and a few words that the library does not use.

They are read off the source, so a module that breaks one fails here before it does anywhere else; a module that no rule covers fails as well."""
import ast, builtins, collections, fnmatch, functools, inspect, itertools, keyword, math, operator, random, statistics, subprocess, sys
from pathlib import Path
import pytest, torch
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parent.parent
LIB = ROOT/'fasterai'
FILES = {p.relative_to(LIB).as_posix(): ast.parse(p.read_text(encoding='utf-8')) for p in sorted(LIB.rglob('*.py'))}

# The first row that fits holds. Of ours: rooms that may be imported (a room may always use itself). Of others: packages beside the standard library
RULES = [  # module                  ours                              others
    ('_modidx.py',                  '',                               ''),
    ('*__init__.py',                '',                               ''),
    ('misc/all.py',                 'core legacy export',             ''),
    ('*/all.py',                    'core legacy',                    ''),
    ('legacy.py',                   'core',                           'torch'),
    ('core/kernels.py',             '',                               'torch numpy triton'),
    ('core/schedule.py',            '',                               'numpy matplotlib'),  # to draw one
    ('core/*',                      '',                               'torch numpy fastprogress'),
    ('*callback*.py',               'core legacy callback',           'torch numpy fastai fastcore safetensors'),
    ('report/*',                    'core analyze export',                 'torch numpy pandas matplotlib'),
    ('analyze/*',                   'core sparse prune quantize report legacy', 'torch numpy pandas'),
    ('ship.py',                       'core analyze prune misc repair export report', 'torch numpy pandas'),
    ('lightning.py',                'core sparse prune distill regularize quantize repair', 'torch lightning pytorch_lightning'),
    ('transformers.py',             'core sparse prune distill regularize quantize repair', 'torch transformers safetensors'),
    ('export/*',                    'core analyze legacy',            'torch numpy pandas onnx onnxruntime onnxscript openvino'),
    ('misc/*',                      'core legacy repair',             'torch numpy tensorly'),
    ('quantize/int8.py',            'core legacy analyze',            'torch pandas'),
    ('quantize/compress.py',        'core repair',                    'torch pandas'),
    ('quantize/*',                  'core legacy',                    'torch numpy pandas torchao safetensors constriction'),
    ('repair/*',                    'core',                           'torch pandas'),
    ('prune/*',                     'core legacy repair analyze',     'torch numpy pandas safetensors'),
    ('sparse/*',                    'core legacy repair',             'torch numpy pandas safetensors'),
    *((f'{o}/*',                    'core legacy',                    'torch numpy pandas safetensors') for o in ('distill','regularize'))]

def rule(path): return next(((ours.split(), others.split()) for pat,ours,others in RULES if fnmatch.fnmatch(path, pat)), None)

def imported(path, tree):
    "Full names of what a module imports, wherever in it"
    package = ['fasterai',*Path(path).parent.parts]
    for o in ast.walk(tree):
        if isinstance(o, ast.Import): yield from (a.name for a in o.names)
        elif isinstance(o, ast.ImportFrom): yield '.'.join((package[:len(package)-o.level+1] if o.level else [])+([o.module] if o.module else []))

@pytest.mark.parametrize('path', FILES)
def test_imports(path):
    assert rule(path), f'no row of RULES covers {path}'
    ours,others = rule(path)
    room = Path(path).parts[0] if '/' in path else None
    for name in imported(path, FILES[path]):
        top,*rest = name.split('.')
        if top=='fasterai': assert rest and rest[0] in (*ours, room), f'{path} may not import {name}'
        else: assert top in sys.stdlib_module_names or top in others, f'{path} may not import {name}'

def test_rules_notice_a_breach():
    "The test above would fail on what it is for"
    assert rule('attic/x.py') is None and 'fastai' not in rule('sparse/sparsifier.py')[1] and 'matplotlib' not in rule('sparse/sparsify_callback.py')[1] and rule('core/graph.py')[0]==[]
    assert list(imported('core/x.py', ast.parse('from .y import z\nfrom ..sparse.w import v\ndef f(): import fastai.basics')))==['fasterai.core.y','fasterai.sparse.w','fastai.basics']

@pytest.mark.parametrize('module', ['fasterai.core.all','fasterai.sparse.sparsifier','fasterai.distill.distiller','fasterai.misc.all','fasterai.legacy'])
def test_import_is_light(module):
    "In a fresh process, no framework and no plotting comes along"
    code = f'import sys, {module}; print(*sorted({{o.split(".")[0] for o in sys.modules}} & {{"fastai","fastcore","matplotlib","pandas","torchvision","lightning","safetensors","tensorly"}}))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()==''

STARS = [f'fasterai.{p.parent.name}.all' for p in sorted(LIB.glob('*/all.py'))]
HABITS = {*keyword.kwlist, *keyword.softkwlist, 'torch','nn','F','np','numpy','pd','pandas','plt','Tensor','tensor','Path','partial','L','learn','model','dls'}
PYTHON = [builtins, math, random, functools, itertools, operator, collections, statistics, torch, torch.nn, torch.nn.functional]
MOST = 70 # names that a star import may bring

def star(module):
    "What `from module import *` brings"
    ns = {}
    exec(f'from {module} import *', ns)
    return {k:v for k,v in ns.items() if k!='__builtins__'}

@pytest.fixture(scope='module')
def theirs():
    "What a user of Python, torch and fastai may have, by name: all the values that go by it"
    found = {}
    for ns in [*(vars(m) for m in PYTHON), *(star(f'fastai.{o}.all') for o in ('vision','tabular','text')), star('fastai.collab')]:
        for k,v in ns.items(): found.setdefault(k, []).append(v)
    return found

@pytest.mark.parametrize('module', STARS)
def test_star_import_rebinds_nothing(module, theirs):
    "What a user has from Python, torch, fastai and by habit survives `from … import *`"
    got = star(module)
    taken = sorted(k for k,v in got.items() if k in HABITS or k in sys.stdlib_module_names or any(v is not o for o in theirs.get(k, [])))
    assert got and not taken, f'{module} rebinds {taken}'
    assert not [k for k,v in got.items() if isinstance(v, type(math))], 'a module came along'

def test_cosine_survives():
    "The name that was lost most often: `cos` is a function of math, and a schedule by its name"
    ns = {}
    exec('from math import *\n' + ''.join(f'from {o} import *\n' for o in STARS), ns)
    assert ns['cos'](.5)==math.cos(.5) and ns['Schedule'] and str(ns['schedules']['cos'])=='cos'

@pytest.mark.parametrize('module', STARS)
def test_star_import_is_listed(module):
    "An `all.py` names what it brings, or takes the list of core: no more than a reader can take in, and nothing private"
    path = module.removeprefix('fasterai.').replace('.', '/')+'.py'
    stars = [o.module for o in ast.walk(FILES[path]) if isinstance(o, ast.ImportFrom) and any(a.name=='*' for a in o.names)]
    assert set(stars)<={'core.all'}, f'{path} brings whatever is in {stars}'
    names = star(module)
    assert len(names)<=MOST and not [k for k in names if k.startswith('_')], len(names)

MAKERS = {o.__name__ for o in _device_constructors()} | {'Generator'}  # of these, a default device decides

def told_where(call):
    "Does a call that makes a tensor, or a layer, say on which device?"
    module,name = ast.unparse(call.func.value),call.func.attr
    made = module=='torch' and name in MAKERS
    if module=='nn' and hasattr(torch.nn, name): made = 'device' in inspect.signature(getattr(torch.nn, name)).parameters
    return not made or any(k.arg=='device' for k in call.keywords)

@pytest.mark.parametrize('path', FILES)
def test_devices_are_told(path):
    "`torch.set_default_device` of the user decides nothing of ours"
    calls = [o for o in ast.walk(FILES[path]) if isinstance(o, ast.Call) and isinstance(o.func, ast.Attribute)]
    assert not [f'{path}:{o.lineno}' for o in calls if not told_where(o)]

def test_devices_notice_a_breach():
    told = lambda text: told_where(ast.parse(text, mode='eval').body)
    for o in ('torch.zeros(3)','torch.full([n], -1)','torch.Generator()','nn.Linear(3, 4)','nn.Conv2d(3, 4, 1)'): assert not told(o)
    for o in ('torch.zeros(3, device=d)','x.new_zeros(3)','torch.zeros_like(x)','nn.Identity()','nn.ReLU()',"nn.Linear(3, 4, device='cpu')"): assert told(o)

def functions(tree): return {id(o):f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for o in ast.walk(f)}

@pytest.mark.parametrize('path', FILES)
def test_words_not_used(path):
    "Nothing is printed but by `print_…`, no exception is swallowed unseen, no device is assumed, no clock and no unseeded global state decides"
    tree = FILES[path]
    inside = functions(tree)
    for o in ast.walk(tree):
        if isinstance(o, ast.Call) and isinstance(o.func, ast.Name) and o.func.id=='print': assert inside.get(id(o), '').startswith('print_'), f'{path}:{o.lineno}'
        if isinstance(o, ast.ExceptHandler):
            names = [getattr(t, 'id', getattr(t, 'attr', None)) for t in (t.value if isinstance(t, ast.Starred) else t for t in (o.type.elts if isinstance(o.type, ast.Tuple) else [o.type]))]
            assert not {None,'Exception','BaseException'} & set(names), f'{path}:{o.lineno} catches everything'
        if isinstance(o, ast.Call) and isinstance(o.func, ast.Attribute): assert o.func.attr not in ('cuda','manual_seed','seed') or 'enerator' in ast.unparse(o.func.value), f'{path}:{o.lineno}'
        if isinstance(o, ast.Global): raise AssertionError(f'{path}:{o.lineno} has a global')

def unused(tree):
    "Names that a module imports and does not use. What `__all__` lists is for others; an import inside a function may be for what it does"
    names = {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)}|{o.value for o in ast.walk(tree) if isinstance(o, ast.Constant)}
    imports = [o for o in tree.body if isinstance(o, (ast.Import,ast.ImportFrom))]
    return [k for o in imports for a in o.names if (k := (a.asname or a.name).partition('.')[0]) not in names|{'*'}]

@pytest.mark.parametrize('path', [o for o in FILES if not o.endswith(('all.py','__init__.py','_modidx.py'))])
def test_imports_are_used(path): assert not unused(FILES[path])

def test_unused_notice_a_breach():
    assert unused(ast.parse('import math,os.path\nfrom x import y,z\ny(os)'))==['math','z']

def twice(tree):
    "Functions, classes and methods that are defined twice in one place, as after a merge: the first of them is dead"
    bodies = [tree.body, *(o.body for o in ast.walk(tree) if isinstance(o, ast.ClassDef))]
    named = lambda o: isinstance(o, (ast.FunctionDef,ast.ClassDef)) and not any('setter' in ast.unparse(d) for d in o.decorator_list)
    names = [[o.name for o in body if named(o)] for body in bodies]
    return [k for found in names for k in sorted({*found}) if found.count(k)>1]

@pytest.mark.parametrize('path', FILES)
def test_defined_once(path): assert not twice(FILES[path])

def test_twice_notices_a_breach():
    assert twice(ast.parse('def f(): 1\nclass A:\n    def g(self): 1\n    def g(self): 2\ndef f(): 2'))==['f','g']

@pytest.mark.parametrize('path', FILES)
def test_articles(path):
    "Names of types have the article that fits to them, whatever they are: `an` finds it"
    pairs = [(o.lineno,a,b) for o in ast.walk(FILES[path]) if isinstance(o, ast.JoinedStr) for a,b in zip(o.values, o.values[1:]) if isinstance(a, ast.Constant)]
    assert not [n for n,a,b in pairs if f' {a.value}'.endswith((' a ',' an ')) and ast.unparse(b.value).endswith('.__name__')]
