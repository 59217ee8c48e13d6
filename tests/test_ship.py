"""`ship`, on what people bring: labels or none, loaders of fastai, keyword inputs, numbers as outputs; each step is kept only if it helps"""
import copy, warnings
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from sklearn.datasets import load_digits
from fasterai.analyze.counts import answers, most_likely
from fasterai.export.all import ONNXModel, verify_onnx
from fasterai.prune.all import load_pruned, save_pruned
from fasterai.ship import _Road, _pruned, _variance_kept, ship

X = torch.tensor(load_digits().images/8-1, dtype=torch.float32)[:,None]
Y = torch.tensor(load_digits().target)

def make(): return nn.Sequential(nn.Conv2d(1,32,3,padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32,64,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64,10))

def train(m, n=3):
    opt,gen = torch.optim.AdamW(m.parameters(), 3e-3),torch.Generator().manual_seed(0)
    for i in torch.randperm(1200, generator=gen).repeat(n).split(64):
        nn.functional.cross_entropy(m.train()(X[i]), Y[i]).backward()
        opt.step(), opt.zero_grad()
    return m.eval()

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return train(make())

class Named(nn.Module):
    "Keyword inputs, outputs in a dict, one number for a sample"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8, 64),nn.Linear(64, 1)
    def forward(self, x, shift=None): return dict(y=self.b(torch.relu(self.a(x)+(0 if shift is None else shift))))

class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)
    def forward(self, x): return self.l(x) if float(x.sum())>0 else self.l(-x)

def right(file): return 100*(ONNXModel(file)(X[1200:]).argmax(1)==Y[1200:]).float().mean().item()
quick = dict(progress=False, threads=1)

def test_bytes(net, tmp_path):
    "The file is what the table says, the network that comes back is in it, and the given one is as it was"
    state = copy.deepcopy(net.state_dict())
    res = ship(net, X[:256], tmp_path/'a.onnx', valid=(X[1200:],Y[1200:]), prune=50, may_lose=2, for_='bytes', **quick)
    kept = res.steps[res.steps.kept]
    assert res.file.n_bytes==(tmp_path/'a.onnx').stat().st_size and res.file.n_bytes<.3*res.steps.bytes['dense'] and res.file.quantized
    assert abs(right(res.file)-kept.score.iloc[-1])<1e-3 and kept.score.min()>=res.steps.score['dense']-2
    assert list(res.steps.index)==['dense','prune and repair','fold','decompose linear','decompose convolutions','int8, dynamic','int8, static']
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items()) and (kept.bytes.diff().dropna()<0).all() and 'accuracy' in str(res)
    save_pruned(res.model, tmp_path/'a.safetensors')
    assert torch.equal(load_pruned(tmp_path/'a.safetensors', make()).eval()(X[:5]), res.model(X[:5]))

def test_latency(net, tmp_path):
    "What is not faster for sure is not kept; the file gives what the network gives"
    res = ship(net, X[:128], tmp_path/'a.onnx', prune=dict(pruning_ratio=60), **quick)
    for step,o in res.steps.iterrows(): assert o.kept or o.why, step
    if not res.file.quantized: verify_onnx(res.model, res.file, X[:2])
    assert res.steps.attrs['judged']=='agreement' and 'has not seen' in res.steps.notes[0]

def test_pruning_that_costs_too_much(net, tmp_path):
    "It is left out and said so; what is allowed decides"
    with pytest.warns(UserWarning, match='is not kept.*may_lose'): res = ship(net, X[:64], tmp_path/'a.onnx', valid=(X[1200:],Y[1200:]), prune=95, may_lose=0, for_='bytes', **quick)
    assert not res.steps.kept['prune and repair'] and res.steps.score[res.steps.kept].min()>=res.steps.score['dense']
    assert sum(p.numel() for p in res.model.parameters())>.5*sum(p.numel() for p in net.parameters())

def test_finetune(net, tmp_path):
    "Trained in place of repaired: in training mode or not, what comes back is in eval mode"
    seen = []
    def tune(m): seen.append(train(m, 1).train())
    res = ship(net, DataLoader(TensorDataset(X[:256], Y[:256]), 32), tmp_path/'a.onnx', prune=50, finetune=tune, may_lose=5, for_='bytes', **quick)
    assert len(seen)==1 and res.steps.index[1]=='prune and train' and not res.model.training

def test_of_fastai(net, tmp_path):
    "What trains is fitted to, what validates judges"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader as FastLoader
    dls = DataLoaders(*(FastLoader([(X[i],Y[i]) for i in o], bs=32) for o in (range(200),range(1200,1400))))
    res = ship(net, dls, tmp_path/'a.onnx', for_='bytes', **quick)
    assert not res.steps.notes and res.steps.score['dense']==100*(net(X[1200:1400]).argmax(1)==Y[1200:1400]).float().mean().item()

def test_numbers(tmp_path):
    "Without classes, what outputs have in common is judged"
    torch.manual_seed(0)
    batches = [dict(x=torch.randn(32,8), shift=torch.zeros(32,1)) for _ in range(8)]
    res = ship(Named(), batches, tmp_path/'a.onnx', prune=25, may_lose=50, for_='bytes', **quick)
    assert res.steps.score['dense']==pytest.approx(100) and 50<=res.steps.score[res.steps.kept].iloc[-1]<100 and set(ONNXModel(res.file).inputs)=={'x','shift'}

def test_data_that_come_once(net, tmp_path):
    res = ship(net, (X[i:i+16] for i in range(0, 160, 16)), tmp_path/'a.onnx', samples=64, for_='bytes', **quick)
    assert res.file.quantized

@pytest.mark.parametrize('how, said', [(dict(for_='speed'), 'for_ must be one of'), (dict(finetune=print), 'prune='), (dict(may_lose=-1), 'percentage points'), (dict(may_lose=True), 'percentage points'),
    (dict(prune='half'), 'prun'), (dict(prune=dict(pruning_ratios=50)), 'pruning_ratios'), (dict(data=[]), 'no batches'), (dict(samples=0), 'samples'), (dict(path='/nowhere/a.onnx'), 'no folder'),
    (dict(prune=150), '150'), (dict(prune=dict(latency='half')), 'latency'), (dict(prune={'first':50}), 'no layer'), (dict(path=[(X,Y)]), 'valid='), (dict(path='/'), 'directory'), (dict(prune=50, finetune=3), 'function'),
    (dict(correct='yes'), 'function'), (dict(valid=[]), 'valid has no batches'), (dict(model=make().to('meta')), 'meta device'), (dict(threads=0), 'threads'), (dict(data='/images'), 'batches'),
    (dict(data=TensorDataset(X,Y)), 'DataLoader'), (dict(data=type('Learner', (), dict(dls=[X]))()), 'pass its `.dls`')])
def test_refused(net, tmp_path, how, said, monkeypatch):
    "Before anything is done, and nothing is written"
    monkeypatch.setattr('fasterai.ship._Road', None)
    args = dict(model=net, data=X[:32], path=tmp_path/'a.onnx')|how
    with pytest.raises((ValueError,TypeError,OSError), match=said): ship(**quick|args)
    assert not list(tmp_path.iterdir())

def test_no_graph(tmp_path):
    with pytest.raises(ValueError, match='cannot make a graph of this Stubborn'): ship(Stubborn(), torch.ones(4,4), tmp_path/'a.onnx', **quick)

def test_nothing_to_do(tmp_path):
    "What a network has not is said in the table alone, and not exported"
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        res = ship(Named(), dict(x=torch.randn(32,8)), tmp_path/'a.onnx', for_='bytes', **quick)
    fold = res.steps.loc['fold']
    assert 'nothing to fold' in fold.why and fold.isna().ms and not [o for o in told if 'fold' in str(o.message) or 'decomposed' in str(o.message)]

def test_wrapped(net, tmp_path):
    "Wrappers, and the mode that a network is in; widths by layer; a generator of fewer samples than are fitted to"
    wrapped = nn.DataParallel(copy.deepcopy(net)).train()
    res = ship(wrapped, (o for o in X[:64].split(16)), tmp_path/'a.onnx', prune={'0':50}, may_lose=100, for_='bytes', **quick)
    convs = [o for o in res.model.modules() if isinstance(o, nn.Conv2d)]
    assert wrapped.training and not res.model.training and convs[0].out_channels==16 and convs[-1].out_channels==64

def test_labels_that_are_no_class(net, tmp_path):
    res = ship(net, X[:64], tmp_path/'a.onnx', valid=(X[:64],Y[:64]+50), for_='bytes', **quick)
    assert any('64 of 64 labels are no class' in o for o in res.steps.notes)

class Words(nn.Module):
    "As those of transformers: keyword inputs, scores for each sentence"
    def __init__(self):
        super().__init__()
        self.words,self.out = nn.Embedding(20, 8),nn.Linear(8, 3)
    def forward(self, ids, mask=None, labels=None): return dict(logits=self.out(self.words(ids).mean(1)))

IDS = torch.arange(48).view(8,6)%20

@pytest.mark.parametrize('data, said', [([dict(ids=IDS[0])]*8, r'first sample of the data.*such as a DataLoader returns'), ([dict(ids=IDS.tolist())], "return_tensors='pt'"),
    ([dict(ids=IDS),dict(ids=IDS[:,:4])], r'it takes ids as \[batch, 6\].*pad inputs of other sizes')])
def test_sentences_that_do_not_fit(tmp_path, data, said):
    "Samples in place of batches, lists in place of tensors, and lengths that differ, as tokenizers give them"
    with pytest.raises(ValueError, match=said): ship(Words(), data, tmp_path/'a.onnx', **quick)

def test_numbers_that_onnx_runtime_has_not(net, tmp_path):
    with pytest.raises(ValueError, match=r'float64: export `model.float\(\)`'): ship(copy.deepcopy(net).double(), X[:8], tmp_path/'a.onnx', **quick)

def test_where_it_is_called(net, tmp_path):
    "In inference mode, too; layers narrower than a block of channels lose some for latency as well; a function that trains has gradients"
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Conv2d(1,12,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12,10))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        res = ship(narrow, X[:32], tmp_path/'a.onnx', prune=50, finetune=lambda m: m(X[:2].clone()).sum().backward(), may_lose=100, **quick)
    assert res.steps.params['prune and train']<res.steps.params['dense']

class Noisy:
    "As a loader that augments in its workers: other batches each time"
    n = 0
    def __iter__(self):
        self.n += 1
        noise = torch.randn(len(X)-1200, 1, 8, 8, generator=torch.Generator().manual_seed(self.n))
        return iter([(X[1200:]+noise,Y[1200:])])
    def __len__(self): return 1

def test_judged_by_the_same_batches(net):
    "What a step costs is told of the batches that judge the first network as well"
    road = _Road.__new__(_Road)
    road.judged,road.start,road.valid,road.correct = 'accuracy',net,Noisy(),most_likely
    found = [road.scores(copy.deepcopy(net)) for _ in range(2)]
    assert all(a==b for a,b in found) and found[0]!=found[1]

class Scaled(nn.Module):
    "Three numbers of other units, one of which hardly changes"
    def __init__(self, wrong=0., size=(1e4,1.,0.), start=(1e6,0.,3.)):
        super().__init__()
        self.wrong,self.size,self.start = (nn.Buffer(torch.tensor(o)) for o in (wrong,size,start))
    def forward(self, x): return x*self.size+self.start+self.wrong*torch.tensor([0.,1.,0.])*x.flip(0)

@pytest.mark.parametrize('batch', [1,7,60])
def test_what_numbers_have_in_common(batch):
    "It does not matter how samples are batched, nor in which units numbers are"
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    batches = [*zip(x.split(batch), x.split(batch))]
    assert _variance_kept(Scaled(), Scaled(), batches)==pytest.approx(100)
    if batch==60: assert 60<_variance_kept(Scaled(), Scaled(1.), batches)<70  # one of three is another
    assert _variance_kept(nn.Linear(3, 1), nn.Linear(3, 1), batches)>=0

def test_labels_of_none(net):
    with pytest.raises(ValueError, match='no label to compare with.*-100'): answers(net, data=(X[:8],Y[:8]*0-100), progress=False)

def test_whole_numbers_are_answers(net):
    class Best(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x): return self.net(x).argmax(1)
    found = answers(Best(), Best(), data=X[:32], progress=False)
    assert found.same==[32,32] and found.of==32

def test_a_label_that_is_text(net):
    with pytest.raises(ValueError, match='must be tensors, not str$'): answers(net, data=[(X[:8],['a']*8)], progress=False)

def test_finetune_may_return_another(net):
    tuned = []
    def tune(m): tuned.append(nn.DataParallel(copy.deepcopy(m)).train()); return tuned[0]
    new = _pruned(net, 50, [(X[:64],)], (X[:1],), tune, 'bytes', False)(None)
    assert new is tuned[0].module and not new.training

def test_outputs_that_are_no_numbers(tmp_path):
    with pytest.raises(ValueError, match='cannot be used to judge'): ship(nn.Linear(8, 1), torch.full((4,8), torch.nan), tmp_path/'a.onnx', **quick)
    assert not list(tmp_path.iterdir())

class Both(nn.Module):
    "Two inputs by position, as networks for tables have"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.out = nn.Embedding(5, 8),nn.Linear(4, 24),nn.Linear(32, 3)
    def forward(self, cat, cont): return self.out(torch.cat([self.a(cat),torch.relu(self.b(cont))], 1))

def test_several_inputs(tmp_path):
    "The last of them is no target to what is fitted"
    torch.manual_seed(0)
    cat,cont = torch.arange(40)%5,torch.randn(40, 4)
    res = ship(Both(), (cat,cont,torch.arange(40)%3), tmp_path/'a.onnx', prune={'b':50}, may_lose=100, for_='bytes', **quick)
    assert res.steps.kept['prune and repair'] and res.model.b.out_features==12 and 'example_inputs' not in res.steps.why['decompose linear']

def test_what_is_not_finite(net, tmp_path):
    "Nan is no answer: data that give nothing else are refused, and weights that hold some are told"
    with pytest.raises(ValueError, match='are not finite'): _Road(net, X[:1], [(X[:8],)], X[:8]*float('nan'), 'bytes', 1, most_likely, 1, tmp_path)
    bad = copy.deepcopy(net)
    bad[0].weight.data[0,0] = float('nan')
    found = answers(net, bad, data=(X[:20],Y[:20]), progress=False)
    assert found.right[0].sum()>10 and not found.right[1].any()
    assert answers(net, bad, data=X[:20], progress=False).same==[20,0]
    with pytest.warns(UserWarning, match='of 0.weight are nan or infinite'), pytest.raises(ValueError): ship(bad, X[:40], tmp_path/'m.onnx', prune=dict(ratio=50), progress=False)

@pytest.mark.parametrize('prune', [dict(pruning_ration=50), dict(criterion='obs')])
def test_a_misspelt_argument_of_pruner(net, tmp_path, prune):
    with pytest.raises(ValueError, match='no layer and no argument of `Pruner`: did you mean'): ship(net, X[:40], tmp_path/'m.onnx', prune=prune, progress=False)
