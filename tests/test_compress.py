"""`compress`: bytes and answers are met, on networks of all kinds, and nothing is left behind after an error"""
import itertools, math, os, warnings
from copy import deepcopy
import numpy as np, pytest, torch
from torch import nn
from fasterai.quantize.all import kmeans, load_compressed, save_compressed
from fasterai.quantize.compress import Compressed, compress
from fasterai.quantize.rates import Coded, Rates
from tiny import Net

def size(model, tmp_path):
    save_compressed(model, tmp_path/'model')
    return os.path.getsize(tmp_path/'model')

def trained(model, x, y, steps=40):
    opt = torch.optim.Adam(model.train().parameters(), 1e-2)
    for _ in range(steps):
        out = model(**x) if isinstance(x, dict) else model(x)
        nn.functional.cross_entropy(out.flatten(0, -2), y.flatten()).backward()
        opt.step()
        opt.zero_grad()
    return model.eval()

def signs(n, seed, *shape):
    "Inputs, and which of four kinds each is: the signs of two sums"
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    halves = x.flatten(1).tensor_split(2, 1)
    return x, 2*(halves[0].sum(1)>0)+(halves[1].sum(1)>0)

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(16,32), nn.ReLU(), nn.Linear(32,32), nn.ReLU(), nn.Linear(32,4))

@pytest.fixture(scope='module')
def known():
    torch.manual_seed(0)
    x,y = signs(400, 0, 16)
    return trained(mlp(), x, y, 80),x,signs(400, 1, 16)[0]

def same(a, b, x):
    with torch.no_grad(): return (a(x).argmax(-1)==b(x).argmax(-1)).float().mean().item()

# budgets

@pytest.mark.parametrize('share', [.6,.3,.12])
def test_bytes_are_met_and_nearly_used(known, tmp_path, share):
    dense,x,_ = known
    small = deepcopy(dense)
    limit = int(share*size(dense, tmp_path))
    res = compress(small, x, bytes=limit)
    assert isinstance(res, Compressed) and res.n_bytes==size(small, tmp_path) and .85*limit<=res.n_bytes<=limit
    again = load_compressed(tmp_path/'model', mlp().eval())
    assert torch.equal(again(x), small(x))

def test_agreement_is_met_on_what_was_held_out(known, tmp_path):
    dense,x,held = known
    sizes = []
    for least in (1.,.97,.8):
        small = deepcopy(dense)
        res = compress(small, x, agreement=least, held=held)
        assert same(small, dense, held)==pytest.approx(res.agreement) and res.agreement>=least
        sizes.append(size(small, tmp_path))
    assert sizes==sorted(sizes, reverse=True) and sizes[0]<size(dense, tmp_path)/2

def test_a_quarter_is_held_out_if_nothing_else_is_given(known):
    dense,x,held = known
    small = deepcopy(dense)
    assert compress(small, x, agreement=.95).agreement>=.95 and same(small, dense, held)>.85

def test_better_than_sparsifying_and_sharing_apart(known, tmp_path):
    "At the bytes of 80 % of the weights zeroed and two bits for the rest, more answers stay"
    from fasterai.quantize.all import KMeansQuantizer
    from fasterai.sparse.all import Sparsifier
    dense,x,held = known
    apart,both = deepcopy(dense),deepcopy(dense)
    Sparsifier(apart, 'weight', 'global', layer_type=nn.Linear).sparsify_model(80)
    KMeansQuantizer(2).quantize(apart)
    compress(both, x, bytes=size(apart, tmp_path))
    assert same(both, dense, held)>same(apart, dense, held)

def test_evaluate_judges(known):
    dense,x,held = known
    calls = []
    def score(m):
        calls.append(m)
        return 10*same(m, dense, held)
    small = deepcopy(dense)
    res = compress(small, x, agreement=.95, evaluate=score)
    assert res.agreement>=.95 and same(small, dense, held)>=.95 and all(m in (small,) for m in calls)

def test_answers_of_ones_own(known):
    dense,x,held = known
    small = deepcopy(dense)
    res = compress(small, x, agreement=1., held=held, answers=lambda out: ['a' if o>0 else 'b' for o in (out[:,0]-out[:,1]).tolist()])
    with torch.no_grad(): assert torch.equal(small(held)[:,0]>small(held)[:,1], dense(held)[:,0]>dense(held)[:,1]) and res.agreement==1

def test_without_data_bytes_are_met(known, tmp_path):
    dense,_,held = known
    small = deepcopy(dense)
    res = compress(small, bytes=1500)
    assert res.n_bytes<=1500 and res.agreement is None and set(res.to_df().by)=={'size'} and same(small, dense, held)>.7

# rates

def test_higher_prices_give_fewer_bits():
    torch.manual_seed(0)
    w = torch.randn(40, 30)
    for factor in (None, torch.linalg.cholesky(torch.linalg.inv(torch.eye(40)+.5), upper=True)[...,None]):
        found = [Coded(w, torch.ones(1), factor).choose(o) for o in (1e-4,1e-3,1e-2,1e-1,1.,1e3)]
        bits,harm = ([getattr(o, a) for o in found] for a in ('bits','distortion'))
        assert bits==sorted(bits, reverse=True) and harm==sorted(harm) and not found[-1].levels.any()

def test_the_best_level_is_the_best_of_all():
    "Beside a search through all levels"
    rng = np.random.default_rng(0)
    x,weight = rng.normal(size=(6,5)).astype(np.float32)*3,rng.uniform(.1, 5, (6,5)).astype(np.float32)
    rates = Rates(np.rint(x))
    best,cost = rates.best(x, weight)
    for i,j in itertools.product(range(6), range(5)):
        def total(k): return weight[i,j]*(x[i,j]-k)**2+(rates.zero[i,j] if k==0 else rates.other[i,j]+rates.values[k+rates.most])
        ways = [total(k) for k in (0, *(k*int(np.sign(x[i,j])) for k in range(1, rates.most+1) if abs(k-abs(x[i,j]))<2))]
        assert cost[i,j]==pytest.approx(min(ways), rel=1e-5)

def test_error_that_others_make_up_for():
    "With H, less changes in the output, and the distortion is what it is with H"
    torch.manual_seed(0)
    w,x = torch.randn(24, 8),torch.randn(24, 6)@torch.randn(6, 500)+.1*torch.randn(24, 500)
    hess = (x@x.T).double()/500+.01*torch.eye(24)
    fed = Coded(w, torch.ones(1), torch.linalg.cholesky(torch.linalg.inv(hess), upper=True)[...,None]).choose(.05)
    gap = (w-fed.values).double()
    assert fed.distortion==pytest.approx(float(((gap.T@hess)*gap.T).sum()), rel=1e-3)
    alone = Coded(w, hess.diagonal()[:,None]).choose(.5)
    other = (w-alone.values).double()
    assert fed.bits<alone.bits and fed.distortion<float(((other.T@hess)*other.T).sum())

def test_bits_are_those_of_the_file(tmp_path):
    torch.manual_seed(0)
    w = torch.randn(256, 256)
    model = nn.Linear(256, 256, bias=False)
    for price in (1e-2,1e-1,.5):
        o = Coded(w, torch.ones(1)).choose(price)
        model.weight.data = o.values
        assert 8*size(model, tmp_path)==pytest.approx(o.bits, rel=.06)

# weighted k-means

def least(x, h, k):
    "The least weighted sum of squares, over all ways to cut the sorted data"
    order = x.argsort()
    v,w = x[order].double().tolist(),h[order].double().tolist()
    def cost(a, b):
        mean = sum(p*q for p,q in zip(v[a:b], w[a:b]))/sum(w[a:b])
        return sum(q*(p-mean)**2 for p,q in zip(v[a:b], w[a:b]))
    return min(sum(cost(a, b) for a,b in zip((0,*cuts), (*cuts,len(v)))) for cuts in itertools.combinations(range(1, len(v)), k-1))

@pytest.mark.parametrize('seed', range(20))
def test_weighted_kmeans_is_the_best_of_all_ways(seed):
    gen = torch.Generator().manual_seed(seed)
    x,h = torch.randn(9, generator=gen),torch.rand(9, generator=gen)**4*100
    for k in (1,2,3,4): assert float((h*(x-kmeans(x, k, weight=h).shared)**2).sum())==pytest.approx(least(x, h, k), rel=1e-4, abs=1e-6)

def test_weights_that_are_all_the_same_change_nothing():
    torch.manual_seed(0)
    for x in (torch.randn(5000), torch.randn(4, 700)):
        for zeros in (False,True):
            a,b = kmeans(x, 7, keep_zeros=zeros),kmeans(x, 7, keep_zeros=zeros, weight=torch.full_like(x, 3.))
            assert torch.allclose(a.values, b.values, atol=1e-4)

def test_what_counts_more_is_nearer():
    torch.manual_seed(0)
    x,h = torch.randn(20_000),torch.rand(20_000)**8
    def harm(c): return float((h*(x-c.shared)**2).sum())
    assert harm(kmeans(x, 8, weight=h*(1+9*(x>1))))>0 and harm(kmeans(x, 8, weight=h))<=harm(kmeans(x, 8)) and kmeans(x, 8, weight=1e-3+(x>0)).values.gt(0).sum()>=6

@pytest.mark.parametrize('weight', [torch.ones(3), torch.tensor([1.,-1,1,1]), torch.tensor([1.,math.nan,1,1]), 2.], ids=str)
def test_wrong_weights(weight):
    with pytest.raises(ValueError, match='weight'): kmeans(torch.randn(4), 2, weight=weight)

# networks of all kinds

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table,self.rnn,self.out = nn.Embedding(20, 12),nn.LSTM(12, 16, bidirectional=True, batch_first=True),nn.Linear(32, 20)
    def forward(self, ids): return self.out(self.rnn(self.table(ids))[0])

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table,self.out = nn.Embedding(20, 16),nn.Linear(16, 20, bias=False)
        self.out.weight = self.table.weight
    def forward(self, input_ids, scale=None): return self.out(torch.tanh(self.table(input_ids)))

def convs(): return nn.Sequential(nn.Conv2d(4,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3,groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8,6,2,groups=2), nn.GroupNorm(2, 6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24,4))
def attention(): return nn.Sequential(nn.Linear(8,16), nn.TransformerEncoderLayer(16, 2, 32, dropout=0., batch_first=True), nn.Flatten(), nn.Linear(64,4))

def ids(seed, n=64): return torch.randint(20, (n,6), generator=torch.Generator().manual_seed(seed))

KINDS = dict(
    conv=(convs, lambda s: signs(128, s, 4, 6, 6)),
    attention=(attention, lambda s: signs(128, s, 4, 8)),
    lstm=(Tagger, lambda s: (ids(s), ids(s).roll(1, 1))),
    gru=(lambda: Net(lambda s,x: s.out(s.rnn(x)[0][:,-1]), rnn=nn.GRU(8, 12, 2, batch_first=True), out=nn.Linear(12, 4)), lambda s: signs(128, s, 4, 8)),
    tied=(Tied, lambda s: (dict(input_ids=ids(s)), ids(s))))

@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_of_layer(kind, tmp_path):
    make,data = KINDS[kind]
    torch.manual_seed(0)
    (x,y),(held,_) = data(0),data(1)
    dense = trained(make(), x, y)
    small = deepcopy(dense)
    flags = [p.requires_grad for p in small.parameters()]
    res = compress(small, [x], agreement=.95, held=[held])
    df = res.to_df()
    assert res.agreement>=.95 and res.n_bytes==size(small, tmp_path)<.6*size(dense, tmp_path)
    assert not small.training and [p.requires_grad for p in small.parameters()]==flags and all(p.grad is None for p in small.parameters())
    assert set(df.by)<={'inputs','gradients','size'} and 'inputs' in set(df.by) and (df.numbers>=df.zeros).all()
    if kind=='tied': assert small.out.weight is small.table.weight
    if kind in ('lstm','gru'): assert (df.filter(like='weight_', axis=0).by=='inputs').all() or kind=='gru'

def test_normalized_layers_train_on_as_before():
    "Scaled filters and a batch normalization give in training what they gave"
    from fasterai.core.reads import reads_of
    from fasterai.quantize.compress import _even
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,4,1,bias=False), nn.BatchNorm2d(4)),torch.randn(16,3,8,8)
    for _ in range(50): net(3*x+1)
    evened = deepcopy(net)
    with torch.no_grad(): assert _even(evened, reads_of(evened, x)[0], lambda t: None)=={'1.running_var','4.running_var'}
    for mode in (net.eval,evened.eval,net.train,evened.train):
        mode()
        if net.training==evened.training: assert torch.allclose(net(x), evened(x), atol=1e-3)
    assert not evened[0].bias.any()

def test_zeros_stay_zeros(known):
    dense,x,_ = known
    small = deepcopy(dense)
    gone = [torch.rand(p.shape)<.5 for p in small.parameters() if p.dim()>1]
    for m,p in zip(gone, (p for p in small.parameters() if p.dim()>1)): p.data[m] = 0
    compress(small, x, bytes=1500)
    for m,p in zip(gone, (p for p in small.parameters() if p.dim()>1)): assert not p[m].any()

def test_wrappers(known, tmp_path):
    dense,x,held = known
    plain,wrapped = deepcopy(dense),nn.DataParallel(deepcopy(dense))
    assert compress(plain, x, agreement=.95).n_bytes==compress(wrapped, x, agreement=.95).n_bytes
    assert torch.equal(plain(held), wrapped.module(held))

def test_loaders_of_pairs(known):
    dense,x,held = known
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(len(x))), batch_size=50)
    small = deepcopy(dense)
    assert compress(small, loader, agreement=.95).agreement>=.95 and same(small, dense, held)>.9

def test_half_precision(known, tmp_path):
    dense,x,held = known
    small = deepcopy(dense).bfloat16()
    was = deepcopy(small)
    assert compress(small, x.bfloat16(), bytes=1500).n_bytes<=1500 and same(small, was, held.bfloat16())>.9

# the same, and as before

def test_the_same_twice(known):
    dense,x,_ = known
    a,b = deepcopy(dense),deepcopy(dense)
    torch.manual_seed(1)
    compress(a, x, bytes=1500)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    compress(b, x, bytes=1500)
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())

def unchanged(model, f):
    before = deepcopy(model.state_dict())
    mode,flags = model.training,[p.requires_grad for p in model.parameters()]
    f()
    assert all(torch.equal(a, b) for a,b in zip(before.values(), model.state_dict().values())) and model.training==mode and flags==[p.requires_grad for p in model.parameters()]

def test_after_an_error_the_model_is_as_it_was():
    torch.manual_seed(0)
    x,y = signs(64, 0, 4, 6, 6)
    model = trained(convs(), x, y)
    calls = []
    def breaks(m):
        calls.append(m)
        if len(calls)>2: raise KeyError('broken')
        return 1.
    def run(error, **kwargs):
        with pytest.raises(error): compress(model, x, **kwargs)
    unchanged(model, lambda: run(KeyError, agreement=.9, evaluate=breaks))
    unchanged(model, lambda: run(ValueError, bytes=200))
    unchanged(model, lambda: run(ValueError, agreement=.9, evaluate=lambda m: 2. if len(calls.append(m) or calls)==4 else 1e-3))

@pytest.mark.parametrize('kwargs,says', [
    (dict(), 'either bytes or agreement, not neither'), (dict(bytes=1000, agreement=.9), 'not both'), (dict(bytes=0), 'bytes is a number above 0'), (dict(bytes='1 MB'), "not '1 MB'"),
    (dict(agreement=99), 'agreement is a share'), (dict(agreement=True), 'agreement is a share'), (dict(agreement=.9, answers='top1'), 'answers is a function'),
    (dict(agreement=.9, evaluate=.5), 'evaluate is a function'), (dict(agreement=.9, evaluate=lambda m: 0.), 'above 0'), (dict(bytes=50), 'the smallest one has')], ids=lambda o: str(o)[:30])
def test_wrong_arguments(known, kwargs, says):
    dense,x,_ = known
    model = deepcopy(dense)
    def run():
        with pytest.raises(ValueError, match=says): compress(model, x, **kwargs)
    unchanged(model, run)

def test_wrong_data(known):
    dense,x,_ = known
    model = deepcopy(dense)
    for data,says in ((None, 'needs data'), (x[:1], 'one sample'), ([], 'no batch'), (torch.randn(4, 7), 'does not run|takes|shapes')):
        with pytest.raises(ValueError, match=says): compress(model, data, agreement=.9)
    with pytest.raises(ValueError, match='no scores'): compress(nn.Linear(16, 1), x, agreement=.9)

def test_what_is_left_is_told(known):
    _,x,_ = known
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 4)).eval()
    before = deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match='left as it was'): compress(model, x, bytes=2500)
    changed = {k for k,v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed=={'0.bias','1.weight','1.bias'}

def test_nan_is_refused():
    model = mlp()
    model[1].weight.data[0,0] = math.nan
    with pytest.raises(ValueError, match='nan'): compress(model, torch.randn(8, 16), bytes=1000)

def test_inputs_that_never_change():
    "What is constant or zero has no variance, but for rounding"
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    x[:,:6],x[:,6:9] = torch.tensor([0.,1e-6,1.,100.,1e4,-7.]),0.
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    model[0].bias.data[:20] = -1e6  # these never fire
    was = deepcopy(model)
    assert compress(model, x, agreement=.9).agreement>=.9 and same(model, was, x)>.8

# features that are too many for one H

class _Few:
    "`compress` keeps H whole of so few features"
    def __init__(self, monkeypatch, most):
        from fasterai.quantize import compress as module
        for name in ('_MOST_FEATURES','_SPAN'): monkeypatch.setattr(module, name, most)

@pytest.mark.parametrize('make,shape', [(lambda: nn.Conv1d(8, 12, 16, groups=2), (8,40)), (lambda: nn.Linear(48, 12), (48,)), (lambda: nn.ConvTranspose1d(6, 8, 8, groups=2), (6,20))])
def test_features_in_parts_come_back_in_their_places(monkeypatch, make, shape):
    "At a price of almost nothing, each number of a weight stays"
    torch.manual_seed(0)
    _Few(monkeypatch, 20)
    net = nn.Sequential(make(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(400, *shape)
    net(x)
    small = deepcopy(net)
    compress(small, x, agreement=1., held=x[:100])
    for a,b in zip(small.parameters(), net.parameters()): assert (a-b).abs().max()<.25*b.abs().max() and torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0,1]>.98

def test_parts_of_features_make_up_for_errors(monkeypatch, tmp_path):
    "Of inputs that go together in each part, at equal bytes, less of the output changes than by costs of each number alone"
    torch.manual_seed(0)
    mix = torch.block_diag(*(torch.randn(4, 16) for _ in range(4)))
    x = torch.randn(2000, 16)@mix+.1*torch.randn(2000, 64)
    net = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    def error(most):
        _Few(monkeypatch, most)
        small = deepcopy(net)
        res = compress(small, x, bytes=1800)
        assert res.n_bytes>1600
        with torch.no_grad(): return (small(x)-net(x)).square().mean().item()
    assert error(16)<.8*error(1)

def test_no_zero_has_a_sign(known, tmp_path):
    "-0.0 is not zero in a file: of a sparse network, inputs that make up for errors leave none"
    from fasterai.sparse.all import Sparsifier
    dense,x,_ = known
    small = deepcopy(dense)
    Sparsifier(small, 'weight', 'global', layer_type=nn.Linear).sparsify_model(70)
    zeros = {n:p==0 for n,p in small.named_parameters() if p.dim()>1}
    compress(small, x, bytes=1500)
    for n,p in small.named_parameters():
        assert not p[p==0].signbit().any()
        if n in zeros: assert not p[zeros[n]].any()
