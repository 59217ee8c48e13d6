"Each line of the tables for those who come from fasterai 0.4 runs as it says"
import contextlib, io, json, re, warnings
from pathlib import Path
import matplotlib
import pytest
from fasterai import legacy

CELLS = json.loads((Path(__file__).parent.parent/'nbs/tutorials/07_movers.ipynb').read_text(encoding='utf-8'))['cells']
SETUP = next(''.join(o['source']) for o in CELLS if o['cell_type']=='code')
ROWS = [o for c in CELLS if c['cell_type']=='markdown' for o in re.findall(r'^\| `(.+)` \| `(.+)` \| ([a-z, ]+) \|$', ''.join(c['source']), flags=re.M)]
STATES = 'runs','runs, with a warning','is refused','is not there'

def test_all_rows_are_read():
    "No row has another form, and each room has some"
    lines = [o for c in CELLS if c['cell_type']=='markdown' for o in ''.join(c['source']).splitlines() if o.startswith('| `')]
    assert len(lines)==len(ROWS)>60 and {o[2] for o in ROWS}==set(STATES)
    rooms = [''.join(c['source']).split('\n')[0][3:] for c in CELLS if '| there | here |' in ''.join(c['source'])]
    assert rooms==['Sparse','Prune','Distill','Regularize','Misc','Quantize','Export','Analyze']

def ours(w): return issubclass(w.category, FutureWarning) and 'old spelling' in str(w.message) or 'did you mean' in str(w.message)

def state_of(code):
    "What comes of a line"
    ns = {}
    exec(SETUP, ns)
    legacy._said.clear()
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('always')
        try: exec(code, ns)
        except (ValueError,TypeError): return 'is refused'
        except (NameError,AttributeError): return 'is not there'
    return 'runs, with a warning' if any(map(ours, said)) else 'runs'

@pytest.mark.parametrize('there,here,state', ROWS, ids=[o[0][:60] for o in ROWS])
def test_row(there, here, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use('agg')
    if 'onnx' in there+here: pytest.importorskip('onnxruntime'), pytest.importorskip('onnxscript')
    assert (state_of(there),state_of(here))==(state,'runs')
    assert (there==here)==(state=='runs'), 'a line that runs as it is stands on both sides'
