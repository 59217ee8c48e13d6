"The page of other libraries: made of rows, with the words computed; a library that fails; a run that goes on"
import importlib.util, subprocess, sys
from pathlib import Path
import pytest

PEERS = Path(__file__).parent.parent/'benchmarks'/'peers'

@pytest.fixture
def run(monkeypatch):
    "The driver, and the path as it was afterwards"
    monkeypatch.setattr(sys, 'path', [*sys.path])
    spec = importlib.util.spec_from_file_location('peers_run', PEERS/'run.py')
    mod = importlib.util.module_from_spec(spec)
    sys.modules['peers_run'] = mod  # its dataclasses look for it
    spec.loader.exec_module(mod)
    yield mod
    for o in ('peers_run','page','rows','matrix'): del sys.modules[o]

ORDER = ['ours','a','b','c']
def row(library, case, value=None, unit='s', best='low', measure='step', **more): return dict(library=library, measure=measure, case=case, value=value, unit=unit, best=best, **more)
def line_of(text, case): return next(o for o in text.splitlines() if o.startswith(f'| {case} |'))
def cells(text, case): return [o.strip() for o in line_of(text, case).strip('|').split('|')]

def test_better_and_worse_are_computed(run):
    rows = [row('ours', 'x', 1.), row('a', 'x', 3.), row('b', 'x', 2.), row('ours', 'y', 4.), row('a', 'y', 2.), row('ours', 'z', 5., 'exact', 'high', of=10), row('a', 'z', 4., 'exact', 'high', of=10)]
    text = run.page(rows, ORDER, 2)
    assert cells(text, 'x')==['x','s','1','3','2','better than b ×2'] and cells(text, 'y')[-1]=='worse than a ×2' and cells(text, 'y')[4]=='—'
    assert cells(text, 'z')==['z','exact','5 of 10','4 of 10','—','better than a']
    assert '- `step.py`, y (s): worse than a ×2' in text and cells(text, '`step.py`')[1:]==['2','','1','',''] and cells(text, '**all**')[1:]==['**2**','**0**','**1**','**0**','**0**']

def test_the_other_way_round(run):
    "With the numbers swapped, the words are the other ones"
    rows = [row('ours', 'x', 3.), row('a', 'x', 1.)]
    assert cells(run.page(rows, ORDER, 2), 'x')[-1]=='worse than a ×3'
    assert cells(run.page([{**o, 'best':'high'} for o in rows], ORDER, 2), 'x')[-1]=='better than a ×3'

def test_rounds_and_noise(run):
    "Medians, with the range; rounds that overlap, or nearly equal ones, are the same"
    rows = [row('ours', 'x', v, detail=f'round {v}') for v in (3.,1.,2.)]+[row('a', 'x', v) for v in (2.5,4.,5.)]+[row('ours', 'y', 1.), row('a', 'y', 1.01)]
    text = run.page(rows, ORDER, 2)
    assert cells(text, 'x')[2:]==['2 (1 to 3); round 2.0','4 (2.5 to 5)','same as a'] and cells(text, 'y')[-1]=='same as a'

def test_reasons_and_failures(run):
    "What is not there has its reason under the table, what fails its exception; both count in the words"
    rows = [row('ours', 'x', 1.), row('a', 'x', error='KeyError: no `x`'), row('b', 'x', unit=None, why='does nothing of it'),
        row('ours', 'y', error='ValueError: no'), row('a', 'y', 2.), row('b', 'y', unit=None, why='does nothing of it'), row('ours', 'z', 1.), row('a', 'z', unit=None, why='not z')]
    text = run.page(rows, ORDER, 2)
    assert cells(text, 'x')==['x','s','1','**fails** [1]','better: no other is right'] and '1. `KeyError: no ’x’`' in text
    assert cells(text, 'y')[-1]=='worse: a can' and '2. `ValueError: no`' in text and cells(text, 'z')[2:]==['1','—','alone']
    assert '— b: does nothing of it' in text and '— a: not z (z)' in text and cells(text, '**right**')[2:4]==['**2 of 3**','**1 of 2**']

def test_a_process_for_several_cases(run):
    "What ends it is said of those that have no row"
    rows = [row('ours', 'x', 1.), row('a', 'x', 3.), row('ours', 'y', 1.), row('ours', 'y, folded', 1.), row('a', 'x y', unit=None, error='ended by signal 9'), row('ours', 'z', 1.)]
    text = run.page(rows, ORDER, 2)
    assert [cells(text, o)[3] for o in ('x','y','y, folded','z')]==['3','**fails** [1]','**fails** [1]','—']

def test_right_is_all_that_counts(run):
    "Where no number is better than another, to come out right is"
    rows = [row('ours', 'x', 30., best=None), row('a', 'x', 20., best=None), row('ours', 'y', 30., best=None), row('a', 'y', error='E: e', best=None)]
    text = run.page(rows, ORDER, 2)
    assert cells(text, 'x')[-1]=='right as well' and cells(text, 'y')[-1]=='better: no other is right'

SCRIPT = '''"A measure"
import os, signal
from rows import Wrong, attempt, main, tell
def ours(case):
    open(os.environ['RUNS'], 'a').write('.')
    with attempt(case, 's'): tell(case, 1., 's', 'low')
def raises(case):
    print('a library that prints')
    with attempt(case, 's', 'MB'): raise KeyError('one', 'two')
def wrong(case):
    with attempt(case, 's'): raise Wrong('outputs differ')
def lines(case):
    with attempt(case, 's'): raise ValueError('in /home/me/lib/x.py\\nmore')
def ends(case): raise ZeroDivisionError('outside')
def killed(case): os.kill(os.getpid(), signal.SIGKILL)
def hangs(case):
    while True: pass
def slow(case):
    with attempt(case, 's', seconds=1):
        while True:
            try: sum(range(9999))
            except Exception: pass
main(dict(ours=ours, raises=raises, wrong=wrong, lines=lines, ends=ends, killed=killed, hangs=hangs, slow=slow), {'lacks':'does not'})
'''

@pytest.fixture
def made(run, tmp_path, monkeypatch):
    "Function that runs a made measure for libraries, and gives its results by job"
    (tmp_path/'made.py').write_text(SCRIPT, encoding='utf-8')
    monkeypatch.setenv('RUNS', str(tmp_path/'runs'))
    monkeypatch.setattr(run, 'SCRIPTS', tmp_path)
    def call(*libraries, cases=('x',), rounds=1, seconds=20, **kwargs):
        monkeypatch.setattr(run, 'MEASURES', dict(made=run.Measure(cases, rounds, seconds)))
        monkeypatch.setattr(run, 'LIBRARIES', {o:run.Library(None) for o in libraries})
        return run.run_all(['made'], tmp_path/'results', **kwargs)
    call.runs = lambda: len((tmp_path/'runs').read_text())
    call.results = tmp_path/'results'/'results.jsonl'
    return call

@pytest.mark.parametrize('library,error', [('raises',"KeyError: ('one', 'two')"), ('wrong','outputs differ'), ('lines','ValueError: in x.py'), ('ends','ZeroDivisionError: outside'),
    ('killed','ended by signal 9'), ('slow','over 1 s')])
def test_a_library_that_fails(made, library, error):
    "The row says how, and the others go on"
    rows = [r for o in made(library, 'ours').values() for r in o]
    failed = [r for r in rows if 'error' in r]
    assert {r['error'] for r in failed}=={error} and {r['library'] for r in failed}=={library}
    assert [r['unit'] for r in failed if library=='raises'] in ([],['s','MB'])
    assert [r['value'] for r in rows if r['library']=='ours' and r.get('value')]==[1.]

def test_a_process_that_hangs(made):
    assert [r['error'] for o in made('hangs', seconds=2).values() for r in o if 'error' in r]==['over 2 s']

def test_a_library_without_a_way(made):
    "It is asked once, not for each case and round"
    found = made('lacks', cases=('x','y'), rounds=2)
    assert len(found)==4 and [r['why'] for o in found.values() for r in o if 'why' in r]==['does not']

def test_an_environment_that_cannot_be_made(made, run, monkeypatch):
    "Its rows say so, and it is tried again in the next run"
    def python_of(library, *args): raise subprocess.CalledProcessError(1, 'pip')
    monkeypatch.setattr(run, 'python_of', python_of)
    assert [r['error'] for o in made('ours').values() for r in o]==['pip cannot make its environment']
    monkeypatch.undo()
    assert not made.results.read_text()

def test_a_run_goes_on(made):
    "What has a result is not run again, unless that is asked for"
    found = made('ours', cases=('x','y'), rounds=2)
    assert made.runs()==4 and len(found)==4
    lines = made.results.read_text().splitlines(keepends=True)
    made.results.write_text(''.join(lines[:3]))  # as if it had been stopped
    again = made('ours', cases=('x','y'), rounds=2)
    assert made.runs()==5 and {k:[r.get('value') for r in v] for k,v in again.items()}=={k:[r.get('value') for r in v] for k,v in found.items()}
    made('ours', cases=('x','y'), rounds=2, again=True)
    assert made.runs()==9 and len(made.results.read_text().splitlines())==4

def test_turns_that_are_not_whole(made, run):
    "Where a library was not tried, nothing is compared, and the page says so"
    found = made('ours', 'lacks', cases=('x','y'))
    del found[('made',0,'y','lacks')]
    assert {r['case'] for r in run.all_rows(found)}=={None,'x'} and run.missing(found)==dict(made=['y'])
    assert '- `made.py`: y' in run.page([], ORDER, 2, run.missing(found))

def test_the_page_that_is_committed():
    "It is of the form that the driver writes, and linked"
    text = (PEERS/'README.md').read_text(encoding='utf-8')
    assert text.startswith('# Other libraries beside this one')
    assert all(f'`{o.stem}.py`' in text for o in PEERS.glob('*.py') if '__main__' in o.read_text(encoding='utf-8') and o.stem!='run')
    assert '](peers/README.md)' in (PEERS.parent/'README.md').read_text(encoding='utf-8')
