"""What the measures share: a row is a line of JSON that tells a library, a measure, a case, a value and its unit.

A measure is a script `python MEASURE.py LIBRARY CASE`, which runs in the environment of that library."""
import json, re, signal, sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

def first_line(error):
    "The type of an exception and the first line of what it says, without the folders of this machine"
    lines = [o for o in str(error).splitlines() if o.strip()]
    return without_folders(f'{type(error).__name__}: {lines[0].strip()}' if lines else type(error).__name__)

def without_folders(text): # A message
    "`text` with the names of files in place of their paths, and no longer than a line of a table"
    return re.sub(r'(?<![\w.])/(?:[\w.+@-]+/)+', '', text)[:160]

def tell(case, value=None, unit=None, best=None, **more): # Best: 'low' or 'high'
    "Print a row; without a case, it is for all of the measure"
    row = dict(library=sys.argv[1], measure=Path(sys.argv[0]).stem, case=case, value=value, unit=unit, best=best)
    print(json.dumps({**row, **more}), flush=True)

def told(text):
    "The rows in what a measure printed: the libraries print as well"
    return [json.loads(o) for o in text.splitlines() if o.startswith('{"library": ')]

class Wrong(Exception):
    "What a library did without an exception of its own, and should not have done"

class Late(BaseException):
    "Time is over: nothing between here and `attempt` may take it for an error of its own"

@contextmanager
def attempt(case, *units, seconds=0): # Units of the rows that are told inside, seconds of the processor that these may take
    "Rows for what goes wrong inside, whatever it is"
    def late(*args): raise Late(f'over {seconds} s')
    was = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    def failed(why):
        for unit in units: tell(case, unit=unit, error=why)
    try: yield
    except (Wrong,Late) as e: failed(str(e))
    except Exception as e: failed(first_line(e))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, was)

def versions():
    "The library that the command line names, and what it stands on"
    for o in ('torch','torchvision','fastai',sys.argv[1].split()[0]):
        try: yield o,version(o)
        except PackageNotFoundError: pass

def main(ways, lacks): # Functions of a case, and reasons why there is none, both by library
    "Run the measure for the library and the case that the command line names"
    library,case = sys.argv[1:]
    tell(None, versions=dict(versions()))
    if library in lacks: tell(None, why=lacks[library])
    else: ways[library](case)
