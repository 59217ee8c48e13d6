"""The tutorials, as a reader would run them: cells copied from the built pages, in an empty folder, with the wheel installed and no repository.

The README's Python blocks are run in the same way. Training that would take long is cut short by replacing lines that the page shows (`SHORTER`)."""
import importlib.util, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [p.stem for p in sorted((ROOT/'nbs/tutorials').glob('[!_.]*.ipynb'))]
NEEDS = {'13_yolo': 'ultralytics'}  # a package that is none of ours, by page: the page runs where that is installed
SHORTER = {'02_walkthrough': {'side = 224': 'side = 64'},
    '03_distill': {'SEEDS = range(6)': 'SEEDS = range(2)', 'many,epochs = len(x),4': 'many,epochs = len(x),1'},
    '15_images': {'epochs = 3': 'epochs = 1'}}  # line as shown: line in its place
PACKAGED = 'fasterai','setup.py','settings.ini','pyproject.toml','MANIFEST.in','README.md','LICENSE'

RUN = '''
"Run the cells of a page one after the other, and show the last value of each, as a notebook does"
import ast, json, sys, traceback
from pathlib import Path
site,root,page = map(Path, sys.argv[1:4])
above = lambda o: (Path(o),*Path(o).parents)
sys.path[:] = [o for o in sys.path if not o or root not in above(o) or Path(sys.prefix) in above(o)]  # the environment may be inside of the repository
sys.meta_path[:] = [o for o in sys.meta_path if '__editable__' not in getattr(o, '__module__', type(o).__module__)]
ns = dict(__name__='__main__')
exec('import fasterai', ns)
assert site in Path(ns['fasterai'].__file__).parents, ns['fasterai'].__file__
for i,cell in enumerate(json.loads(page.read_text(encoding='utf-8'))):
    body = ast.parse(cell).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    try:
        exec(compile(ast.Module(body, []), f'cell {i}', 'exec'), ns)
        value = None if last is None else eval(compile(ast.Expression(last.value), f'cell {i}', 'eval'), ns)
        if value is not None:
            if hasattr(value, '_repr_html_'): value._repr_html_()
            print(repr(value))
    except Exception: sys.exit(f'{traceback.format_exc()}\\nin the cell\\n\\n{cell}')
'''

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "A folder with what the wheel holds"
    source,out = (tmp_path_factory.mktemp(o) for o in ('source','site'))
    for o in PACKAGED:
        if (ROOT/o).is_dir(): shutil.copytree(ROOT/o, source/o, ignore=shutil.ignore_patterns('__pycache__'))
        else: shutil.copy2(ROOT/o, source/o)
    built = subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', source/'dist', source], capture_output=True, text=True)
    assert not built.returncode, built.stdout+built.stderr
    wheel, = (source/'dist').glob('*.whl')
    zipfile.ZipFile(wheel).extractall(out)
    return out

@pytest.fixture(scope='session')
def cells(tmp_path_factory):
    "The cells of each tutorial, taken from its page in HTML"
    from bs4 import BeautifulSoup  # the documentation's theme brings it
    spec = importlib.util.spec_from_file_location('docs', ROOT/'tools/docs.py')
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    html,proc = (tmp_path_factory.mktemp(o) for o in ('html','pages'))
    docs.build(html, proc, 'tutorials')
    read = lambda p: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser')
    return {p.stem: [o.get_text() for o in read(p).select('div.cell_input pre')] for p in (html/'tutorials').glob('*.html')}

def run(cells, site, folder):
    "Run `cells` in a process of its own, in an empty folder; return what it printed"
    import json
    empty = folder/'empty'
    empty.mkdir()
    (folder/'run.py').write_text(RUN, encoding='utf-8')
    (folder/'page.json').write_text(json.dumps(cells), encoding='utf-8')
    env = {k:v for k,v in os.environ.items() if k not in ('PYTHONPATH','PYTHONSTARTUP')}
    env |= dict(PYTHONPATH=str(site), MPLBACKEND='agg', OMP_NUM_THREADS='1', PYTHONUTF8='1')
    done = subprocess.run([sys.executable, '-W', 'ignore', folder/'run.py', site, ROOT, folder/'page.json'], cwd=empty, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-4000:]
    return done.stdout

def shorter(cells, lines):
    "`cells` with each of the shown `lines` replaced; every one has to be there, as a line, once"
    for old,new in lines.items():
        assert sum(c.splitlines().count(old) for c in cells)==1, f'{old!r} is not a line of the page'
        cells = ['\n'.join(new if o==old else o for o in c.splitlines()) for c in cells]
    return cells

def test_every_tutorial_has_a_page(cells): assert sorted(cells)==PAGES and all(map(len, cells.values())) and {*SHORTER,*NEEDS}<=set(PAGES)

@pytest.mark.parametrize('page', [o for o in PAGES if o not in NEEDS or importlib.util.find_spec(NEEDS[o])])
def test_tutorial_runs_as_published(page, cells, site, tmp_path):
    run(shorter(cells[page], SHORTER.get(page, {})), site, tmp_path)

@pytest.mark.parametrize('page', PAGES)
def test_a_tutorial_shows_all_that_it_needs(page):
    "No cell is hidden, and nothing of the repository is imported"
    text = (ROOT/'nbs/tutorials'/f'{page}.ipynb').read_text(encoding='utf-8')
    assert not re.search(r'#\|\s*(hide|echo|eval)', text) and 'sys.path' not in text

@pytest.mark.parametrize('page', NEEDS)
def test_a_page_that_may_not_run_has_the_outputs_of_a_run(page):
    import json
    code = [o for o in json.loads((ROOT/'nbs/tutorials'/f'{page}.ipynb').read_text(encoding='utf-8'))['cells'] if o['cell_type']=='code']
    assert f'pip install {NEEDS[page]}' in (ROOT/'nbs/tutorials'/f'{page}.ipynb').read_text(encoding='utf-8')
    assert all(o['outputs'] for o in code if re.match(r'\[|\(', ''.join(o['source']).splitlines()[-1]))

def test_what_is_missing_is_noticed(cells, site, tmp_path):
    "A cell that leans on the repository fails here"
    for i,cell in enumerate(['from data import best_there_is', 'import tests.tiny', 'open("README.md")']):
        (tmp_path/str(i)).mkdir()
        with pytest.raises(AssertionError, match='No module|No such file'): run([cell], site, tmp_path/str(i))

LEARN = '''
import torch
from torch import nn
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
items = [(torch.randn(1,8,8), i%10) for i in range(16)]
dls = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))
learn = Learner(dls, nn.Sequential(nn.Conv2d(1,10,3), nn.Flatten(), nn.Linear(360,10)), loss_func=nn.CrossEntropyLoss())
'''

def test_readme_runs_as_printed(site, tmp_path):
    "Its blocks of Python from first to last, after a learner was made; a block of output below a block of code is what that shows"
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    blocks = re.findall(r'^```(\w*)\n(.*?)^```', text, flags=re.M|re.S)
    python = [o for kind,o in blocks if kind=='python']
    assert len(python)>2
    printed = run([LEARN, *python], site, tmp_path)
    for (kind,_),(below,shown) in zip(blocks, blocks[1:]):
        if kind=='python' and not below: assert shown.strip() in printed
