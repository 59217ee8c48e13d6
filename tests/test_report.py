"Counts, latency in turn, accuracy as k of n, and what a report says of them"
import importlib.util,pickle,random
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from hypothesis import given, strategies as st
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fasterai.analyze import counts
from fasterai.core.graph import ChannelGraph
from fasterai.analyze.all import *
from fasterai.analyze.counts import median_interval, sign_test, told_right, wilson
from fasterai.report.all import *
from fasterai.prune.all import Pruner
from fasterai.sparse.sparsifier import Sparsifier
import matplotlib
matplotlib.use('agg')

ROOT = Path(__file__).parent.parent
X = torch.randn(1, 3, 16, 16)

def net(out=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,16,3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(), nn.Conv2d(16,16,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,out))

def state_of(m): return {k:v.clone() for k,v in m.state_dict().items()}, [o.training for o in m.modules()], torch.get_num_threads(), torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
def same(a, b): return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:3]==b[1:3] and torch.equal(a[3], b[3]) and a[4]==b[4]

class Clock:
    "Stands in for the clock: only running a `Paced` model takes time, as many milliseconds as it says"
    def __init__(self): self.now,self.log = 0.,[]
    def __call__(self): return self.now

class Paced(nn.Module):
    def __init__(self, clock, name, ms):
        super().__init__()
        self.clock,self.name,self.ms,self.w = clock,name,ms,nn.Parameter(torch.ones(1))
        self.register_parameter(name, nn.Parameter(torch.ones(ord(name)-96)))  # no two are alike
    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.clock.now += self.ms()/1000
        self.clock.log.append(self.name)
        return x*self.w

def paced(monkeypatch, *ms):
    clock = Clock()
    monkeypatch.setattr(counts, 'perf_counter', clock)
    return clock,[Paced(clock, 'abc'[i], o) for i,o in enumerate(ms)]

def test_latency_in_turn(monkeypatch):
    "Warm-up first, then every model once a turn, in an order that changes, the same each time it is asked"
    logs = []
    for _ in range(2):
        clock,models = paced(monkeypatch, lambda: 20, lambda: 30, lambda: 40)
        ms = latency(*models, example_inputs=torch.ones(1), repeats=30, warmup=2)
        log = ''.join(clock.log)
        turns = [log[i:i+3] for i in range(9, len(log), 3)]
        logs.append(log)
        assert log[:9]=='aaabbbccc' and len(turns)==30 and {''.join(sorted(o)) for o in turns}=={'abc'} and len(set(turns))==6
        assert np.allclose(ms, [[20]*30,[30]*30,[40]*30])
    assert logs[0]==logs[1]

def test_latency_of_small_models_repeats_calls(monkeypatch):
    "A measurement takes 10 ms at least, and tells the time of one call"
    clock,models = paced(monkeypatch, lambda: 4, lambda: 25)
    ms = latency(*models, example_inputs=torch.ones(1), repeats=2, warmup=0)
    log = ''.join(clock.log)
    assert log[:2]=='ab' and log.count('a')==7 and log[2:].replace('aaa','A') in ('AbAb','AbbA','bAAb','bAbA') and np.allclose(ms, [[4,4],[25,25]])

def test_drift_does_not_show_in_the_ratio(monkeypatch):
    "A machine that gets slower and slower: medians of times wander, ratios of a turn do not"
    clock,models = paced(monkeypatch, lambda: 20+clock.now, lambda: 20+clock.now)
    s = speedup(*latency(*models, example_inputs=torch.ones(1), repeats=15))
    assert s.low<=1<=s.high and s.high-s.low<.2

def test_noise_is_called_noise(monkeypatch):
    rng = random.Random(0)
    clock,models = paced(monkeypatch, lambda: 20+10*rng.random(), lambda: 20+10*rng.random())
    rep = report(*models, example_inputs=torch.ones(1))
    assert rep.speedup_low['after']<1<rep.speedup_high['after'] and any('within the noise' in o and o.startswith('after') for o in rep.notes)

def test_long_times_are_written_out(monkeypatch):
    assert '12,000 (12,000 – 12,000)' in repr(report(paced(monkeypatch, lambda: 12_000)[1][0], example_inputs=torch.ones(1)))

def test_slower_is_called_slower(monkeypatch):
    clock,models = paced(monkeypatch, lambda: 20, lambda: 40, lambda: 40)
    rep = report(*models, example_inputs=torch.ones(1))
    assert any(o.startswith('model 2: slower than model 1: ×0.50') for o in rep.notes)
    assert any(o.startswith('model 3: no faster than model 2') for o in rep.notes)

def test_faster_without_fewer_macs(monkeypatch):
    clock,models = paced(monkeypatch, lambda: 40, lambda: 20)
    rep = report(*models, example_inputs=torch.ones(1))
    assert np.isclose(rep.speedup['after'], 2) and any('faster by ×2.00' in o for o in rep.notes)

def test_what_computes_the_same_is_not_faster(monkeypatch):
    "A difference of the clock between models of one make is of the machine"
    clock,models = paced(monkeypatch, lambda: 40, lambda: 20)
    twin = Paced(clock, 'a', lambda: 20)
    rep = report(models[0], twin, example_inputs=torch.ones(1))
    assert np.isclose(rep.speedup['after'], 2) and rep.notes==['after: has the same layers as before, so their ratio in time, ×2.00 (×2.00 to ×2.00), is noise of this machine; other differences of this size may be noise, too']

def test_waits_for_the_device_and_needs_no_cuda(monkeypatch):
    "The clock is read after the device of the model is done; nothing of CUDA is asked where the model is on the CPU"
    waited = []
    monkeypatch.setattr(torch.cpu, 'synchronize', lambda *a: waited.append(a))
    def no(*a): raise AssertionError('CUDA')
    monkeypatch.setattr(torch.cuda, 'synchronize', no)
    latency(nn.Linear(2,2), example_inputs=torch.ones(1,2), repeats=2, warmup=0)
    assert waited==[()]*6

def test_models_run_as_a_user_runs_them():
    "What is timed is the model alone: tensors of other classes have their say, autocast goes on, and nothing stands between the model and torch"
    seen = []
    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)
    class Net(nn.Linear):
        def forward(self, x):
            types.append(super().forward(x).dtype)
            return x*self.scale
    m,types = Net(2,2),[]
    m.scale = torch.ones(2).as_subclass(Mine)
    seen.clear()
    with torch.autocast('cpu', dtype=torch.bfloat16): latency(m, example_inputs=torch.ones(1,2), repeats=1, warmup=0)
    assert torch.mul in seen or torch.Tensor.mul in seen
    assert set(types)=={torch.bfloat16}

def test_one_thread_and_back():
    seen,was = [],torch.get_num_threads()
    m = nn.Sequential(nn.Linear(2,2))
    m[0].register_forward_hook(lambda *a: seen.append(torch.get_num_threads()))
    latency(m, example_inputs=torch.ones(1,2), repeats=1, threads=was+1)
    assert set(seen)=={was+1} and torch.get_num_threads()==was

def test_channels_last():
    "Copies are measured in the layout; the model keeps its own"
    seen,m,last = [],net(),torch.channels_last
    m[0].register_forward_pre_hook(lambda mod, a: seen.append((a[0].is_contiguous(memory_format=last), mod.weight.is_contiguous(memory_format=last))))
    latency(m, example_inputs=torch.randn(2,3,16,16), repeats=1, channels_last=True)
    assert set(seen)=={(True,True)} and m[0].weight.is_contiguous()
    with pytest.raises(ValueError, match='4 dimensions'): latency(nn.Linear(2,2), example_inputs=torch.ones(1,2), channels_last=True)

class Broken(nn.Module):
    "Draws random numbers, writes to its buffer, and fails at the `n`-th call"
    def __init__(self, n):
        super().__init__()
        self.n,self.calls,self.w = n,0,nn.Parameter(torch.ones(4))
        self.register_buffer('b', torch.zeros(1))
    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        self.b += 1
        if self.calls>=self.n: raise KeyError('broken')
        return torch.stack([x.flatten(1).sum(1)*o for o in self.w], 1)

@pytest.mark.parametrize('n', [1,2,4,6,9,10**9])
def test_left_as_it_was(n):
    "Models, threads and random state, whether or not a call fails, and whenever"
    m,b = net().train(),Broken(n)
    m[1].eval()
    data = [(torch.randn(2,3,16,16), torch.randint(0,4,(2,))) for _ in range(2)]
    was = state_of(m),state_of(b)
    try:
        report(m, b, data, threads=1, repeats=6)
        failed = False
    except (KeyError,ValueError): failed = True
    assert failed==(n<100) and same(was[0], state_of(m)) and same(was[1], state_of(b))

def test_summary_leaves_the_model():
    m = net().train()
    was = state_of(m)
    df = summary(m, X)
    assert same(was, state_of(m)) and df.loc['total','params']==n_params(m) and df.loc['total','macs']==n_macs(m, X)
    assert df.loc['4','output']==(1,16,12,12) and df.loc['4','shape']==(16,16,3,3) and df.loc['4','macs']==16*16*9*144 and df.loc['7','type']=='Linear'
    assert '21,216' not in repr(df) and f'{n_macs(m, X):,}' in repr(df) and '<table' in df._repr_html_()
    assert not nn.modules.module._global_forward_hooks

def test_effective_zeros():
    "Masks and parametrizations are applied before zeros are counted; shared weights count once"
    a = nn.Linear(10, 10, bias=False)
    prune.random_unstructured(a, 'weight', amount=.3)
    assert (n_params(a),n_nonzero(a))==(100,70)
    class Half(nn.Module):
        def forward(self, w): return w.tril()
    b = nn.Linear(10, 10, bias=False)
    nn.utils.parametrize.register_parametrization(b, 'weight', Half())
    assert (n_params(b),n_nonzero(b))==(100,55) and summary(b, torch.ones(1,10)).loc['total','params']==100
    c = parametrizations.weight_norm(nn.Linear(10, 10))
    assert n_nonzero(c)==n_params(c)==120
    d = nn.Sequential(nn.Linear(4,4), nn.Linear(4,4))
    d[1].weight = d[0].weight
    assert n_params(d)==n_nonzero(d)==24 and summary(d, torch.ones(1,4)).loc['total','params']==24

def test_bytes_are_those_of_a_file(tmp_path):
    m = net()
    torch.save(m.state_dict(), tmp_path/'model.pt')
    assert n_bytes(m)==(tmp_path/'model.pt').stat().st_size

def test_accuracy_over_any_data():
    "The same count from tensors, batches, a torch DataLoader, a generator, a fastai DataLoaders; data are read once for all models"
    m,x,y = net(),torch.randn(300,3,16,16),torch.randint(0,4,(300,))
    with torch.no_grad(): want = int((m.eval()(x).argmax(1)==y).sum())
    m.train()
    pairs,items = [(x[:200],y[:200]),(x[200:],y[200:])],list(zip(x,y))
    dls = DataLoaders(DataLoader(items[:10], bs=5), DataLoader(items, bs=64))
    for data in ((x,y), pairs, torch.utils.data.DataLoader(items, batch_size=64), (o for o in pairs), dls):
        right = told_right(m, m, data=data, progress=False)
        assert right.shape==(2,300) and right.sum(1).tolist()==[want,want]
    rep = report(m, m, (o for o in pairs), repeats=6, progress=False)  # the first batch gives the inputs, and counts
    assert rep.right.tolist()==[want,want] and rep.of.tolist()==[300,300] and rep.attrs['about'].startswith('1×3×16×16')

def test_segmentation_and_own_correctness():
    seg = nn.Conv2d(3, 5, 1)
    assert told_right(seg, data=(torch.randn(4,3,8,8), torch.randint(0,5,(4,8,8)))).shape==(1,256)
    two = nn.Sequential(nn.Flatten(), nn.Linear(4,1))
    x,y = torch.randn(20,4),torch.randint(0,2,(20,1)).float()
    with pytest.raises(ValueError, match='correct'): told_right(two, data=(x,y))
    with torch.no_grad(): assert told_right(two, data=(x,y), correct=lambda out, y: (out>0)==y.bool()).sum()==((two(x)>0)==y.bool()).sum()

@pytest.mark.parametrize('args,kwargs,says', [
    ((), {}, 'takes models'), (({},), {}, 'takes models'), ((None,), {}, 'takes models'), (([1],), {}, 'nn.Module, not a list'), (('resnet18',), {}, "nn.Module, not 'resnet18'"), ((net(),None,X), {}, 'takes models'),
    ((net(),net(7)), dict(example_inputs=X), 'do not do the same'), ((net(),net()), dict(repeats=3), 'at least 6'), ((net(),net()), dict(repeats=True), 'at least 6'),
    ((net(),net()), dict(threads=0), 'threads'), ((net(),), dict(warmup=-1), 'warmup'), ((net(),[(X,torch.zeros(1, dtype=torch.long))]), dict(data=[1]), 'given twice'),
    ((net(),5), {}, 'iterable of batches'), ((net(),[]), {}, 'data has no batches'), ((net(),iter([])), {}, 'data has no batches'), ((net(),X[:0]), {}, 'data has no batches'), ((net(),(X,torch.zeros(2, dtype=torch.long))), {}, 'differ in number'),
    ((net(),torch.tensor(1.)), {}, 'no axis'), ((net(),[(X,3)]), {}, 'labels of a batch must be tensors, not int'), ((net(),[('a','b')]), {}, 'inputs of a batch must be tensors, not str'), ((net(),[()]), {}, 'an empty tuple'), ((net(),'data'), {}, 'not a str'),
    ((net(),torch.utils.data.TensorDataset(X)), {}, 'pass a DataLoader of it'), ((net(),X), dict(correct=torch.eq), 'data has no labels'), ((dict(a=net(), b=3),), {}, 'nn.Module'), ((nn.LazyLinear(3),), {}, 'no shape yet'),
    ((net(),net().to('meta')), dict(example_inputs=X), 'is on the meta device and has no values: load them first')])
def test_wrong_arguments(args, kwargs, says):
    with pytest.raises((ValueError,TypeError), match=says): report(*args, **kwargs)

def test_a_learner_is_told_from_its_model():
    class Learner: model = net()
    for f in (n_params, n_bytes, summary, report):
        with pytest.raises(TypeError): f(Learner())
    for f in (n_params, report, lambda o: report(o, (X,torch.zeros(1, dtype=torch.long))), lambda o: report(dict(a=o))):
        with pytest.raises(TypeError, match="it has a `.model`, pass that"): f(Learner())
    Learner.dls = None
    with pytest.raises(ValueError, match='pass its `.dls`'): report(net(), Learner())

def test_half_precision_beside_single():
    "Inputs are cast for each model"
    rep = report(net(), net().half(), example_inputs=X, repeats=6)
    assert rep.bytes['after']<.7*rep.bytes['before']

def test_zeros_are_no_speed():
    "Zero filters: remove them; scattered zeros and tied ones: nothing to remove; removed: nothing to say"
    m = net()
    Sparsifier(m, 'filter', 'local', 'large_final').sparsify_model(50)
    small = Pruner().prune_model(m, X)
    s = net()
    Sparsifier(s, 'weight', 'local', 'large_final').sparsify_model(50)
    rep = report(dict(dense=net(), sparse=m, pruned=small, scattered=s), example_inputs=X, repeats=6)
    said = {o:[n for n in rep.notes if n.startswith(f'{o}: ') and 'zeros' in n] for o in rep.index}
    assert not said['dense'] and not said['pruned'] and '16 channels can be removed' in said['sparse'][0] and 'scattered' in said['scattered'][0]
    assert rep.macs['sparse']==rep.macs['dense']>rep.macs['pruned'] and rep.bytes['sparse']==rep.bytes['dense']

def test_accuracy_within_chance_or_not():
    class Says(nn.Module):
        def __init__(self, right):
            super().__init__()
            self.w,self.right = nn.Parameter(torch.ones(1)),right
        def forward(self, x): return torch.stack([x[:,0]<self.right,x[:,0]>=self.right], 1)*self.w
    x,y = torch.arange(1000.)[:,None],torch.zeros(1000, dtype=torch.long)
    notes = report(Says(900), Says(898), data=(x,y), repeats=6).notes
    assert any('accuracy 89.80 %, 90.00 % with before' in o and 'within the noise' in o and 'before is correct where the other is wrong on 2 of 1,000' in o for o in notes)
    notes = report(Says(900), Says(850), data=(x,y), repeats=6).notes
    assert any('accuracy 85.00 %' in o and 'larger than chance' in o for o in notes)
    assert '90.00 % (88.0 – 91.7)' in repr(report(Says(900), data=(x,y), repeats=6))

# --- data without labels, and labels that are no classes

def quick(*args, **kwargs): return report(*args, repeats=6, warmup=0, progress=False, **kwargs)

class Named(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, a, b=0.): return self.m(a+b)

IMAGES = torch.randn(300, 3, 16, 16, generator=torch.Generator().manual_seed(1))
UNLABELLED = {'tensor': IMAGES, 'tuple of one': (IMAGES,), 'array': IMAGES.cpu().numpy(), 'dict': dict(a=IMAGES, b=IMAGES), 'dict of an array': dict(a=IMAGES.cpu().numpy()), 'dicts': [dict(a=IMAGES[:150]), dict(a=IMAGES[150:])],
    'tensors': list(IMAGES.split(100)), 'tuples': [(o,) for o in IMAGES.split(100)], 'labels that are None': [(IMAGES,None)], 'generator': (o for o in IMAGES.split(100)),
    'DataLoader': torch.utils.data.DataLoader(IMAGES, 100), 'DataLoader of tuples': torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES), 100)}

@pytest.mark.parametrize('name', UNLABELLED)
def test_inputs_without_labels(name):
    "Time and sizes as always; instead of accuracy, how far outputs agree"
    a,b = Named(net()),Named(net())
    with torch.no_grad():
        for m in (a,b): m.m[-1].bias -= m.m.eval()(IMAGES).mean(0)  # so that all classes are likely
        b.m[-1].weight[0] *= 1.5
        x = IMAGES*2 if name=='dict' else IMAGES
        want = int((a.eval()(x).argmax(1)==b.eval()(x).argmax(1)).sum()),float((a(x)-b(x)).abs().max())
    rep = quick(a, b, UNLABELLED[name])
    assert 0<want[0]<300 and rep.of.tolist()==[300,300] and rep.same.tolist()==[300,want[0]] and rep.difference['after']==pytest.approx(want[1], rel=1e-4) and 'accuracy' not in rep
    assert rep.notes[0]=='accuracy is not measured: the data has no labels' and 'same class' in repr(rep) and 'largest difference' in rep._repr_html_() and len(show_report(rep))==3
    assert rep.attrs['about'].startswith('1×3×16×16')

def test_data_by_name_and_alone():
    rep = quick(net(), data=IMAGES)
    assert rep.same.tolist()==[300] and 'same class' not in repr(rep)
    assert quick(dict(a=net(), b=net()), dict(input=IMAGES)).of.tolist()==[300,300]
    assert 'of' not in quick(net(), net(), None, example_inputs=X)

@pytest.mark.parametrize('y,says', [(torch.rand(40), 'numbers (float32)'), (torch.rand(40,4), 'numbers (float32)'), (torch.randint(0,2,(40,4)).float(), '(out>0)==y.bool()'),
                                    (torch.randint(0,9,(40,9)), '(40, 9) do not fit'), ((torch.zeros(40), torch.ones(40)), 'several labels')])
def test_labels_that_are_no_classes(y, says):
    "No accuracy is invented: a note says why there is none, and what to pass"
    rep = quick(net(), net(), [(IMAGES[:40], y)])if isinstance(y, torch.Tensor) else quick(net(), net(), Two((IMAGES[:40],*y)))
    assert 'accuracy' not in rep and rep.difference.tolist()==[0,0] and says in rep.notes[0] and 'pass `correct`' in rep.notes[0]

class Two(list):
    "One batch of an input and two labels"
    n_inp = 1
    def __init__(self, batch): super().__init__([batch])

def test_correct_sees_all_labels():
    y,z = torch.randint(0,4,(40,)),torch.rand(40)
    rep = quick(net(), net(), Two((IMAGES[:40],y,z)), correct=lambda out, ys: out.argmax(1)==ys[0])
    assert rep.right['before']==told_right(net(), data=(IMAGES[:40],y)).sum()

def test_one_output_is_no_class():
    rep = quick(net(1), net(1), (IMAGES[:40], torch.randint(0,2,(40,))))
    assert 'one output' in rep.notes[0] and 'same' not in rep and rep.difference['after']==0

@pytest.mark.parametrize('shape', [(40,), (40,1)])
@pytest.mark.parametrize('dtype', [torch.int8, torch.int64, torch.bool])
def test_labels_in_a_column(shape, dtype):
    "fastai's tables have labels [n, 1] of 8 bits"
    y = torch.randint(0, 2, (40,))
    assert quick(net(), (IMAGES[:40], y.view(shape).to(dtype))).right.iloc[0]==told_right(net(), data=(IMAGES[:40],y)).sum()

def test_classes_come_second_or_last():
    words = torch.randint(0, 30, (6,11))
    class Words(nn.Sequential):
        def forward(self, x): return super().forward(x),[x]
    m,y = Words(nn.Embedding(30,8), nn.Linear(8,5)),torch.randint(0, 5, (6,11))
    y[0,:4] = -100  # as PyTorch's losses, without these
    rep = quick(m, m, (words,y))
    with torch.no_grad(): want = int((m(words)[0].argmax(-1)==y).sum())
    assert rep.right.tolist()==[want,want] and rep.of.tolist()==[62,62] and told_right(m, data=(words,y)).shape==(1,62)
    assert quick(m, m, words).of.tolist()==[66,66]  # without labels, too

def test_batches_by_name():
    "As a tokenizer and a model of words have them: dicts with `labels`, and an output whose first tensor has the scores"
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = net()
        def forward(self, pixels, shift=0.): return dict(logits=self.m(pixels+shift), hidden=pixels)
    y = torch.randint(0, 4, (300,))
    data = [dict(pixels=a, shift=torch.zeros(1), labels=b) for a,b in zip(IMAGES.split(100), y.split(100))]
    rep = quick(Classifier(), Classifier(), data)
    assert rep.right.tolist()==[int(told_right(net(), data=(IMAGES,y)).sum())]*2 and rep.of.tolist()==[300,300] and rep.attrs['about'].startswith('1×3×16×16 and 1 on')

def test_two_inputs_in_a_tuple():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = net()
        def forward(self, a, b): return self.m(a+b)
    y = torch.randint(0, 4, (300,))
    assert quick(Sum(), (IMAGES,IMAGES,y)).right.iloc[0]==told_right(net(), data=(2*IMAGES,y)).sum()

def test_pixels_are_not_samples():
    "Accuracy is of pixels; how sure it is depends on the number of images, and images are compared"
    class Says(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift,self.w = shift,nn.Parameter(torch.ones(1))
        def forward(self, x): return torch.cat([x-self.shift,self.shift-x], 1)*self.w
    x = torch.linspace(0, 1, 30)[:,None,None,None].expand(30,1,8,8)  # an image is right as a whole
    rep = quick(Says(.5), Says(.2), (x, torch.zeros(30,8,8, dtype=torch.long)))
    assert rep.of.tolist()==[1920]*2 and rep.right.tolist()==[15*64,24*64] and rep.accuracy_low['before']==pytest.approx(100*wilson(15,30)[0]) and 'on 1,920 labels of 30 samples' in rep.attrs['about']
    assert any('before has more correct answers than the other on 0 of 30 samples, after on 9' in o for o in rep.notes)

def test_labels_that_no_class_has():
    y = torch.randint(0, 4, (40,))
    y[:3] = 255
    assert '3 of 40 labels are no class of the model, so no answer to them is correct' in quick(net(), (IMAGES[:40],y)).notes

def test_correct_has_to_say_which():
    for correct in (lambda out, y: (out.argmax(1)==y).float().mean(), lambda out, y: 1, lambda out, y: out.argmax(1)):
        with pytest.raises(ValueError, match='must return a tensor of booleans'): quick(net(), (IMAGES, torch.zeros(300, dtype=torch.long)), correct=correct)

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers(bad):
    m = net()
    with torch.no_grad(): m[4].weight[1,2] = bad
    rep = quick(net(), m, IMAGES[:8])
    assert 'after: 9 of its parameters are NaN or infinite (4.weight), so its outputs may mean nothing' in rep.notes and not np.isfinite(rep.difference['after'])

def test_subclasses_are_plain_tensors():
    "Models and `correct` see plain tensors, and plain tensors are compared"
    class Mine(torch.Tensor): pass
    seen = []
    class Looks(nn.Sequential):
        def forward(self, x):
            seen.append(type(x))
            return super().forward(x).as_subclass(Mine)
    y = torch.randint(0, 4, (40,)).as_subclass(Mine)
    rep = quick(Looks(net()), Looks(net()), (IMAGES[:40].as_subclass(Mine), y))
    assert set(seen)=={torch.Tensor} and rep.right['before']==told_right(net(), data=(IMAGES[:40],y)).sum()

def test_notes_tell_uncounted_operations():
    class Spectral(nn.Sequential):
        def forward(self, x): return torch.linalg.svdvals(super().forward(x))
    assert any('not counted' in o and 'svd' in o for o in report(Spectral(nn.Linear(8,4)), example_inputs=torch.randn(2,5,8), repeats=6).notes)

def test_recurrent_layers_are_counted():
    "Each step of an LSTM multiplies what comes in and the state: 4·16·(8+16) for each of 5 steps"
    assert sum(ChannelGraph(nn.LSTM(8,16), torch.randn(5,2,8)).macs().values())==4*16*(8+16)*5*2//5  # the first axis, here time, is taken for the batch

def test_report_is_a_data_frame():
    zero = net()
    nn.init.zeros_(zero[4].weight)
    rep = report(net(), zero, example_inputs=X, repeats=6, channels_last=True)
    assert rep.ms.dtype==float and rep.cl_speedup['before']==1 and type(rep[['ms']]).__name__=='DataFrame'
    back = pickle.loads(pickle.dumps(rep))
    assert back.equals(rep) and back.notes==rep.notes and repr(back)==repr(rep)
    assert '<li>' in rep._repr_html_() and 'channels-last' in repr(rep) and '<code>' in rep._repr_html_()
    assert len(show_report(rep))==4 and rep.index.tolist()==['before','after'] and rep.notes

def test_median_interval_covers():
    "Counted out: the chance that both ends lie on one side of the median is 5 % at most, and would not be one step further in"
    from math import comb
    for n in range(6, 60):
        k = int(median_interval(range(n)).low)+1
        outside = lambda k: 2*sum(comb(n,i) for i in range(k))/2**n
        assert outside(k)<=.05<outside(k+1)

@given(st.integers(0,400), st.integers(1,400))
def test_wilson_solves_its_equation(k, n):
    "Both ends are where the share that was seen is 1.96 standard deviations away"
    k = min(k, n)
    for p in wilson(k, n):
        if 0<p<1: assert abs(abs(k/n-p)-1.959964*(p*(1-p)/n)**.5)<1e-6
    assert wilson(k, n)[0]<=k/n<=wilson(k, n)[1]

@given(st.integers(0,60), st.integers(0,60))
def test_sign_test(a, b):
    from math import comb
    assert sign_test(a, b)==pytest.approx(min(1, 2*sum(comb(a+b,i) for i in range(min(a,b)+1))/2**(a+b)))==sign_test(b, a)

def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod

def test_walkthrough_runs(tmp_path, capsys, monkeypatch):
    "The example on few digits: every stage is there, no later one has more parameters, and what is lossless loses nothing"
    mod = script(ROOT/'examples/walkthrough.py')
    data = importlib.import_module('data')
    monkeypatch.setattr(data, 'FASHION', tmp_path/'missing')
    rep = mod.main(tmp_path/'w.png', n=256, epochs=1, vgg=False)
    assert rep.index.tolist()==['baseline','sparse','pruned','folded','decomposed','tuned','distilled'] and (tmp_path/'w.png').stat().st_size>5000
    assert rep.params.is_monotonic_decreasing and rep.params['tuned']==rep.params['distilled'] and rep.right['sparse']==rep.right['pruned']==rep.right['folded'] and rep.macs['pruned']<.6*rep.macs['sparse']
    assert 'digits' in capsys.readouterr().out

def test_speed_benchmark_runs():
    rep = script(ROOT/'benchmarks/speed.py').measure('squeezenet1_1', torch.randn(1,3,64,64), threads=1, repeats=6)
    assert rep.macs_ratio['after']>2 and {'ms','cl_ms'}<={*rep}

@pytest.mark.parametrize('wrong', [None, 5, 'table', [1,2], nn.Linear(3, 3), pd.DataFrame(), pd.DataFrame(dict(layer=['a'], before=[1.])), pd.DataFrame(dict(block=[], influence=[], macs_share=[]))], ids=str)
def test_show_influence_of_something_else(wrong):
    with pytest.raises(ValueError, match='the table that block_influence gives'): show_influence(wrong)

class NextWord(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 9)
    def forward(self, ids, mask=None, label=None): return self.words(ids)

def test_labels_of_the_next_word():
    "Where labels are what goes in, a network that says it again would be right: told in place of an accuracy"
    ids = torch.arange(24).view(4,6)%9
    for labels in (ids,ids.masked_fill(ids==3, -100)):
        rep = report(NextWord(), NextWord(), [dict(ids=ids, mask=torch.ones_like(ids), labels=labels)], repeats=6)
        assert 'accuracy' not in rep and any('shifted by one position' in o for o in rep.notes) and rep.of['before']==24
    rep = report(NextWord(), [dict(ids=ids, labels=ids)], repeats=6, correct=lambda out, y: out[:,:-1].argmax(-1)==y[:,1:])
    assert rep.of.item()==20 and 'accuracy' in rep
    rep = report(NextWord(), [dict(ids=ids, mask=torch.ones_like(ids), labels=torch.ones_like(ids))], repeats=6)
    assert 'accuracy' in rep

def test_labels_under_another_name():
    ids = torch.arange(24).view(4,6)%9
    rep = report(NextWord(), [dict(ids=ids, label=ids)], repeats=6)
    assert any("under 'labels', and 'label' goes to the model" in o for o in rep.notes)

def test_a_loss_before_the_scores():
    "As networks of transformers return it where labels go in under other names than `labels`"
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 3)
        def forward(self, x, place=None):
            scores = self.l(x)
            return (nn.functional.cross_entropy(scores, place),scores) if place is not None else scores
    torch.manual_seed(0)
    rep = report(WithLoss(), WithLoss(), [dict(x=torch.randn(8,4), place=torch.arange(8)%3)], repeats=6)
    assert rep.of['before']==8 and 0<rep.same['after']<8
