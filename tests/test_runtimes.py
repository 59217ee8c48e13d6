"""Models in several runtimes: `report(…, runtimes=…)` and what is behind it, on what people bring"""
import copy, sys
import numpy as np, pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fasterai.export.onnx_file import export_onnx
from fasterai.export.runtimes import calibration_inputs, checked_runtimes, in_runtimes, runtimes
from fasterai.prune.all import Pruner
from fasterai.quantize.all import KMeansQuantizer
from fasterai.report.all import report
from fasterai.sparse.all import Sparsifier

def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3,16,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,32,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,5)).eval()

def images(n=40): return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(0))
def labels(n=40): return torch.arange(n)%5
def pruned(m): return Pruner(new := copy.deepcopy(m), 50, example_inputs=images(1)).prune_model() or new

class Pair(nn.Module):
    "Takes and returns dicts, as transformers do"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Embedding(20, 8),nn.Linear(8, 3)
    def forward(self, ids, mask=None):
        x = self.a(ids)
        return dict(logits=self.b(x if mask is None else x*mask[...,None]))

class Stubborn(nn.Module):
    "No exporter knows what it will do"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)
    def forward(self, x): return self.l(x) if float(x.sum())>0 else self.l(-x)

def told(rep, what): return [o for o in rep.notes if what in o]

def test_rows():
    "Each model in each runtime, the files that these read, and the first model in the same program beside it"
    dense = net()
    small = pruned(dense)
    rep = report(dict(dense=dense, small=small), (images(),labels()), runtimes=['onnx','eager','onnx_static','onnx_dynamic'], repeats=6, threads=1)
    assert list(rep.index)==[(o,s) for o in ('onnx','eager','onnx_static','onnx_dynamic') for s in ('dense','small')]
    assert rep.right['onnx','dense']==rep.right['eager','dense'] and rep.of.nunique()==1
    assert rep.bytes['onnx_static','dense']<rep.bytes['onnx','dense'] and rep.bytes['onnx','small']<rep.bytes['onnx','dense']
    assert rep.speedup['onnx','dense']==1 and np.isnan(rep.speedup_there['onnx','dense']) and rep.speedup_there.notna().sum()==6
    assert (rep.macs.xs('small', level='stage').nunique(),rep.params['onnx','small'])==(1,sum(p.numel() for p in small.parameters()))
    assert 'onnx_static' in str(rep) and 'faster there' in rep._repr_html_()

@pytest.mark.parametrize('data', ['loader','generator','inputs','batches'])
def test_data(data):
    "Calibration does not use up what comes once"
    x,y = images(),labels()
    data = dict(loader=DataLoader(TensorDataset(x, y), 8), generator=((a,b) for a,b in zip(x.split(8), y.split(8))), inputs=x, batches=[*x.split(8)])[data]
    rep = report(net(), net(1), data, runtimes=['onnx','onnx_static'], repeats=6, threads=1)
    assert len(rep)==4 and (rep.of==40).all()

def test_without_data():
    "Ranges cannot be found, which is said; a network that takes one number of samples only is measured with it"
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 4)
        def forward(self, x): return self.l(x.reshape(2, 4))
    rep = report(net(), example_inputs=images(1), runtimes=['onnx','onnx_static'], repeats=6)
    assert len(rep)==1 and told(rep, 'onnx_static: static int8 needs data to find ranges')
    rep = report(Fixed(), example_inputs=torch.ones(2,4), runtimes=['eager','onnx','onnx_dynamic'], repeats=6)
    assert len(rep)==3 and rep.bytes['onnx_dynamic'].item()>0

def test_by_name():
    "Keyword inputs, outputs in a dict"
    batch = dict(ids=torch.arange(12).view(2,6)%20, mask=torch.ones(2,6))
    rep = report(Pair(), Pair(), [batch]*3, runtimes=['eager','onnx','onnx_dynamic'], repeats=6)
    assert len(rep)==6 and rep.difference['onnx','before']<1e-4 and rep.difference['onnx','after']>1e-2

def test_what_is_not_there(monkeypatch):
    "A network without a graph, a runtime that is not installed: said once each, and the rest is measured"
    monkeypatch.setitem(sys.modules, 'openvino', None)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    rep = report(Stubborn(), example_inputs=torch.ones(1,4), runtimes='all', repeats=6)
    assert 'eager' in rep.index.get_level_values('runtime') and 'onnx' not in rep.index.get_level_values('runtime')
    assert len(told(rep, 'is not measured with onnx, onnx_dynamic, onnx_static:'))==1 and told(rep, 'pip install openvino')
    with pytest.raises(ValueError, match='nothing can be measured.*onnx'): report(Stubborn(), example_inputs=torch.ones(1,4), runtimes='onnx')

def test_ignored():
    "Zeros and shared values are worth nothing in a runtime, and it is said"
    torch.manual_seed(0)
    sparse,shared = (nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4)) for _ in range(2))
    Sparsifier(sparse, 'weight', 'global', 'large_final', layer_type=nn.Linear).sparsify_model(90)
    KMeansQuantizer(3).quantize(shared)
    rep = report(dict(sparse=sparse, shared=shared), example_inputs=torch.randn(2,64), runtimes=['onnx'], repeats=6)
    assert [o.partition(':')[0] for o in told(rep, 'take as much time and memory as other numbers, whatever the runtime')]==['sparse']
    assert [o.partition(':')[0] for o in told(rep, 'have few values')]==['shared']

@pytest.mark.parametrize('asked, said', [('onxx', "'onnx'"), (True, 'True'), ([None], 'None'), (5, 'eager, compile'), ([], 'different names'), (['onnx','onnx'], 'different names'), (['eager','tensorrt'], 'tensorrt')])
def test_names(asked, said):
    with pytest.raises(ValueError, match=said): report(net(), runtimes=asked)

def test_layout_is_refused():
    with pytest.raises(ValueError, match='channels_last'): report(net(), runtimes='onnx', channels_last=True)

def test_untouched(tmp_path):
    "Models are left as they are: mode, weights, hooks"
    m = net().train()
    state = copy.deepcopy(m.state_dict())
    found,missing = in_runtimes(m, images(2), 'all', tmp_path, [(images(),)])
    assert m.training and all(torch.equal(v, state[k]) for k,v in m.state_dict().items()) and {*found,*missing}=={*runtimes}
    with torch.no_grad():
        out = net()(images(7))
        assert all((o(images(7))-out).abs().max()<.1*out.abs().max() for k,o in found.items() )

def test_samples():
    "As many as are asked for, in whole batches"
    assert list(map(len, (o for o, in calibration_inputs(images(), 10))))==[40] and [len(o) for o, in calibration_inputs([*images().split(8)], 10)]==[8,8]

def test_odd_widths():
    "Widths that ONNX Runtime does not take at once are told, if pruning made them"
    dense = net()
    odd,even = (Pruner(copy.deepcopy(dense), 40, example_inputs=images(1), round_to=o).prune_model() for o in (None,16))
    rep = report(dict(dense=dense, odd=odd, even=even), example_inputs=images(1), runtimes=['onnx'], repeats=6)
    assert [o.partition(':')[0] for o in told(rep, 'no multiple of 16')]==['odd']

def test_scores_are_not_rounded(tmp_path):
    "Classes that 256 levels would make equal stay apart: scores of a static file are floats, also where something in the network reads them"
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(6, 16),nn.Linear(16, 2)
        def forward(self, x):
            y = self.b(torch.relu(self.a(x)))
            return y,torch.relu(y)
    torch.manual_seed(0)
    x = torch.randn(3000, 6)
    for i,m in enumerate((nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)),Two())):
        (tmp_path/str(i)).mkdir()
        out = in_runtimes(m.eval(), x[:2], ['onnx_static'], tmp_path/str(i), [(x,)])[0]['onnx_static'](x)
        with torch.no_grad(): want = m(x)
        first,wanted = (o if i==0 else o[0] for o in (out,want))
        assert (first-wanted).abs().max()<.1*wanted.abs().max()
        assert len(first[:,0].unique())>256

def test_lengths_that_differ():
    "A file takes one length, and says so"
    batches = [dict(ids=torch.arange(2*n).view(2,n)%20) for n in (6,4)]
    with pytest.raises(ValueError, match=r'it takes ids as \[batch, 6\].*pad inputs of other sizes'): report(Pair(), batches, runtimes='onnx', repeats=6)

def test_eager_is_as_the_others(tmp_path):
    "Without dropout, whatever the mode of the network; one that does not train is itself"
    m = nn.Sequential(nn.Dropout(.9), nn.Linear(4, 2)).train()
    new = in_runtimes(m, np.ones((3,4)), 'eager', tmp_path)[0]['eager']
    x = torch.ones(3, 4)
    assert torch.equal(new(x), m[1](x)) and m.training and in_runtimes(m.eval(), x, 'eager', tmp_path)[0]['eager'] is m

@pytest.mark.parametrize('n', [0,-1,'2',True])
def test_threads(tmp_path, n):
    with pytest.raises(ValueError, match='threads is a whole number'): in_runtimes(net(), images(2), 'eager', tmp_path, threads=n)

def test_names_in_any_order(): assert set(checked_runtimes({'onnx','eager'}))=={'onnx','eager'} and checked_runtimes('all')==[*runtimes]

@pytest.mark.parametrize('mode', ['static','dynamic'])
def test_the_file_that_is_measured_is_the_one_that_is_written(tmp_path, mode):
    "Bytes of a table are those that `export_onnx` writes"
    m = net().eval()
    names = dict(static='onnx_static', dynamic='onnx_dynamic')[mode]
    found,missing = in_runtimes(m, images(2), names, tmp_path, [(images(),)])
    file = export_onnx(m, images(2), tmp_path/'m.onnx', quantize=True, quantize_mode=mode, calibration_data=[(images(),)] if mode=='static' else None)
    assert not missing and found[names].n_bytes==file.n_bytes==(tmp_path/'m.onnx').stat().st_size
