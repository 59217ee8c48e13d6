"Widths from what is asked for: exact counts, times from a clock that is made up, and the loss that is smallest"
import copy, itertools, math
import numpy as np
import pytest, torch, torchvision
from torch import nn
from fasterai.analyze.all import n_macs, n_params
from fasterai.analyze.counts import stored
from fasterai.analyze.budget import allocate, balance
from fasterai.analyze.times import Stopwatch, Tables, grid, in_turn, pieces
from fasterai.prune.all import PruneCallback, Pruner
from fasterai.prune import pruner as at_pruner
from fasterai.prune.targets import Axes, Counted, Target, Timed, Widths, losses
from tiny import Net, net, state, same, warnings_are

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()

class Block(nn.Module):
    "A residual, a depthwise convolution and a concatenation"
    def __init__(self, n=24):
        super().__init__()
        self.stem,self.bn = nn.Conv2d(3, n, 3, padding=1),nn.BatchNorm2d(n)
        self.wide,self.deep,self.thin = nn.Conv2d(n, 2*n, 1),nn.Conv2d(2*n, 2*n, 3, padding=1, groups=2*n),nn.Conv2d(2*n, n, 1)
        self.more,self.head = nn.Conv2d(n, n, 3, padding=1),nn.Linear(2*n, 5)
    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = x+self.thin(self.deep(self.wide(x).relu()).relu())
        return self.head(torch.cat([x,self.more(x).relu()], 1).mean((2,3)))

def vit(): return torchvision.models.VisionTransformer(image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
MODELS = dict(plain=(lambda: nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 30, 3), nn.Flatten(), nn.Linear(30*16, 7)), X),
    block=(Block, X), vit=(vit, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))))

def n_stored(model): return sum(t.numel()*t.element_size() for t in stored(model).values())
def amounts(model, x): return dict(macs=n_macs(model, x), params=n_params(model), bytes=n_stored(model))

# --- counts

@pytest.mark.parametrize('what', ['macs','params','bytes'])
@pytest.mark.parametrize('kind', MODELS)
def test_counts_are_met(kind, what):
    "What is counted afterwards is what was asked for, and no more; the model runs"
    make,x = MODELS[kind]
    m = seeded(make)
    was = amounts(m, x)[what]
    p = Pruner(m, example_inputs=x, **{what:'1.6x'})
    assert p.prune_model() is m
    now = amounts(m, x)[what]
    assert abs(1.6*now/was-1)<.05 and p.met['left']==now and p.met['was']==was and m(x).shape[1] in (5,7)

def test_no_channel_more_fits():
    "A single channel of any group is more than what is spare"
    m = seeded(MODELS['plain'][0])
    budget = n_params(m)/2
    p = Pruner(m, params='50%', example_inputs=X)
    p.prune_model()
    a,b = m[0].out_channels,m[2].out_channels
    size = lambda a,b: 28*a+9*a*b+b+16*b*7+7
    assert size(a, b)==n_params(m)<=budget and size(a+1, b)>budget and size(a, b+1)>budget

@pytest.mark.parametrize('said', ['2x','50%',None,'words'])
def test_ways_to_say_it(said):
    m = seeded(Block)
    n = n_params(m)
    Pruner(m, params={None:n//2,'words':f'{n/2000:.6f}K'}.get(said, said), example_inputs=X).prune_model()
    other = seeded(Block)
    Pruner(other, params='2x', example_inputs=X).prune_model()
    assert same(state(m), state(other))

def test_round_to_is_kept():
    m = seeded(Block)
    Pruner(m, params='1.5x', round_to=8, example_inputs=X).prune_model()
    assert {o.out_channels%8 for o in m.modules() if isinstance(o, nn.Conv2d)}=={0}

def test_estimates_are_counts():
    "Lengths of axes say exactly how many parameters, bytes and multiply-accumulates are left, for any widths"
    m = seeded(Block)
    p = Pruner(m, 50, example_inputs=X)
    p.start()
    meters = {o:Counted(o, m, p.graph, p.groups) for o in ('params','bytes','macs')}
    rng = np.random.default_rng(0)
    for _ in range(5):
        gone = np.array([rng.integers(0, g.n) for g in p.groups])
        chosen = p._lowest({g.name:g for g in p.groups}, {(g.name,):int(k) for g,k in zip(p.groups, gone) if k})
        new,_,removed = at_pruner.legal(m, p.graph, chosen)
        assert len(removed)==len(chosen)
        for o in meters.values(): assert o.estimate(gone[None])[0]==pytest.approx(o.measure(new), abs=.5)

# --- words

@pytest.mark.parametrize('kw,text', [(dict(macs='half'),"macs must be '2x'.*not 'half'"), (dict(params=True),'params must be'), (dict(params=0),"params must be '2x'"), (dict(bytes='0%'),'bytes must be'),
    (dict(latency='2'),"say '2x' or '2 ms' or '2 s'"), (dict(macs='0x'),r"macs must be '2x'.*not '0x'$"), (dict(latency='5 sm'),"did you mean.*ms"), (dict(latency='0.5x'),'more than there is'), (dict(macs='120%'),'more than there is'), (dict(latency=float('nan')),'latency must be'),
    (dict(macs='2x', params='2x'),"one of pruning_ratio.*macs='2x' and params='2x'"), (dict(pruning_ratio=30, bytes='2x'),'one of pruning_ratio'), (dict(macs='2x', context='global'),'context local'),
    (dict(macs='1000x'),'out|at least')])
def test_refused(kw, text):
    "The model is as it was"
    m = seeded(Block)
    was = state(m)
    with pytest.raises(ValueError, match=text): Pruner(m, example_inputs=X, **kw).prune_model()
    assert same(was, state(m))

def test_a_target_needs_a_model():
    with pytest.raises(ValueError, match=r"Pruner\(model, macs='2x'\)"): Pruner(macs='2x')
    with pytest.raises(ValueError, match='only a pruning_ratio'): Pruner(net(), macs='2x', example_inputs=X).update(20)
    with pytest.raises(TypeError, match='macs'): PruneCallback(macs='2x')

def test_nothing_has_to_go():
    m = seeded(Block)
    was = state(m)
    with pytest.warns(UserWarning, match='nothing was removed.*1,000,000'): Pruner(m, params=1e6, example_inputs=X).prune_model()
    assert same(was, state(m))

def test_a_target_that_steps_do_not_meet_is_told():
    "Multiples of 8 leave little choice"
    m = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)))
    with pytest.warns(UserWarning, match=r"params='1.4x' asks for .* are left, which is \d+% off"): Pruner(m, params='1.4x', round_to=8, example_inputs=X).prune_model()
    assert m[0].out_channels==8

# --- losses

def test_losses_of_scores():
    "Shares of the squares, that multiply; what cannot go counts as much as the best"
    s = torch.tensor([3.,1.,2.])
    assert losses(s)[:3].tolist()==pytest.approx([0,-math.log(13/14),-math.log(9/14)])
    assert len(losses(torch.tensor([1.,math.inf,2.])))==3
    assert losses(-s)[1]==0  # the lowest of what may be negative is nothing
    assert losses(torch.zeros(4)).tolist()==[0]*5
    assert losses(torch.tensor([.1,.2]), readers=2).tolist()==pytest.approx([0,-2*math.log(.95),-2*math.log(.85)])
    assert (np.diff(losses(torch.rand(50)))>=0).all()

def test_loss_is_smallest():
    "Against all widths of three layers, and never more than of uniform ones"
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        sizes = [9,8,7]
        curves = [losses(torch.rand(n, generator=g)**2) for n in sizes]
        cost = lambda gone: (27*(9-gone[:,0])+9*(9-gone[:,0])*(8-gone[:,1])+9*(8-gone[:,1])*(7-gone[:,2])+50*(7-gone[:,2])).astype(float)
        w = Widths(curves, sizes, [1]*3, cost)
        budget = .45*cost(np.zeros((1,3)))[0]
        gone = w.chosen(budget)
        every = np.array(list(itertools.product(*map(range, sizes))))
        best = min(w.loss(o) for o in every[cost(every)<=budget])
        assert cost(gone[None])[0]<=budget and w.loss(gone)<=1.02*best+1e-9 and w.loss(gone)<=w.loss(w.uniform(budget))+1e-9

def test_balance_is_no_worse_than_steps():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        damages = [np.r_[0,np.cumsum(rng.exponential(size=4))] for _ in range(5)]
        kept = np.linspace(1, .2, 5)
        cost = lambda at: (kept[at[:,:-1]]*kept[at[:,1:]]).sum(1)
        a,b = (f(damages, cost, 1.5) for f in (allocate,balance))
        assert cost(b[None])[0]<=1.5 and sum(d[i] for d,i in zip(damages, b))<=sum(d[i] for d,i in zip(damages, a))+1e-12

# --- data

def test_least_loss_after_repair():
    "With data, what is taken gives no less after repair than uniform widths that leave as much"
    x = nn.functional.interpolate(torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(3)), 8, mode='bilinear')
    was = seeded(Block)
    m,other = copy.deepcopy(was),copy.deepcopy(was)
    p = Pruner(m, macs='2x', criteria='obs', data=[x], repair=True, example_inputs=x[:1])
    p.prune_model()
    low,high = 0.,99.
    for _ in range(12):
        mid,other = (low+high)/2,copy.deepcopy(was)
        Pruner(other, mid, criteria='obs', data=[x], repair=True, example_inputs=x[:1]).prune_model()
        low,high = (mid,high) if n_macs(other, x[:1])>1.02*n_macs(m, x[:1]) else (low,mid)
    error = lambda o: float((o(x)-was(x)).square().mean().detach())
    assert p.repaired is not None and error(m)<=1.05*error(other)

def test_same_again():
    a,b = (seeded(Block) for _ in range(2))
    for m in (a,b): Pruner(m, macs='2x', example_inputs=X).prune_model()
    assert same(state(a), state(b))

# --- times, by clocks that are made up

class FakeWatch:
    "As a `Stopwatch`: a layer takes as long as a law says, of the channels that it reads and makes"
    def __init__(self, model, inputs): self.model = model; self.names = tuple(n for n in pieces(model)); self.law()
    def law(self): self.least = np.array([self.seconds_of(m) for m in pieces(self.model).values()])
    @staticmethod
    def seconds_of(m):
        if isinstance(m, nn.Conv2d): return 1e-6*(5+math.ceil(m.in_channels/8)*math.ceil(m.out_channels/8))
        return 2e-6 if isinstance(m, nn.Linear) else 1e-6
    @property
    def seconds(self): return float(self.least.sum())
    def by_layer(self): return dict(zip(self.names, self.least.tolist()))

class FakeTables(Tables):
    def _run(self, key, m, x, widths, near):
        at = lambda made, read: 1e-6*(5+math.ceil(read/8)*math.ceil(made/8)) if isinstance(m, nn.Conv2d) else 2e-6
        self.least[key] = np.array([at(a, b) for a in widths[0] for b in widths[1]])

@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(at_pruner, 'Timed', lambda *args: Timed(*args, tables=FakeTables(), watch=FakeWatch, compare=lambda *o: None))

def chain(*sizes): return nn.Sequential(*[o for a,b in zip((3,)+sizes, sizes) for o in (nn.Conv2d(a, b, 1), nn.ReLU())], nn.Flatten(), nn.Linear(sizes[-1]*64, 3))

@pytest.mark.parametrize('asked', ['1.5x','60%'])
def test_latency_by_a_made_up_clock(fake, asked):
    m = seeded(lambda: chain(64, 64, 96, 64))
    was = FakeWatch(m, X).seconds
    p = Pruner(m, latency=asked, example_inputs=X)
    p.prune_model()
    got = was/FakeWatch(m, X).seconds
    assert abs(got/{'1.5x':1.5,'60%':1/.6}[asked]-1)<.05 and {o.out_channels%8 for o in m.modules() if isinstance(o, nn.Conv2d)}=={0}

def test_seconds(fake):
    m = seeded(lambda: chain(64, 64, 96, 64))
    s = .7*FakeWatch(m, X).seconds
    Pruner(m, latency=s, example_inputs=X).prune_model()
    assert abs(FakeWatch(m, X).seconds/s-1)<.05

def test_fixed_layers_are_told(fake):
    m = seeded(lambda: chain(16, 16))
    was = state(m)
    with pytest.raises(ValueError, match=r'at least .* layers that keep their channels have \d+% of the time'): Pruner(m, latency='20x', example_inputs=X).prune_model()
    assert same(was, state(m))

def test_a_wrong_table_is_corrected(monkeypatch):
    "Layers run slower in the network than alone, from some width on: what is measured of the whole is what counts"
    class Off(FakeTables):
        def _run(self, key, m, x, widths, near):
            super()._run(key, m, x, widths, near)
            self.least[key] = self.least[key]**2/self.least[key][-1]
    monkeypatch.setattr(at_pruner, 'Timed', lambda *args: Timed(*args, tables=Off(), watch=FakeWatch, compare=lambda *o: None))
    m = seeded(lambda: chain(64, 64, 96, 64))
    was = FakeWatch(m, X).seconds
    Pruner(m, latency='1.4x', example_inputs=X).prune_model()
    assert abs(was/FakeWatch(m, X).seconds/1.4-1)<.05

class Rough:
    "A clock on which a look takes a millisecond, or four"
    def __init__(self, seed): self.now,self.rng = 0.,np.random.default_rng(seed)
    def __call__(self):
        self.now += 4e-3 if self.rng.random()<.4 else 1e-3
        return self.now

def test_quiet_pieces():
    "The ratio of two networks on a machine that disturbs every call"
    a,b = (nn.Sequential(*[nn.ReLU() for _ in range(n)]) for n in (23,11))
    watches = [Stopwatch(o, torch.randn(2, 3), Rough(i)) for i,o in enumerate((a,b))]
    in_turn(*watches)
    assert watches[0].seconds/watches[1].seconds==pytest.approx(2, rel=.02)
    assert not any(o._forward_pre_hooks for m in (a,b) for o in m.modules())

def test_tables_run_what_is_alike_once():
    t,n = Tables(),[]
    run = t._run
    t._run = lambda key, *o: (n.append(key), run(key, *o))
    layer = lambda: (nn.Conv2d(8, 8, 1), (1,8,4,4), [grid(8, 8),grid(8, 8)], 10.)
    for _ in t.stages([layer(), layer()]): pass
    assert len(n)==1 and t.table(*layer()).shape==(1,1)

# --- near the target

def test_small_groups_come_near():
    "Where a channel of a large group is more than was asked for, channels of small ones go in its place"
    large,small = losses(torch.linspace(.01, 1, 8)),losses(torch.linspace(.5, 1, 64))  # one of the large ones does least harm
    cost = lambda gone: 50.*(8-gone[:,0])+3*(64-gone[:,1])+3*(64-gone[:,2])+8
    w = Widths([large,small,small], [8,64,64], [1]*3, cost)
    for share in (.97,.9,.8,.7,.5,.3):
        budget = share*cost(np.zeros((1,3)))[0]
        gone = w.chosen(budget, within=.01)
        assert .99*budget<=cost(gone[None])[0]<=budget
        every = np.array(list(itertools.product(range(8), range(0, 64, 3), range(0, 64, 3))))
        there = cost(every)
        best = min((w.loss(o) for o in every[(there<=budget) & (there>=.99*budget)]), default=math.inf)
        assert w.loss(gone)<=1.1*best
    assert cost(w.chosen(.97*792)[None])[0]<.95*792  # the least loss of all leaves less

@pytest.mark.parametrize('criteria', ['large_final','random'])
@pytest.mark.parametrize('share', [.97,.9,.7,.5,.3])
@pytest.mark.parametrize('what', ['macs','params','bytes'])
def test_a_wide_trunk_and_small_groups(what, share, criteria):
    "As in a ViT, whose embedding all blocks share: what is left is within one channel of the smallest group, or of 5 percent"
    def make(): return Trunk()
    m = seeded(make)
    x = torch.randn(2, 12, 8)
    with warnings_are('error'):
        p = Pruner(m, example_inputs=x, criteria=criteria, **{what:f'{100*share}%'})
        p.prune_model()
    assert .95*p.met['asked']<=p.met['left']<=p.met['asked']

class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 40), nn.GELU(), nn.Linear(40, 8)) for _ in range(3))
        self.last = nn.Linear(8, 4)
        for p in self.first.parameters(): nn.init.normal_(p, std=1.)
        with torch.no_grad(): self.first.weight[0] = 1e-3
    def forward(self, x):
        x = self.first(x)
        for o in self.blocks: x = x+o(x)
        return self.last(x.mean(1))

@pytest.mark.parametrize('number', [np.int64(300), np.int32(300), np.float32(300), np.array(300), torch.tensor(300), torch.tensor(300.)])
def test_numbers_of_other_kinds(number):
    found = []
    for n in (300,number):
        m = seeded(MODELS['plain'][0])
        p = Pruner(m, params=n, example_inputs=X)
        p.prune_model()
        found.append((state(m),p.met))
    assert same(found[0][0], found[1][0]) and found[0][1]['left']==found[1][1]['left']
    for wrong in (np.bool_(True),torch.tensor(True),torch.tensor([300]),np.array([300]),[300]):
        with pytest.raises(ValueError, match='params must be'): Pruner(seeded(MODELS['plain'][0]), params=wrong, example_inputs=X)

def test_what_is_not_repaired_is_told_once():
    "However many widths are tried"
    m = seeded(Read)
    x = torch.randn(16, 6)
    with pytest.warns(UserWarning) as said: Pruner(m, params='1.5x', data=[x], repair=True).prune_model()
    assert len([o for o in said if 'not repaired' in str(o.message)])==1

class Read(nn.Module):
    "A weight is multiplied in another way than a layer does"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6, 24),nn.Linear(24, 24)
        self.w = nn.Parameter(torch.randn(24, 4))
    def forward(self, x): return torch.einsum('bij,bjk->bik', self.b(self.a(x).relu()).relu()[:,None], self.w.expand(len(x), -1, -1))
