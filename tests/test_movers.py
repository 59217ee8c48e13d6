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

def test_steps_of_a_pruner():
    "Steps end where one cut does, and each is what the schedule says; another call is refused"
    import torch
    from torch import nn
    from fasterai.prune.all import Pruner
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 20, 3), nn.ReLU(), nn.Conv2d(20, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(640, 5))
    x = torch.randn(2, 1, 8, 8)
    pruner = Pruner(net(), 50, example_inputs=x, iterative_steps=5, schedule='agp')
    widths = []
    for _ in range(5):
        pruner.prune_model()
        widths.append((pruner.model[0].out_channels,pruner.model[2].out_channels))
    levels = [50*(1-(1-k/5)**3) for k in range(1, 6)]
    assert widths==[(20-int(20*o/100+1e-9),40-int(40*o/100+1e-9)) for o in levels]
    with pytest.raises(ValueError, match='all 5 steps are done: 50.0 % of the channels are removed'): pruner.prune_model()
    by_hand = Pruner(net(), 50, example_inputs=x)
    for o in levels: by_hand.update(o)
    assert all(torch.equal(a, b) for a,b in zip(by_hand.model.state_dict().values(), pruner.model.state_dict().values()))
    for wrong,says in ((dict(iterative_steps=0), 'at least 1'), (dict(iterative_steps=2, schedule='dsd'), 'do not come back'), (dict(iterative_steps=2, schedule='agpp'), "did you mean 'agp'")):
        with pytest.raises(ValueError, match=says): Pruner(net(), 50, example_inputs=x, **wrong)
    with pytest.raises(ValueError, match='iterative_steps need a pruning_ratio'): Pruner(net(), macs='50%', iterative_steps=2)

def test_losses_take_what_there_is():
    "By name, in lists or dicts, a loss gives the same"
    import torch
    from fasterai.distill.all import Attention, DecoupledKD, FitNet, Similarity, SoftTarget
    g = torch.Generator().manual_seed(0)
    s,t = ([torch.randn(4, 3, 6, 6, generator=g) for _ in range(2)] for _ in range(2))
    p,q,y = torch.randn(4, 5, generator=g),torch.randn(4, 5, generator=g),torch.arange(4)
    named = dict(fm_s=dict(a=s[0], b=s[1]), fm_t=dict(c=t[0], d=t[1]), pred=p, teacher_pred=q, target=y)
    for f in (Attention,FitNet,Similarity): assert torch.equal(f(s, t), f(**named))
    for f,given in ((SoftTarget,(p,q)), (DecoupledKD,(p,q,y))): assert torch.equal(f(*given), f(**named))
    with pytest.raises(TypeError, match='temperature'): SoftTarget(p, q, temperature=3)
    assert not torch.equal(Similarity(s, t), Similarity(s, t, p=1))
