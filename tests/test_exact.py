"""Sparsity is exact: so many blocks are gone as were asked for, they are the lowest, ties go by position, and no layer is emptied.

Every granularity, context and level, on every type of layer, data type and kind of weights, against `reference.py`; then what hypothesis finds in sequences of levels,
tiles, patterns, heads, targets by layer, and the selection of the k lowest in pieces."""
import math
from fractions import Fraction
from functools import cache
from itertools import cycle, product
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from fasterai.core import pool, streaming
from fasterai.core.all import *
from fasterai.analyze.all import sensitivity
from fasterai.core.granularity import Blocks, available
from fasterai.core.schedule import sched_cos, schedule_of
from fasterai.core import selection
from fasterai.core.pool import select
from fasterai.core.selection import Scores, Source, lowest, n_of
from fasterai.prune.all import Pruner
from fasterai.regularize.penalties import Penalty
from fasterai.report.plots import show_blocks
from fasterai.sparse.sparsifier import Sparsifier
from reference import AXES, NUMBERED, block_ids, block_scores, exact, fall, numbered, rise

LEVELS = 0, 7, 30, 33.3, 50, 90, 99, 100
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
FILLS = dict(  # whole numbers: sums of them are exact in every dtype
    random=lambda n, r: r.integers(-128, 129, n), constant=lambda n, r: np.full(n, 3), two=lambda n, r: r.choice([-1,2], n), zeros=lambda n, r: np.zeros(n))
LAYERS = dict(
    conv1d=lambda: [nn.Conv1d(3,4,3), nn.Conv1d(4,6,2)], conv2d=lambda: [nn.Conv2d(2,4,(3,2)), nn.Conv2d(4,3,2), nn.Conv2d(3,1,1)],
    conv3d=lambda: [nn.Conv3d(2,3,(1,2,3)), nn.Conv3d(3,2,2)], linear=lambda: [nn.Linear(7,5), nn.Linear(5,3), nn.Linear(3,1)],
    transposed1d=lambda: [nn.ConvTranspose1d(3,4,3), nn.ConvTranspose1d(4,2,2)], transposed2d=lambda: [nn.ConvTranspose2d(3,4,(2,3)), nn.ConvTranspose2d(4,2,1)],
    transposed3d=lambda: [nn.ConvTranspose3d(2,3,(1,2,3)), nn.ConvTranspose3d(3,2,2)], grouped=lambda: [nn.Conv2d(4,8,3,groups=2), nn.Conv2d(8,8,2,groups=8)],
    grouped_transposed=lambda: [nn.ConvTranspose2d(4,6,2,groups=2), nn.ConvTranspose2d(6,6,2,groups=6)])
LAYER_TYPES = tuple(AXES)

def axes_of_layer(m): return AXES[type(m)]
@cache
def ids_of(shape, axes, granularity): return block_ids(shape, axes, granularity)

def make(kind, fill='random', dtype=torch.float32, seed=0):
    "Layers, one after the other, that are never run"
    ms,r = nn.Sequential(*LAYERS[kind]()).to(dtype),np.random.default_rng(seed)
    for m in ms: m.weight.data = torch.tensor(FILLS[fill](m.weight.numel(), r)).to(dtype).view_as(m.weight)
    return ms

def gone_in(model, granularity):
    "Numbers of the blocks that are zero, by layer"
    return [gone_blocks(m.weight, ids_of(tuple(m.weight.shape), axes_of_layer(m), granularity)) for m in model]

def gone_blocks(w, ids):
    left = set(ids[w.detach().double().cpu().numpy()!=0].tolist())
    return set(range(ids.max()+1))-left

def masked(sp, model, granularity):
    "Numbers of the blocks that are masked, by layer: masks are constant over a block"
    res = []
    for n,m in model.named_children():
        mask,ids = sp.masks[f'{n}.weight'].cpu().numpy(),ids_of(tuple(m.weight.shape), axes_of_layer(m), granularity)
        kept,gone = set(ids[mask].tolist()),set(ids[~mask].tolist())
        assert not kept & gone
        res.append(gone)
    return res

def means(model, granularity, f=abs): return [block_scores(f(m.weight.detach().double().cpu().numpy()), ids_of(tuple(m.weight.shape), axes_of_layer(m), granularity)) for m in model]

def axes_of_kind(kind): return AXES[type(LAYERS[kind]()[0])]
CASES = [(k,g) for k in LAYERS for g in NUMBERED if numbered(g, axes_of_kind(k)) is not None]

@pytest.mark.parametrize('kind,granularity', CASES)
@pytest.mark.parametrize('context', ['local','global'])
def test_every_level(kind, granularity, context):
    "The lowest blocks are gone, exactly so many, ties by position; what is kept is what it was"
    spare,dtypes = granularity!='layer',cycle(DTYPES)
    for fill,level in product(FILLS, LEVELS):
        model = make(kind, fill, next(dtypes))
        before,scores = [m.weight.detach().clone() for m in model],means(model, granularity)
        none = [set()]*len(model)
        if context=='local': want = [fall([s], [()], exact(len(s), level), spare)[0] for s in scores]
        else: want = fall(scores, none, exact(sum(map(len, scores)), level), spare)
        sp = Sparsifier(model, granularity, context, 'large_final', layer_type=LAYER_TYPES)
        sp.sparsify_model(level)
        assert masked(sp, model, granularity)==want, (fill, level)
        for (n,m),w in zip(model.named_children(), before):
            mask = sp.masks[f'{n}.weight']
            assert (m.weight[~mask]==0).all() and (m.weight[mask]==w[mask]).all()

def erk_shares(model, sizes, pct):
    "Fraction kept of each layer by bisection of ε: min(1, ε·sum/product)"
    keep = sum(sizes)-exact(sum(sizes), pct)
    raw = [sum(m.weight.shape)/math.prod(m.weight.shape) for m in model]
    lo,hi = 0.,1e6
    for _ in range(200):
        mid = (lo+hi)/2
        lo,hi = (mid,hi) if sum(n*min(1, mid*r) for n,r in zip(sizes, raw))<keep else (lo,mid)
    return [n*min(1, lo*r) for n,r in zip(sizes, raw)]

def lamp_counts(scores, total, spare):
    "Gone in each layer: each score² by the sum of those of its layer that are not lower, ranked over all"
    rel = []
    for l,s in enumerate(scores):
        s = sorted(map(float, s))
        rel += [(s[i]**2/(sum(x*x for x in s[i:]) or 1), l, i) for i in range(len(s)-spare)]
    return [sum(l==o for _,l,_ in sorted(rel)[:total]) for o in range(len(scores))]

@pytest.mark.parametrize('kind,granularity', CASES)
@pytest.mark.parametrize('context', ['erk','uniform_plus','lamp'])
def test_every_level_of_allocations(kind, granularity, context):
    "The total is exact, each layer's lowest are gone, and the shares are those of the paper"
    spare,dtypes = granularity!='layer',cycle(DTYPES)
    for fill,level in product(FILLS, LEVELS):
        model = make(kind, fill, next(dtypes))
        scores = means(model, granularity)
        sizes = [len(s) for s in scores]
        sp = Sparsifier(model, granularity, context, 'large_final', layer_type=LAYER_TYPES)
        sp.sparsify_model(level)
        got = masked(sp, model, granularity)
        counts,room = [len(o) for o in got],[n-spare for n in sizes]
        total = min(exact(sum(sizes), level), sum(room))
        assert sum(counts)==total, (fill, level)
        assert got==[fall([s], [()], k, False)[0] for s,k in zip(scores, counts)], (fill, level)
        assert all(k<=r for k,r in zip(counts, room))
        if context=='erk' and all(n>1 for n in sizes):
            slack = len(sizes)  # what a full layer cannot take goes to others
            assert all(abs(n-k-keep)<=slack for n,k,keep in zip(sizes, counts, erk_shares(model, sizes, level))), (counts, level)
        if context=='uniform_plus' and len(sizes)>1 and exact(sum(sizes), level)<=.6*sum(sizes[1:]): assert not counts[0]
        if context=='lamp' and fill=='random': assert sum(abs(a-b) for a,b in zip(counts, lamp_counts(scores, total, spare)))<=2, (counts, level)

@pytest.mark.parametrize('axes', sorted(set(AXES.values())))
def test_granularities_a_layer_has(axes):
    "A granularity that a layer lacks is refused with those that it has, and nothing is changed"
    kind = next(k for k in LAYERS if axes_of_kind(k)==axes)
    has = [g for g in NUMBERED if numbered(g, axes) is not None]
    assert set(available(axes))==set(has)
    for g in set(NUMBERED)-set(has):
        with pytest.raises(ValueError) as e: Sparsifier(make(kind), g, layer_type=LAYER_TYPES)
        assert all(o in str(e.value) for o in has)

# --- levels that rise and fall

@st.composite
def walks(draw):
    "Layers, a granularity that they have, a context, and levels one after the other"
    kind = draw(st.sampled_from(sorted(LAYERS)))
    g = draw(st.sampled_from([g for g in NUMBERED if numbered(g, axes_of_kind(kind)) is not None]))
    level = st.one_of(st.sampled_from(LEVELS), st.floats(1, 100).map(lambda o: round(o, 4)).filter(lambda o: o>1))  # 1.0 may be a fraction
    return kind,g,draw(st.sampled_from(['local','global'])),draw(st.lists(level, min_size=1, max_size=6)),draw(st.sampled_from(sorted(FILLS))),draw(st.sampled_from(DTYPES)),draw(st.integers(0, 99))

@given(walks())
def test_levels_one_after_the_other(walk):
    "Each level is reached exactly while weights move in between: what is gone stays while it rises, the best return when it falls"
    kind,granularity,context,levels,fill,dtype,seed = walk
    model,spare = make(kind, fill, dtype, seed),granularity!='layer'
    sp = Sparsifier(model, granularity, context, lambda w0: w0.abs(), layer_type=LAYER_TYPES)  # scores that zeroing does not change
    scores = means(model, granularity)
    pools = [[i] for i in range(len(model))] if context=='local' else [range(len(model))]
    gone = [set() for _ in model]
    for level in levels:
        for pool in pools:
            ss,gs = [scores[i] for i in pool],[gone[i] for i in pool]
            k = exact(sum(map(len, ss)), level)
            new = fall(ss, gs, k, spare) if k>sum(map(len, gs)) else rise(ss, gs, k)
            for i,o in zip(pool, new): gone[i] = o
        sp.sparsify_model(level)
        assert masked(sp, model, granularity)==gone, level
        with torch.no_grad():
            for m in model: m.weight += 1
        sp.apply_masks()
        assert all((m.weight[~sp.masks[f'{n}.weight']]==0).all() for n,m in model.named_children())

@pytest.mark.parametrize('context', sorted(contexts))
@pytest.mark.parametrize('kind', ['conv2d','linear'])
def test_monotone(context, kind):
    "While the level rises nothing returns, whatever the context: layer by layer, in steps of a percent"
    for fill,granularity in product(['random','two'], ['weight','filter','kernel']):
        model = make(kind, fill)
        sp = Sparsifier(model, granularity, context, 'large_final', layer_type=LAYER_TYPES)
        before = masked(sp, model, granularity)
        for level in range(0, 101):
            sp.update(level)
            now = masked(sp, model, granularity)
            assert all(b<=n for b,n in zip(before, now)), (fill, granularity, level)
            before = now

@pytest.mark.parametrize('granularity', ['weight','kernel'])
@pytest.mark.parametrize('context', sorted(contexts))
def test_what_is_gone_has_no_vote(context, granularity):
    "What an optimizer makes of weights that are gone does not count, whether or not they are zeroed again before the update"
    counts = []
    for zero_first in (False, True):
        model = make('conv2d')
        sp = Sparsifier(model, granularity, context)
        sp.update(40)
        with torch.no_grad(): model[1].weight[~sp.masks['1.weight']] = 1000.
        if zero_first: sp.apply_masks()
        sp.update(50)
        counts.append([len(o) for o in masked(sp, model, granularity)])
    assert counts[0]==counts[1]

@pytest.mark.parametrize('f', [sched_cos, sched_dsd, sched_one_cycle, sched_agp, sched_iterative], ids=lambda f: f.__name__)
@pytest.mark.parametrize('granularity', ['weight','row','filter'])
def test_schedules_step_by_step(f, granularity):
    "At each of 40 steps the level asked is there, up and down, in each layer"
    model,sched = make('conv2d'),schedule_of(f)
    sp = Sparsifier(model, granularity)
    for k in range(1, 41):
        with torch.no_grad():
            for m in model: m.weight += torch.randn_like(m.weight)
        sp.update(level := sched(k/40, 80))
        sizes = [len(s) for s in means(model, granularity)]
        want = [min(math.floor(Fraction(round(level, 10))*n/100+Fraction(1, 10**9)), n-1) for n in sizes]
        assert [len(o) for o in masked(sp, model, granularity)]==want, (k, level)

# --- targets by layer, round_to

@given(st.lists(st.sampled_from(LEVELS), min_size=3, max_size=3), st.sampled_from(['weight','kernel','filter','layer']), st.booleans(), st.sampled_from([0,1,2]))
def test_targets_by_layer(levels, granularity, by_name, absent):
    model = make('conv2d')
    scores = means(model, granularity)
    target = {f'{i}' if i%2 else f'{i}.weight': l for i,l in enumerate(levels) if i!=absent} if by_name else levels
    if by_name: levels = [0 if i==absent else l for i,l in enumerate(levels)]
    sp = Sparsifier(model, granularity)
    sp.sparsify_model(target)
    assert masked(sp, model, granularity)==[fall([s], [()], exact(len(s), l), granularity!='layer')[0] for s,l in zip(scores, levels)]

@given(st.integers(1, 5), st.sampled_from(LEVELS), st.sampled_from(['local','global','erk']), st.sampled_from(['filter','kernel','weight']))
def test_round_to(to, level, context, granularity):
    "A multiple of `round_to` is kept wherever something goes, never fewer, and never less than the next lower multiple would be needed for"
    model = make('grouped')
    sizes = [len(s) for s in means(model, granularity)]
    sp = Sparsifier(model, granularity, context, round_to=to)
    sp.sparsify_model(level)
    for n,o in zip(sizes, masked(sp, model, granularity)):
        kept = n-len(o)
        assert not o or (kept%to==0 and kept>=to)
        if context=='local':
            free = n-exact(n, level)
            up = math.ceil(max(free, 1)/to)*to
            assert kept==(n if free==n or n<to else up if up<=n else n//to*to)

# --- tiles, patterns, heads

@given(st.integers(1, 6), st.integers(1, 7), st.sampled_from(LEVELS), st.sampled_from(['conv2d','linear','transposed2d','conv1d']), st.sampled_from(['random','two']), st.booleans())
def test_tiles(r, c, level, kind, fill, by_name):
    "Tiles of r outputs × c of everything else, smaller ones at the edges, by their mean"
    model = make(kind, fill)
    mats = [m.weight.detach().movedim(axes_of_layer(m).index('o'), 0).flatten(1).cpu().numpy().copy() for m in model]
    sp = Sparsifier(model, f'block({r},{c})' if by_name else block(r,c), layer_type=LAYER_TYPES)
    sp.sparsify_model(level)
    for (n,m),w in zip(model.named_children(), mats):
        at = [(i,j) for i in range(0, w.shape[0], r) for j in range(0, w.shape[1], c)]
        scores = [Fraction(int(abs(w[i:i+r,j:j+c]).sum()), w[i:i+r,j:j+c].size) for i,j in at]
        mask = np.ones_like(w, dtype=bool)
        for b in fall([scores], [()], exact(len(at), level))[0]: mask[at[b][0]:at[b][0]+r,at[b][1]:at[b][1]+c] = False
        got = sp.masks[f'{n}.weight'].movedim(axes_of_layer(m).index('o'), 0).flatten(1).cpu().numpy()
        assert (got==mask).all()

@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(['conv2d','linear','transposed1d','grouped']), st.lists(st.sampled_from([0,10,25,50,60,100]), min_size=1, max_size=4), st.sampled_from(['random','two','constant']))
def test_patterns(n, more, kind, shares, fill):
    "n of every m consecutive inputs are kept in the groups that obey, the lowest of the group go, and the share of groups is exact"
    m = n+more
    model = make(kind, fill)
    own = Fraction(100*more, m)
    before = [o.weight.detach().clone() for o in model]
    sp = Sparsifier(model, f'{n}:{m}', layer_type=LAYER_TYPES)
    for share in shares:
        sp.sparsify_model(float(own*share/100))
        for (name,o),w in zip(model.named_children(), before):
            i = axes_of_layer(o).index('i')
            obey,groups = 0,0
            for line,mask in zip(w.movedim(i, -1).flatten(0, -2).abs().tolist(), sp.masks[f'{name}.weight'].movedim(i, -1).flatten(0, -2).tolist()):
                for a in range(0, len(line), m):
                    kept,size = mask[a:a+m],len(line[a:a+m])
                    low = sorted(range(size), key=lambda x: (line[a+x],x))[:max(0, size-n)]
                    assert all(kept) or {x for x in range(size) if not kept[x]}==set(low)
                    groups += 1
                    obey += not all(kept) or not low
            asked = exact(groups, share)
            if all(line_size%m==0 for line_size in [w.shape[i]]): assert obey==asked
            else: assert obey>=asked

def test_pattern_that_fits_nothing():
    "Where each group keeps all it has, as 2:4 in a depthwise convolution, the pattern is refused, or said to have reached nothing"
    conv = nn.Conv2d(8, 8, 3, groups=8)
    try: sp = Sparsifier(conv, '2:4')
    except ValueError: return
    sp.sparsify_model(50)
    assert sp.reached()==0

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('context', ['local','global'])
def test_heads(level, context):
    "A head goes as a whole: its rows of queries, keys, values and their biases, and its columns of the projection out; the lowest first"
    torch.manual_seed(0)
    class Fused(nn.Module):
        def __init__(self): super().__init__(); self.num_heads,self.qkv,self.proj = 3,nn.Linear(12,36),nn.Linear(12,12)
    class Apart(nn.Module):
        def __init__(self): super().__init__(); self.num_heads,self.q_proj,self.k_proj,self.v_proj,self.o_proj = 2,*(nn.Linear(12,12) for _ in range(4))
    model = nn.ModuleDict(dict(mha=nn.MultiheadAttention(12,4), other=nn.MultiheadAttention(12,3,kdim=6,vdim=5), fused=Fused(), apart=Apart()))
    for p in model.parameters(): p.data = torch.randint(-128, 129, p.shape).float()
    def mats(m):  # [heads, everything]
        h = m.num_heads
        rows = [m.in_proj_weight] if getattr(m, 'in_proj_weight', None) is not None else [m.qkv.weight] if hasattr(m, 'qkv') else [m.q_proj.weight, m.k_proj.weight, m.v_proj.weight] if hasattr(m, 'o_proj') else [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
        k = 3 if len(rows)==1 else 1
        out = next(getattr(m, o) for o in ('out_proj','proj','o_proj') if hasattr(m, o)).weight
        parts = [w.view(k, h, -1, w.shape[1]).transpose(0, 1).flatten(1) for w in rows]+[out.view(-1, h, out.shape[1]//h).transpose(0, 1).flatten(1)]
        return torch.cat(parts, 1).detach()
    scores = [[Fraction(int(r.abs().sum()), r.numel()) for r in mats(m)] for m in model.values()]
    if context=='local': want = [fall([s], [()], exact(len(s), level))[0] for s in scores]
    else: want = fall(scores, [()]*4, exact(12, level))
    sp = Sparsifier(model, 'head', context)
    sp.sparsify_model(level)
    for m,w in zip(model.values(), want):
        zero = (mats(m)==0).all(1)
        assert set(zero.nonzero().flatten().tolist())==w
        for b in [m.in_proj_bias] if hasattr(m, 'in_proj_bias') else [m.qkv.bias] if hasattr(m, 'qkv') else [m.q_proj.bias, m.k_proj.bias, m.v_proj.bias]:
            if b is not None and hasattr(m, 'o_proj'): assert (b.view(m.num_heads, -1)[sorted(w)]==0).all()
            elif b is not None: assert (b.view(3, m.num_heads, -1)[:,sorted(w)]==0).all()

# --- granularities of the user

class Bare:
    "A granularity that has nothing but `bind`"
    def __init__(self, cls, *args): self.cls,self.args = cls,args
    def bind(self, shape, axes): return self.cls(shape, axes, *self.args)

class OwnPattern:
    "n:m along the inputs in plain loops of torch, by its own lights: no `n`, no answers, no parent; what is missing in the last group is filled with nan"
    def __init__(self, shape, axes, n, m): self.shape,self.i,self.go,self.m = shape,axes.index('i'),m-n,m
    def fold(self, x):
        x = x.movedim(self.i, -1).flatten(0, -2)
        short = -x.shape[1]%self.m
        return torch.cat([x, x.new_full((len(x), short), math.nan)], 1).view(-1, self.m)
    def spread(self, flags, scores):
        rows,res = self.fold(scores),[]
        for flag,row in zip(flags.tolist(), rows.tolist()):
            there = [j for j,v in enumerate(row) if not math.isnan(v)]
            low = sorted(there, key=lambda j: (row[j],j))[:max(0, self.go-(self.m-len(there)))]
            res.append([flag and j in low for j in range(self.m)])
        others = [n for k,n in enumerate(self.shape) if k!=self.i]
        return torch.tensor(res).view(*others, -1)[...,:self.shape[self.i]].movedim(-1, self.i)

class OwnSubclass(OwnPattern, Blocks):
    "The same with `Blocks` as a parent, and `n` and what goes of a block said"
    def __init__(self, shape, axes, n, m):
        super().__init__(shape, axes, n, m)
        self.n = math.ceil(shape[self.i]/m)*math.prod(shape)//shape[self.i]

@pytest.mark.parametrize('cls', [OwnPattern, OwnSubclass])
@pytest.mark.parametrize('n,m', [(2,4), (1,3), (1,2)])
@pytest.mark.parametrize('kind', ['conv2d','linear','transposed2d','grouped'])
def test_patterns_of_the_user(cls, n, m, kind):
    "An n:m of one's own reaches what the library's reaches, bit for bit, up and down, and says so"
    a,b = make(kind),make(kind)
    mine,ours = (Sparsifier(o, g, layer_type=LAYER_TYPES) for o,g in ((a, Bare(cls, n, m)), (b, f'{n}:{m}')))
    full = 100*(m-n)/m
    assert mine.own==pytest.approx(ours.own)==pytest.approx(full) if any(o.weight.shape[axes_of_layer(o).index('i')]>=m for o in a) else mine.own<=full+1e-9
    if mine.own<full-1: return  # no layer has a whole group, and so no more than that can be known
    for share in (30, 100, 60, 0, 100):
        for sp in (mine, ours): sp.sparsify_model(full*share/100)
        assert all(torch.equal(mine.masks[k], v) for k,v in ours.masks.items()), share
        assert mine.reached()==ours.reached()
        assert mine.reached()==100*sum(int((~v).sum()) for v in mine.masks.values())/sum(v.numel() for v in mine.masks.values())
    with pytest.raises(ValueError, match='Bare reaches .* % of zeros when every group follows'): mine.sparsify_model(full+1)

class OwnFilters:
    "Some filters at a time, as rows of a matrix"
    def __init__(self, shape, axes, k): self.shape,self.o,self.k = shape,axes.index('o'),k
    def fold(self, x):
        x = x.movedim(self.o, 0).flatten(1)
        pad = x.new_full((-len(x)%self.k, x.shape[1]), math.nan)
        return torch.cat([x, pad]).view(-1, self.k*x.shape[1])
    def spread(self, flags): return flags.repeat_interleave(self.k)[:self.shape[self.o]].view([-1 if i==self.o else 1 for i in range(len(self.shape))])

class OwnByIndex(Blocks):
    "`Blocks` of whole filters, told in another way: `spread` by an index, and in reverse order"
    def __init__(self, shape, axes):
        super().__init__(shape, (axes.index('o'),))
        self.back = torch.arange(self.n).flip(0)
    def fold(self, x): return super().fold(x)[self.back]
    def spread(self, flags, scores=None): return super().spread(flags[self.back])

def normed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,12,3,groups=2), nn.GroupNorm(3,12), nn.ReLU(), nn.ConvTranspose2d(12,6,2), nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6,4,1))
    for n,p in model.named_parameters():
        if p.dim()==1: nn.init.uniform_(p, .5, 1.5)
    return model

@pytest.mark.parametrize('own', [Bare(OwnFilters, 1), Bare(OwnByIndex), Bare(lambda shape, axes: Blocks(shape, [axes.index('o')])), Bare(type('Sub', (Blocks,), {'__init__': lambda self, shape, axes: Blocks.__init__(self, shape, [axes.index('o')])})),
    lambda axes: 'o', 'o'], ids=['bare','by-index','blocks','subclass','function','axes'])
@pytest.mark.parametrize('level', [0,30,50,100])
def test_filters_of_the_user(own, level):
    "Whole filters of one's own take their biases and norms along, as those of the library do"
    a,b = normed(),normed()
    for m,g in ((a, own), (b, 'filter')):
        sp = Sparsifier(m, g, layer_type=LAYER_TYPES, example_inputs=torch.randn(2,3,8,8))
        sp.sparsify_model(level)
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    if level==50: assert sum(int((m.bias==0).sum()) for m in a if hasattr(m, 'bias'))==2*4+2*6+2*3+2

def test_pairs_of_filters():
    "Two filters at a time, the lowest pairs, with the entries of both in biases and norms; a last pair that is a single one is a block as well"
    model = nn.Sequential(nn.Conv2d(3,9,3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9,8,3))
    nn.init.ones_(model[1].bias)
    scores = [[Fraction(float(w.abs().double().mean())) for w in m.weight.detach().split(2)] for m in (model[0], model[3])]
    Sparsifier(model, Bare(OwnFilters, 2), example_inputs=torch.randn(2,3,8,8)).sparsify_model(50)
    for m,s,n in ((model[0], scores[0], 9), (model[3], scores[1], 8)):
        gone = {i for b in fall([s], [()], len(s)//2)[0] for i in (2*b, 2*b+1) if i<n}
        assert set((m.weight==0).flatten(1).all(1).nonzero().flatten().tolist())==gone==set((m.bias==0).nonzero().flatten().tolist())
        if n==9: assert gone==set((model[1].bias==0).nonzero().flatten().tolist())==set((model[1].weight==0).nonzero().flatten().tolist())

class OwnWhole:
    "One block a layer"
    def __init__(self, shape, axes): self.shape = shape
    def fold(self, x): return x.reshape(1, -1)
    def spread(self, flags): return flags.view([1]*len(self.shape))

@pytest.mark.parametrize('own', [Bare(OwnWhole), lambda axes: '', 'layer'], ids=['bare','function','name'])
def test_layers_of_the_user(own):
    "Where a block is a layer, layers go; where only some layers are one block, each keeps its last"
    model = make('conv2d')
    sp = Sparsifier(model, own, 'global')
    sp.sparsify_model(70)
    assert [int(m.weight.count_nonzero()>0) for m in model].count(0)==2 and sp.reached()==pytest.approx(200/3)

class Says(Bare):
    "What a granularity says of itself counts"
    full,spares_last = 25,False

def test_what_is_said_counts():
    sp = Sparsifier(make('conv2d'), Says(OwnPattern, 2, 4))
    assert sp.own==25
    with pytest.raises(ValueError, match='Says reaches 25 %'): sp.sparsify_model(30)
    class Loose(Bare): spares_last = False
    model = make('conv2d')
    Sparsifier(model, Loose(OwnFilters, 1)).sparsify_model(100)
    assert not any(m.weight.any() for m in model)

class OwnTiles:
    "Tiles of two outputs × three inputs that leave a margin of the matrix in peace: not every weight belongs to a block"
    def __init__(self, shape, axes): self.shape,self.h,self.w = shape,shape[0]//2,math.prod(shape[1:])//3
    def fold(self, x): return x.flatten(1)[:2*self.h,:3*self.w].reshape(self.h, 2, self.w, 3).transpose(1, 2).reshape(-1, 6)
    def spread(self, flags):
        res = torch.zeros(self.shape[0], math.prod(self.shape[1:]), dtype=torch.bool)
        res[:2*self.h,:3*self.w] = flags.view(self.h, 1, self.w, 1).expand(-1, 2, -1, 3).reshape(2*self.h, -1)
        return res.view(self.shape)

@given(st.sampled_from(LEVELS), st.integers(2, 7), st.integers(1, 5))
def test_tiles_of_the_user(level, o, i):
    model = nn.Sequential(nn.Conv2d(i, o, 3))
    w = model[0].weight.detach().clone()
    sp = Sparsifier(model, Bare(OwnTiles))
    sp.sparsify_model(level)
    h,n = o//2,i*9//3
    scores = [[float(t.abs().mean()) for r in w.flatten(1)[:2*h].split(2) for t in r.split(3, 1)[:n]]]
    assert sp.own==100 and int((~sp.masks['0.weight']).sum())==6*len(fall(scores, [()], exact(h*n, level))[0])
    assert (model[0].weight.flatten(1)[2*h:]==w.flatten(1)[2*h:]).all()

class Half:
    def __init__(self, shape, axes): self.shape = shape
    def fold(self, x): return x
    def spread(self, flags): return flags

@pytest.mark.parametrize('own,says', [(Bare(lambda *a: None), 'method fold'), (Bare(Half), r'fold must return one block per row'), (object(), 'a granularity must be a name'),
    (Bare(type('Wrong', (OwnFilters,), dict(spread=lambda self, flags: flags[:1].view(1,1,1,1,1)))), 'spread must return a mask that broadcasts'), (Bare(type('Miscounts', (OwnFilters,), dict(n=99)), 1), 'n is 99')])
def test_granularities_that_are_wrong(own, says):
    "Refused when it is bound, before anything is changed"
    if isinstance(own, Bare) and own.cls.__name__=='Wrong': own.args = 1,
    with pytest.raises((TypeError, ValueError), match=says): Sparsifier(make('conv2d'), own)

@pytest.mark.parametrize('own', [Bare(OwnPattern, 2, 4), Bare(OwnFilters, 2)], ids=['pattern','pairs'])
def test_own_granularities_wherever_one_is_asked_for(own):
    "State, penalties, sensitivity, pictures and holding zeros take them as they take the library's"
    x = torch.randn(2,3,8,8)
    def net(): torch.manual_seed(0); return nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Conv2d(8,8,3))
    sp,again = (Sparsifier(net(), own, example_inputs=x) for _ in range(2))
    sp.sparsify_model(25)
    again.load_state_dict(sp.state_dict())
    again.apply_masks()
    assert all(torch.equal(p, q) for p,q in zip(sp.model.parameters(), again.model.parameters()))
    sp.sparsify_model(40)
    again.sparsify_model(40)
    assert all(torch.equal(sp.masks[k], again.masks[k]) for k in sp.masks)
    price = Penalty(net(), granularity=own)
    price().backward()
    assert price.layers['0'][0].weight.grad.any() and float(price().detach())>0
    res = sensitivity(net(), lambda m: float(m(x).detach().square().mean()), levels=[10,40], granularity=own, example_inputs=x)
    assert len(res.to_df())==4
    ax = show_blocks(own, shape=(8,4,3,3))
    assert ax.texts[0].get_text()=='Bare'

# --- criteria and contexts of the user

def test_criteria_is_given_what_it_names():
    "w, w0, w_prev, grad and act are what they are said to be"
    torch.manual_seed(0)
    model,x,y = nn.Sequential(nn.Conv2d(3,4,2), nn.ReLU(), nn.Flatten(), nn.Linear(36,2)),torch.randn(8,3,4,4),torch.randint(0, 2, (8,))
    w0 = model[0].weight.detach().clone()
    seen = []
    def mine(w, w0, w_prev, grad, act):
        seen.append({k: v.clone() for k,v in dict(w=w, w0=w0, w_prev=w_prev, grad=grad, act=act.expand_as(w)).items()})
        return (w*grad).abs()+act
    sp = Sparsifier(model, 'weight', 'local', mine, data=[(x,y)])
    sp.sparsify_model(20)
    w1 = model[0].weight.detach().clone()
    with torch.no_grad(): model[0].weight += .1
    sp.apply_masks()
    w2 = model[0].weight.detach().clone()
    grad, = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [model[0].weight])
    sp.sparsify_model(40)
    got = seen[-1]
    for k,v in dict(w=w2, w0=w0, w_prev=w1, grad=grad, act=x.square().sum((0,2,3)).sqrt()[None,:,None,None].expand_as(w0)).items(): torch.testing.assert_close(got[k], v)
    assert (model[0].weight==0).sum()==exact(48, 40)

@pytest.mark.parametrize('name', sorted(criterias))
@pytest.mark.parametrize('granularity', ['weight','kernel','filter'])
def test_every_criteria(name, granularity):
    "The lowest blocks by each criteria are gone, by the table's formula in numpy; scoring leaves the weights alone"
    r = np.random.default_rng(1)
    model = make('conv2d')
    w0,x = model[0].weight.detach().cpu().numpy().copy(),torch.tensor(r.integers(-3, 4, (2,2,5,5))).float()
    sp = Sparsifier(model, granularity, 'local', name, data=None)
    w = r.integers(-128, 129, w0.shape).astype('float32')
    grad = r.integers(-4, 5, w0.shape).astype('float32')
    with torch.no_grad(): model[0].weight.copy_(torch.tensor(w))
    model[0].weight.grad = torch.tensor(grad)
    act = x.square().sum((0,2,3)).sqrt()[None,:,None,None]
    for m in model[1:]: m.weight.grad = torch.zeros_like(m.weight)
    sp.about.give(dict(act={o.parts[0].name: act if o.name=='0' else torch.ones_like(o.parts[0].w) for o in sp.layers}))
    cols = {o.parts[0].name:r.integers(-3, 4, (o.parts[0].w[0].numel(),60)).astype(float) for o in sp.layers}
    sp.about.give(dict(hess={n:torch.tensor(c@c.T)[None] for n,c in cols.items()}))
    h = cols['0.weight']@cols['0.weight'].T
    inverse = np.linalg.inv(h+1e-2*h.diagonal().mean()*np.eye(len(h))).diagonal().reshape(1, *w0.shape[1:])
    f = dict(random=None, large_final=abs(w), squared_final=w*w, small_final=-abs(w), large_init=abs(w0), small_init=-abs(w0), large_init_large_final=np.minimum(abs(w), abs(w0)),
        small_init_small_final=-np.maximum(abs(w), abs(w0)), magnitude_increase=abs(w)-abs(w0), movement=abs(w-w0), mov_large_final=abs(w*(w-w0)), movmag=abs(w*(w-w0)), mov_mag=abs(abs(w)-abs(w0)),
        updating_magnitude_increase=abs(w)-abs(w0), updating_movement=abs(w-w0), updating_movmag=abs(w*(w-w0)), taylor=(w*grad)**2, grad_crit=(w*grad)**2, wanda=abs(w)*act.cpu().numpy(), obs=w*w/inverse)[name]
    sp.update(50)
    ids = ids_of(w.shape, 'oihw', granularity)
    got,mask = masked(sp, model, granularity)[0],sp.masks['0.weight'].cpu().numpy()
    assert (model[0].weight.detach().cpu().numpy()[mask]==w[mask]).all()
    assert len(got)==exact(ids.max()+1, 50)
    if f is not None: assert got==fall([[float(s) for s in block_scores(f, ids)]], [()], len(got))[0]

@pytest.mark.parametrize('reducer,f', dict(mean=np.mean, sum=np.sum, max=np.max, l2=lambda r: math.sqrt((r*r).sum())).items())
@pytest.mark.parametrize('granularity', ['row','filter','block(2,3)'])
def test_reducers(reducer, f, granularity):
    model = make('conv2d')
    mat = abs(model[0].weight.detach().flatten(1).cpu().numpy())
    ids = ids_of((4,2,3,2), 'oihw', granularity).reshape(4, -1) if granularity in NUMBERED else np.array([[i//2*4+j//3 for j in range(12)] for i in range(4)])
    scores = [float(f(mat[ids==i])) for i in range(ids.max()+1)]
    sp = Sparsifier(model, granularity, criteria=Criteria(large_final, reducer))
    sp.sparsify_model(50)
    mask = sp.masks['0.weight'].flatten(1).cpu().numpy()
    assert set(ids[~mask].tolist())==fall([scores], [()], exact(len(scores), 50))[0]

def test_criteria_that_writes_leaves_the_weights():
    "Scoring never changes a weight, whatever a criteria does to what it is given"
    for granularity,mine in product(['weight','filter'], [lambda w: w.abs_(), pointwise(lambda w: w.abs_()), lambda w, w0: w.sub_(w0).abs_()]):
        model = make('conv2d')
        before = {k:v.clone() for k,v in model.state_dict().items()}
        try: Sparsifier(model, granularity, criteria=mine).sparsify_model(30)
        except (RuntimeError, ValueError): assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())  # refused: as before
        for n,m in model.named_children(): assert ((m.weight==0) | (m.weight==before[f'{n}.weight'])).all()

def test_contexts_of_the_user():
    model = make('conv2d')
    def first_only(sizes, sparsity): return {o: int(n*sparsity/100) if i==0 else 0 for i,(o,n) in enumerate(sizes.items())}
    def rivals(sizes, sparsity): return {('0','2'): 3, '1': 2}
    for f,want in (first_only, [2,0,0]), (rivals, None):
        sp = Sparsifier(make('conv2d'), 'filter', f)
        sp.sparsify_model(50)
        got = [len(o) for o in masked(sp, sp.model, 'filter')]
        assert got==want if want else got[0]+got[2]==3 and got[1]==2

@pytest.mark.parametrize('f,says', [(lambda sizes: {'nope': 1}, 'nope'), (lambda sizes: {'0': 99}, '99'), (lambda sizes: {'0': -1}, '-1'), (lambda sizez: {}, 'sizes')])
def test_contexts_that_are_wrong(f, says):
    model = make('conv2d')
    before = {k:v.clone() for k,v in model.state_dict().items()}
    with pytest.raises(ValueError, match=says): Sparsifier(model, 'filter', f).sparsify_model(50)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

# --- odd weights

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('special', [0., -0., math.inf, -math.inf, math.nan, 1e-7, 6e-8, 1e-15, 1e-40])
def test_special_values(dtype, special):
    "Half of the weights, exactly, with special values among them or nothing else; kept ones keep every bit. What is not finite is refused by name, and nothing is changed"
    for some in (False, True):
        conv = nn.Conv2d(4, 8, 3).to(dtype)
        if some: conv.weight.data.view(-1)[::3] = special
        else: nn.init.constant_(conv.weight, special)
        before = conv.weight.detach().clone()
        if not math.isfinite(special):
            with pytest.raises(ValueError, match=f'{96 if some else 288} of 288 numbers of weight are nan or infinite'): Sparsifier(conv)
            assert torch.equal(conv.weight.detach().view(torch.uint8), before.view(torch.uint8))
            continue
        sp = Sparsifier(conv)
        sp.sparsify_model(50)
        mask = sp.masks['weight']
        assert (~mask).sum()==144 and (conv.weight[~mask]==0).all()
        assert torch.equal(conv.weight[mask].view(torch.uint8), before[mask].view(torch.uint8))

@pytest.mark.parametrize('context', sorted(contexts))
@pytest.mark.parametrize('sizes', [[(4,0),(4,3)], [(0,3),(4,3)], [(1,1)], [(1,1),(1,1)]], ids=str)
def test_tiny_and_empty_layers(sizes, context):
    "A layer without weights, or with one, takes part in every context and breaks none"
    model = nn.Sequential(*(nn.Linear(*o) for o in sizes))
    total = sum(m.weight.numel() for m in model)
    for level in LEVELS:
        sp = Sparsifier(model, 'weight', context, layer_type=nn.Linear)
        sp.sparsify_model(level)
        room = sum(max(0, m.weight.numel()-1) for m in model)
        gone = sum(int((~m).sum()) for m in sp.masks.values())
        assert gone<=min(exact(total, level), room)
        assert 0<=sp.reached()<=100

def test_nothing_to_zero_is_refused():
    with pytest.raises(ValueError, match='no layer'): Sparsifier(nn.Sequential(nn.Linear(4, 0)), layer_type=nn.Linear)

# --- the k lowest, in pieces

INF,NAN = math.inf,math.nan
VALUES = dict(
    rising=lambda n, r: np.arange(n), falling=lambda n, r: np.arange(n)[::-1], rolled=lambda n, r: np.roll(np.arange(n), n//3), same=lambda n, r: np.full(n, .1), two=lambda n, r: r.integers(0, 2, n),
    nine=lambda n, r: r.integers(0, 9, n), normal=lambda n, r: r.standard_normal(n), outliers=lambda n, r: np.where(r.random(n)<.02, 1e30*r.random(n), 1.), holes=lambda n, r: np.where(r.random(n)<.3, NAN, r.random(n)),
    infs=lambda n, r: r.choice([INF,-INF,0.,1.,-1.], n), endless=lambda n, r: np.full(n, INF), nothing=lambda n, r: np.full(n, NAN), mixed=lambda n, r: r.choice([INF,-INF,NAN,0.,-0.,2.], n),
    denormal=lambda n, r: r.integers(-50, 50, n)*1e-44, tiny=lambda n, r: r.random(n)*1e-38, steps=lambda n, r: np.arange(n)//7%5, late=lambda n, r: np.where(np.arange(n)<n-5, 1., 0.), bf16=lambda n, r: torch.randn(n).bfloat16().float().cpu().numpy(),
    periodic=lambda n, r: np.where(np.arange(n)%16==0, 1000., r.random(n)))  # what a sample of every so many sees is not what there is

def lists(v): return v.float().tolist() if isinstance(v, torch.Tensor) else [float(o) for o in np.asarray(v, dtype='float32')]

@pytest.mark.parametrize('name', sorted(VALUES))
@given(data=st.data())
def test_selection_in_pieces(name, data):
    "`select` agrees with the reference step by step, one source or several, with and without protection, whatever is in the pieces"
    r = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    sizes = data.draw(st.lists(st.integers(1, 120), min_size=1, max_size=3))
    names = [name]+[data.draw(st.sampled_from(sorted(VALUES))) for _ in sizes[1:]]
    values = [torch.tensor(np.array(VALUES[o](n, r), dtype='float32')) for o,n in zip(names, sizes)]
    protect = data.draw(st.booleans())
    ks = data.draw(st.lists(st.integers(0, sum(sizes)), min_size=1, max_size=4))
    taken = []
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(streaming, 'CHUNK', data.draw(st.sampled_from([8,16,64])))
        mp.setattr(streaming, 'SAMPLE', data.draw(st.sampled_from([4,16,1000])))
        walk([Scores(v) for v in values], [lists(v) for v in values], ks, protect)

def walk(sources, scores, ks, protect):
    gone,n = [set() for _ in sources],0
    for k in ks:
        was = n
        k = min(k, sum(o.n for o in sources)-len(sources)*protect)
        gone = fall(scores, gone, k, protect) if k>n else rise(scores, gone, k)
        n = select(sources, n, k, protect)
        assert n==k
        assert [set((o.keep==0).nonzero().flatten().tolist()) for o in sources]==gone, (was, k)

def test_selection_takes_its_paths(monkeypatch):
    "With small pieces, which the CPU alone takes, the bracket is hit, missed, and hit again with a layer's best block protected; none of it changes the result"
    monkeypatch.setattr(streaming, 'CHUNK', 16)
    monkeypatch.setattr(streaming, 'SAMPLE', 64)
    seen,real,rank = [],streaming.drop,pool.rank
    def spy(*args):
        res = real(*args)
        seen.append((res, any(o.safe is not None for o in args[0])))
        return res
    monkeypatch.setattr(streaming, 'drop', spy)
    monkeypatch.setattr(pool, 'rank', lambda *args: (seen.append('all'), rank(*args)))
    r = np.random.default_rng(0)
    a,b = (torch.tensor(o, dtype=torch.float, device='cpu') for o in (r.random(600), r.random(20)/1000))
    walk([Scores(a), Scores(b)], [lists(a), lists(b)], [5,100,300,310,250,600], True)
    c = torch.tensor(100+r.random(64*17), dtype=torch.float, device='cpu')
    c[::17] -= 100  # where the sample looks
    walk([Scores(c)], [lists(c)], [100,600], False)
    assert {(True,False), (True,True), (False,False), 'all'}<=set(seen)

def test_largest_number_is_lower_than_infinity():
    "`select` and `lowest` agree at the end of what floats can say"
    big = torch.finfo(torch.float32).max
    for values,k in ([INF,big,1.], 2), ([-big,-INF,1.], 1), ([NAN,INF,big], 1):
        o = Scores(torch.tensor(values))
        select([o], 0, k)
        assert torch.equal(o.keep==0, lowest(o.values, k))

def test_in_pieces_and_at_once_agree(monkeypatch):
    "A Sparsifier whose scores come in pieces gives the masks of one that ranks everything, over a rising and falling walk"
    def model(): torch.manual_seed(0); return nn.Sequential(nn.Conv2d(8,16,3), nn.Conv2d(16,16,3), nn.Conv2d(16,2,1))
    for context,criteria in product(['local','global'], [large_final, movement, small_final]):
        masks = []
        for chunk in (64, 2**20):
            monkeypatch.setattr(streaming, 'CHUNK', chunk)
            monkeypatch.setattr(streaming, 'SAMPLE', 256)
            m = model()
            sp = Sparsifier(m, 'weight', context, criteria)
            torch.manual_seed(1)
            for level in (5,20,20.5,21,60,40,95,100):
                for p in m.parameters(): p.data += torch.randn_like(p)
                sp.update(level)
                masks.append({k:v.clone() for k,v in sp.masks.items()})
        for a,b in zip(masks[:8], masks[8:]): assert all(torch.equal(a[k], b[k]) for k in a)

@given(st.integers(0, 10**9), st.one_of(st.sampled_from(LEVELS), st.decimals(0, 100, places=6).map(float)))
def test_count(n, pct): assert n_of(n, pct)==exact(n, pct)

# --- masks that are renewed in one way and then in another

def test_layers_that_compete_in_another_way():
    "How many are gone is counted anew when one layer was zeroed by itself, and what scores highest returns"
    for criteria in (large_final, large_init):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4,8,3), nn.ReLU(), nn.Conv2d(8,16,3))
        sp = Sparsifier(model, 'weight', 'global', criteria, example_inputs=torch.randn(2,4,9,9))
        sp.update(50)
        sp.sparsify_layer('0', 95)
        assert sp.reached()>60
        scores = torch.cat([m.weight.detach().abs().flatten() for m in (model[0],model[2])]) if criteria is large_final else torch.cat([w0.abs().flatten() for w0 in sp.about.kept['w0'].values()])
        gone = torch.cat([~sp.masks[f'{n}.weight'].flatten() for n in (0,2)])
        sp.update(55)
        back = gone & torch.cat([sp.masks[f'{n}.weight'].flatten() for n in (0,2)])
        assert sp.reached()==pytest.approx(100*exact(1440, 55)/1440)
        if criteria is large_init: assert scores[back].min()>=scores[gone & ~back].max()

def test_patterns_by_the_scores_of_now():
    "A pattern is laid by the weights as they are, also where an update before asked for scores and changed nothing"
    model = nn.Sequential(nn.Conv2d(4,8,3))
    sp = Sparsifier(model, '2:4')
    sp.sparsify_below(-1.)
    with torch.no_grad(): model[0].weight.copy_(torch.randn(8,4,3,3))
    groups = model[0].weight.detach().movedim(1, -1).reshape(-1, 4).abs()
    sp.sparsify_model(50)
    kept = sp.masks['0.weight'].movedim(1, -1).reshape(-1, 4)
    assert all(g[k].min()>=g[~k].max() for g,k in zip(groups, kept))

SHIFTS = dict(rows=((16,8), lambda p: p[0]), image=((1,8), lambda p: p), words=((1,1,8), lambda p: p[0]), flat=((8,), lambda p: p))

@pytest.mark.parametrize('shape,used', SHIFTS.values(), ids=SHIFTS)
def test_a_shift_of_several_axes(shape, used):
    "What is added to the channels goes with them along the axis that they are on"
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.p = nn.Linear(5,8,bias=False),nn.Linear(8,4),nn.Parameter(torch.ones(shape))
        def forward(self, x): return self.b(torch.relu(self.a(x)+used(self.p)))
    model = Shifted()
    sp = Sparsifier(model, 'filter', layer_type=nn.Linear, example_inputs=torch.randn(2,5))
    sp.sparsify_layer('a', 50)
    gone = (model.a.weight==0).all(1)
    assert gone.sum()==4 and torch.equal((used(model.p)==0).flatten(), gone)

@pytest.mark.parametrize('granularity', ['weight','filter','kernel','2:4'])
def test_weights_that_were_cut_are_refused(granularity):
    "Masks of another shape than the weight say so"
    model,x = nn.Sequential(nn.Conv2d(4,8,3), nn.ReLU(), nn.Conv2d(8,16,3)),torch.randn(2,4,9,9)
    sp = Sparsifier(model, granularity, example_inputs=x)
    sp.update(30)
    Pruner(model, 50, example_inputs=x).prune_model()
    for f in (sp.apply_masks, lambda: sp.update(40)):
        with pytest.raises(ValueError, match='when its masks were made'): f()

@pytest.mark.parametrize('granularity,criteria', [('weight',lambda w: w.abs()), ('kernel',large_final), ('2:4',large_final), ('filter',movement)])
def test_scores_do_not_stay(granularity, criteria):
    "After an update nothing is left that is as large as the weights, but the masks"
    sp = Sparsifier(nn.Sequential(nn.Conv2d(4,8,3)), granularity, criteria=criteria)
    sp.update(30)
    assert (sp._last is None or sp._last.seen) and all(o._whole is None for o in sp.layers)  # where weights are views, what looks at them stays
