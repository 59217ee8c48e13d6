"Cutting channels out of networks whose code counts on sizes, and finding out which"
import copy,functools,json,threading,warnings
import pytest,torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations,prune
from fasterai.core.graph import ChannelGraph
from fasterai.core.proof import difference
from fasterai.core.running import untouched
from fasterai.core.sizes import Attr,Told
from fasterai.core.surgery import apply_plan,copy_of,cut,follow_cut,legal,plan_of
from fasterai.misc.all import BN_Folder,FC_Decomposer
from fasterai.prune.pruner import Pruner,load_pruned,save_pruned
from test_pruner import Net,conv,head,kept,randomized,zero

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)
SEQ = torch.randn(2, 7, 5, dtype=torch.float64)

def net(f, attrs={}, **layers):
    "A `Net` with attributes, random everywhere and in double precision"
    m = Net(f, **layers)
    for k,v in attrs.items(): setattr(m, k, v)
    return randomized(m)

def off(m, *filters):
    "Zero filters of layer `m`"
    if filters: zero(list(filters), m.weight, *([m.bias] if m.bias is not None else []))

def lossless(m, x=X):
    "A smaller copy that computes the same, also for other inputs; `m` is as it was"
    was,state = {n:dict(vars(o)) for n,o in m.named_modules()},{k:v.clone() for k,v in m.state_dict().items()}
    small = Pruner().prune_model(m, x)
    assert difference(m, small, torch.randn_like(x))[0]<1e-12
    assert all(vars(o)==was[n] for n,o in m.named_modules()) and all(torch.equal(v, state[k]) for k,v in m.state_dict().items())
    return small

def attributes(m): return {n:{k:v for k,v in vars(o).items() if k[0]!='_'} for n,o in m.named_modules()}

class Runs:
    "How often a model, or a copy of it, is run with weights and without"
    def __init__(self, monkeypatch, of):
        self.real,self.meta,f = 0,0,of.f
        def counted(m, x, *args):
            if x.is_meta: self.meta += 1
            else: self.real += 1
            return f(m, x, *args)
        of.f = counted

# --- what the code takes from attributes

def res2net(m, x):
    "`Bottle2neck` of timm"
    out = []
    for i,o in enumerate(torch.split(m.a(x), m.width, 1)): out.append(m.convs[i](o if i==0 else o+out[-1]) if i<m.num_scales else o)
    return m.head(torch.cat(out, 1))

def test_equal_pieces_of_a_width():
    m = net(res2net, dict(width=6, num_scales=3), a=conv(3,24), convs=nn.ModuleList(conv(6,6) for _ in range(3)), head=head(24))
    off(m.a, 1, 7, 13, 19)
    for o in m.convs: off(o, 1)
    small = lossless(m)
    assert (small.width,small.num_scales,small.a.out_channels,small.convs[1].in_channels)==(5,3,20,5) and type(small.width) is int
    Pruner(m, 50, example_inputs=X).prune_model()
    assert (m.width,m.a.out_channels)==(3,12) and m(X).shape==(2,3)

def slim(m, x): return m.head(m.b(F.relu(m.a(x))[:, :m.out_chs]))
def slim_by_narrow(m, x): return m.head(m.b(torch.narrow(F.relu(m.a(x)), 1, 0, m.out_chs)))
def slim_from_the_end(m, x): return m.head(m.b(F.relu(m.a(x)).narrow(1, m.rest, m.out_chs)))
def slim_negative(m, x): return m.head(m.b(F.relu(m.a(x))[:, -m.out_chs:, 1:, :-1]))
def slim_dots(m, x): return m.head(m.b(F.relu(m.a(x)).movedim(1, -1)[..., m.rest:m.all].movedim(-1, 1)))
def slim_between(m, x): return m.head(m.b(F.relu(m.a(x))[:, m.rest:m.rest+m.out_chs]))

@pytest.mark.parametrize('f,lo', [(slim,0),(slim_by_narrow,0),(slim_from_the_end,4),(slim_negative,4),(slim_dots,4),(slim_between,4)])
def test_a_slice_by_attributes(f, lo):
    "As in ghost modules"
    m = net(f, dict(out_chs=8, rest=4, all=12), a=conv(3,12), b=conv(8,6), head=head(6))
    off(m.a, lo+1, lo+5)
    small = lossless(m)
    gone = set(range(lo)) if lo else {8,9,10,11}  # nobody reads these; one stays where a number says how many there are
    assert small.b.in_channels==6 and {lo+1,lo+5} <= set(range(12))-set(kept(small, 'a.weight')) <= {lo+1,lo+5}|gone
    Pruner(m, 50, example_inputs=X).prune_model()
    assert m.b.in_channels<8 and m(X).shape==(2,3)
    for o in (small,m):
        if f is slim_dots: assert o.rest<4 and o.all==o.a.out_channels
        else: assert o.out_chs==o.b.in_channels

@pytest.mark.parametrize('cut,stays', [(lambda y: y[:, :3],{0,1,2}), (lambda y: y[:, 3:],{0,1,2}), (lambda y: y[:, :-3],{5,6,7}), (lambda y: y[:, -3:],{5,6,7}),
    (lambda y: y.narrow(1, 0, 3),{0,1,2}), (lambda y: y[:, 2:-2],{0,1,6,7}), (lambda y: y[:, ::2],set(range(8))), (lambda y: y[:, [0,3,4]],set(range(8)))])
def test_a_slice_by_numbers(cut, stays):
    "What a number counts has to stay, and nothing else"
    m = net(lambda m,x: m.head(m.b(cut(F.relu(m.a(x))))), a=conv(3,8), b=conv(cut(torch.zeros(1,8)).shape[1],6), head=head(6))
    off(m.a, 1, 4, 6)
    left = set(kept(lossless(m), 'a.weight')) if {1,4,6}-stays else set(range(8))
    assert {1,4,6}&left=={1,4,6}&stays and stays<=left

def partial(m, x):
    "As in FasterNet: the rest goes by"
    y = m.a(x)
    a,b = torch.split(y, [m.part,y.shape[1]-m.part], dim=1)
    return m.head(torch.cat([m.b(a),b], 1))
def partial_named(m, x):
    a,b = m.a(x).split((m.part,m.rest), 1)
    return m.head(torch.cat([m.b(a),b], 1))
def partial_written(m, x):
    "Over a slice of a copy"
    y = m.a(x).clone()
    y[:, :m.part] = m.b(y[:, :m.part])
    return m.head(y)

@pytest.mark.parametrize('f', [partial,partial_named,partial_written])
def test_unequal_pieces(f):
    m = net(f, dict(part=4, rest=8), a=conv(3,12), b=conv(4,4), head=head(12))
    off(m.a, 1, 6, 7)
    off(m.b, 1)
    small = lossless(m)
    assert small.part==3 and small.b.in_channels==small.b.out_channels==3 and kept(small, 'a.weight')==[0,2,3,4,5,8,9,10,11]
    Pruner(m, 50, example_inputs=X).prune_model()
    assert m.part==m.b.in_channels<4 and m(X).shape==(2,3)

class Hornet(nn.Module):
    def __init__(self, dims=(2,4,8)):
        super().__init__()
        self.dims = [*dims]
        self.proj_in,self.dw = conv(3, dims[0]+sum(dims)),conv(sum(dims), sum(dims), groups=sum(dims))
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a,b in zip(dims, dims[1:]))
        self.head = head(dims[-1])
    def forward(self, x):
        a,rest = torch.split(self.proj_in(x), (self.dims[0],sum(self.dims)), dim=1)
        ws = torch.split(self.dw(rest), self.dims, dim=1)
        x = a*ws[0]
        for pw,w in zip(self.pws, ws[1:]): x = pw(x)*w
        return self.head(x)

def test_a_list_of_sizes_and_their_sum(tmp_path):
    m = randomized(Hornet())
    off(m.proj_in, 1, 3)
    off(m.dw, 1)
    for i in (2,3): off(m.pws[0], i)
    off(m.dw, *(1,4,5))
    small = lossless(m)
    assert small.dims==[1,2,8] and type(small.dims) is list and all(type(o) is int for o in small.dims)
    Pruner(m, 50, example_inputs=X).prune_model()
    assert m.dims==[1,2,4] and m(X).shape==(2,3)
    save_pruned(m, tmp_path/'a')
    again = load_pruned(tmp_path/'a', Hornet().double())
    assert again.dims==[1,2,4] and torch.equal(again.eval()(X), m.eval()(X))

class Stages(nn.Module):
    "As in HRNet: lists and dicts of widths"
    def __init__(self, wrap=lambda widths: dict(stage=dict(NUM_CHANNELS=[*widths]))):
        super().__init__()
        self.cfg = wrap((4,6))
        self.branches = nn.ModuleList(nn.Sequential(conv(3,o),nn.BatchNorm2d(o),nn.ReLU()) for o in (4,6))
        self.head = head(10)
    def widths(self):
        cfg = self.cfg
        return cfg['stage']['NUM_CHANNELS'] if isinstance(cfg, dict) else cfg[0]
    def forward(self, x):
        ys = [b(x).reshape(x.shape[0], n, -1) for b,n in zip(self.branches, self.widths())]
        return self.head(torch.cat(ys, 1).view(*x.shape[:1], sum(self.widths()), *x.shape[2:]))

@pytest.mark.parametrize('wrap', [lambda o: dict(stage=dict(NUM_CHANNELS=[*o])), lambda o: (o,'conv'), lambda o: [list(o)], lambda o: (torch.Size(o),)])
def test_sizes_inside_of_containers(wrap, tmp_path):
    make = lambda: randomized(Stages(wrap))
    m = make()
    zero([1], m.branches[0][0].weight, m.branches[0][0].bias, m.branches[0][1].bias)
    zero([0,4], m.branches[1][0].weight, m.branches[1][0].bias, m.branches[1][1].bias)
    small = lossless(m)
    assert list(small.widths())==[3,4] and type(small.cfg) is type(m.cfg) and type(small.widths()) is type(m.widths())
    save_pruned(small, tmp_path/'a')
    again = load_pruned(tmp_path/'a', make())
    assert again.cfg==small.cfg and type(again.widths()) is type(m.widths()) and difference(small, again, X)[0]==0

def heads_of(m, x, split):
    (B,T,C),qkv = x.shape,(split(m, o) for o in (m.q(x),m.k(x),m.v(x)))
    q,k,v = (o.transpose(1,2) for o in qkv)
    y = ((q@k.transpose(-1,-2)/8).softmax(-1)@v).transpose(1,2)
    return m.out(JOINS[m.join](m, y, B, T)).mean(1)

SPLITS = dict(heads_and_width=lambda m,o: o.view(*o.shape[:2], m.heads, m.width), inferred=lambda m,o: o.view(*o.shape[:-1], m.heads, -1),
    quotient=lambda m,o: o.reshape(o.size(0), o.size(1), m.heads, o.size(-1)//m.heads), unflattened=lambda m,o: o.unflatten(-1, (m.heads,m.width)),
    unflattened_torch=lambda m,o: torch.unflatten(o, 2, [m.heads,m.width]), by_width=lambda m,o: o.view(*o.shape[:2], o.shape[-1]//m.width, m.width),
    expanded=lambda m,o: o.view(len(o), -1, m.heads, m.width).expand(-1, -1, m.heads, m.width), from_dim=lambda m,o: o.view(*o.shape[:2], m.heads, m.dim//m.heads))
JOINS = dict(product=lambda m,y,B,T: y.reshape(B, T, m.heads*m.width), inferred=lambda m,y,B,T: y.flatten(2), dim=lambda m,y,B,T: y.reshape(B, T, m.dim))

@pytest.mark.parametrize('join', JOINS)
@pytest.mark.parametrize('split', SPLITS)
def test_heads(split, join):
    m = net(lambda m,x: heads_of(m, x, SPLITS[split]), dict(heads=3, width=4, dim=12, join=join), q=nn.Linear(5,12), k=nn.Linear(5,12), v=nn.Linear(5,12), out=nn.Linear(12,2))
    Pruner(m, 50, example_inputs=SEQ).prune_model()
    assert m.heads==3 and m.q.out_features==m.v.out_features==6
    if split in ('heads_and_width','unflattened','unflattened_torch','by_width','expanded') or join=='product': assert m.width==2
    if 'dim' in (split.removeprefix('from_'),join): assert m.dim==6
    assert m(torch.randn(4, 9, 5, dtype=torch.float64)).shape==(4,2)

def test_attributes_of_other_modules():
    "Of a child, of a parent, and of a layer of torch"
    class Inner(nn.Module):
        def __init__(self, outer):
            super().__init__()
            self.outer,self.width = [outer],4
        def forward(self, x):
            outer = self.outer[0]
            return x.view(len(x), outer.groups, self.width, -1).flatten(1, 2)
    m = net(lambda m,x: m.fc(m.inner(m.a(x)).view(len(x), m.groups*m.inner.width, 8, 8)[:, :m.a.out_channels].mean((2,3))), dict(groups=3), a=conv(3,12), fc=nn.Linear(12,2))
    m.inner = Inner(m)
    off(m.a, 1, 5, 9)
    small = lossless(m)
    assert (small.a.out_channels,small.groups,small.inner.width)==(9,3,3)

class Norm(nn.Module):
    "That of ConvNeXt: a normalization of channels that come last, or first"
    def __init__(self, n, last=True):
        super().__init__()
        self.weight,self.bias,self.normalized_shape,self.last = nn.Parameter(torch.ones(n)),nn.Parameter(torch.zeros(n)),(n,),last
    def forward(self, x):
        if self.last: return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-6)
        assert x.shape[1]==self.normalized_shape[0]
        u = x.mean(1, keepdim=True)
        x = (x-u)/((x-u).pow(2).mean(1, keepdim=True)+1e-6).sqrt()
        return self.weight[:,None,None]*x+self.bias[:,None,None]

@pytest.mark.parametrize('last', [True,False])
def test_a_norm_of_ones_own(last):
    f = lambda m,x: m.head(m.norm(m.a(x).permute(0,2,3,1)).permute(0,3,1,2) if m.norm.last else m.norm(m.a(x)))
    m = net(f, a=conv(3,8), norm=Norm(8, last), head=head(8))
    Pruner(m, 50, example_inputs=X).prune_model()
    assert m.norm.normalized_shape==(4,) and m.a.out_channels==4 and m(X).shape==(2,3)

@pytest.mark.parametrize('check', ['assert','if','told','size'])
def test_a_check_goes_with_the_channels(check):
    def f(m, x):
        y = m.a(x)
        if check=='assert': assert y.shape[1]==m.dim, 'wrong'
        if check=='if' and y.shape[1]!=m.dim: raise ValueError('wrong')
        if check=='told' and y.shape!=(x.shape[0],m.dim,8,8): raise ValueError('wrong')
        if check=='size' and m.dim!=y.size(1): raise ValueError('wrong')
        return m.head(y)
    m = net(f, dict(dim=8), a=conv(3,8), head=head(8))
    off(m.a, 1, 5)
    small = lossless(m)
    assert small.dim==small.a.out_channels==6

def test_modules_of_torch():
    m = randomized(nn.Sequential(nn.Flatten(2), nn.Conv1d(3,8,1), nn.Conv1d(8,12,1), nn.Unflatten(1, (3,4)), nn.Flatten(1,2), nn.Unflatten(2, (8,8)), head(12)))
    Pruner(m, 50, example_inputs=X).prune_model()
    assert m[2].out_channels==6 and tuple(m[3].unflattened_size)==(3,2) and tuple(m[5].unflattened_size)==(8,8)
    m = randomized(nn.Transformer(8, 2, 1, 1, 16, batch_first=True))
    ins = tuple(torch.randn(2, n, 8, dtype=torch.float64) for n in (5,3))
    class Wrapped(nn.Module):
        def __init__(self): super().__init__(); self.i,self.t,self.o = nn.Linear(5,8),m,nn.Linear(8,2)
        def forward(self, x): return self.o(self.t(self.i(x), self.i(x)).mean(1))
    w = randomized(Wrapped())
    Pruner(w, 50, example_inputs=SEQ).prune_model()
    assert w.t.d_model==w.i.out_features==4 and w(SEQ).shape==(2,2)

# --- one attribute for several

def test_what_has_one_size_keeps_one():
    "One width for two streams, of which fewer channels are dead in one: of the other as many go"
    f = lambda m,x: m.head(torch.cat([m.a(x).view(len(x), m.width, 8, 8), m.b(x).view(len(x), m.width, 8, 8)], 1))
    m = net(f, dict(width=8), a=conv(3,8), b=conv(3,8), head=head(16))
    off(m.a, 1, 2, 5)
    off(m.b, 4)
    small,why = lossless(m),{}
    assert small.width==small.a.out_channels==small.b.out_channels==7
    graph = ChannelGraph(m, X)
    dead = torch.cat([graph.classes(graph.out(o.weight).ids)[i] for o,i in ((m.a,[1,2,5]),(m.b,[4]))])
    _,_,removed = legal(m, graph, dead, why=why)
    assert len(removed)==2 and set(why)==set(dead.tolist())-set(removed.tolist()) and all('counts on width' in o for o in why.values())

def test_an_attribute_that_means_something_else_as_well():
    "A number of channels that is the size of the image, too"
    f = lambda m,x: m.head(m.a(x).view(len(x), m.n, -1).view(len(x), -1, m.n, m.n))
    m = net(f, dict(n=8), a=conv(3,8), head=head(8))
    off(m.a, 1, 5)
    small = lossless(m)
    assert small.n==8 and small.a.out_channels==8

def test_no_piece_gets_empty():
    f = lambda m,x: m.head(torch.cat([o for o in m.a(x).split([m.few,m.more], 1)][::-1], 1))
    m = net(f, dict(few=2, more=6), a=conv(3,8), head=head(8))
    off(m.a, 0, 1, 4)
    small = lossless(m)
    assert (small.few,small.more)==(1,5)

# --- numbers in the code

def why_of(m, x, dead):
    "Of filters that were to be removed, by layer: which stay, and why"
    graph,why = ChannelGraph(m, x),{}
    classes = {n:graph.classes(graph.out(f'{n}.weight').ids)[i] for n,i in dead.items()}
    new,plan,removed = legal(m, graph, torch.cat(list(classes.values())).unique(), why=why)
    assert set(why)==set(torch.cat(list(classes.values())).tolist())-set(removed.tolist())
    return new,{n:{why.get(o) for o in c.tolist()} for n,c in classes.items()}

def test_a_number_in_the_code_and_where_it_stands():
    def f(m, x):
        a,b = m.b(F.relu(m.a(x))).split(6, 1)
        return m.head(m.c(torch.max(a, b)))
    m = net(f, a=conv(3,8), b=conv(8,12), c=conv(6,6), head=head(6))
    _,why = why_of(m, X, dict(a=[1], b=[2,8], c=[3]))
    line = f.__code__.co_firstlineno+1
    assert why==dict(a={None}, b={f'split in the model (test_surgery.py:{line}) counts on the number 6'}, c={None})

def test_a_reshape_that_runs_and_takes_others():
    "Of eight rows, two groups of four; of four, one: it runs, and computes something else"
    f = lambda m,x: m.b(m.a(x).view(-1, 4).amax(1).view(2, -1).repeat(1, 4)[:, :8])
    m = net(f, a=nn.Linear(5,8), b=nn.Linear(8,2))
    x = torch.randn(2, 5, dtype=torch.float64)
    off(m.a, 1, 2, 4, 7)
    assert lossless(m, x).a.out_features==8

@pytest.mark.parametrize('check', [lambda y: y.shape[1]==8, lambda y: y.shape[1]%4==0, lambda y: str(y.shape)!='torch.Size([2, 7, 8, 8])'])
def test_a_check_against_a_number(check):
    def f(m, x):
        y = m.a(F.relu(m.z(x)))
        assert check(y), 'wrong number of channels'
        return m.head(y)
    m = net(f, z=conv(3,6), a=conv(6,8), head=head(8))
    new,why = why_of(m, X, dict(z=[1], a=[5]))
    assert (new.z.out_channels,new.a.out_channels)==(5,8) and why['z']=={None} and why['a']!={None}

def test_what_is_found_by_trial_is_tried_without_weights(monkeypatch):
    "Twelve modules of the same code, with a number in it: each real run is one too many"
    class Block(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(10,12),nn.Linear(12,10)
        def forward(self, x): return x+self.b(self.a(x).view(*x.shape[:2], 3, 4).flatten(2))
    m = net(lambda m,x: m.fc(m.blocks(m.i(x)).mean(1)), i=nn.Linear(5,10), blocks=nn.Sequential(*(Block() for _ in range(12))), fc=nn.Linear(10,2))
    runs = Runs(monkeypatch, m)
    graph = ChannelGraph(m, SEQ)
    runs.real = 0
    dead = torch.cat([graph.classes(graph.out(o.a.weight).ids)[[3,7,11]] for o in m.blocks]+[graph.classes(graph.out(m.i.weight).ids)[:2]]).unique()
    new,_,removed = legal(m, graph, dead)
    assert new.i.out_features==8 and [o.a.out_features for o in new.blocks]==[12]*12
    assert runs.real<=2 and runs.meta<=4

def test_no_trial_where_attributes_tell(monkeypatch):
    m = net(res2net, dict(width=6, num_scales=3), a=conv(3,24), convs=nn.ModuleList(conv(6,6) for _ in range(3)), head=head(24))
    graph = ChannelGraph(m, X)
    runs = Runs(monkeypatch, m)
    legal(m, graph, graph.classes(graph.out(m.a.weight).ids)[[1,2]])
    assert (runs.real,runs.meta)==(1,0)

def fixed_device(m, x):
    y = m.b(F.relu(m.a(x)))
    return m.head(y+torch.zeros(1, device=X.device)).view(-1, 3)+torch.tensor(m.offset, device=X.device)*y.view(2, 8, -1).mean((1,2))[:,None]
def of_values(m, x):
    y = m.b(F.relu(m.a(x)))
    return m.head(y)[:int((x>-9).sum()>0)+2]*y.view(2, 8, -1).mean()

@pytest.mark.parametrize('f', [fixed_device,of_values])
def test_where_the_meta_device_does_not_do(f):
    m = net(f, dict(offset=1.5), a=conv(3,8), b=conv(8,8), head=head(8))
    new,why = why_of(m, X, dict(a=[1], b=[5]))
    assert (new.a.out_channels,new.b.out_channels)==(7,8) and 'counts on the number 8' in [*why['b']][0]

class Cached(nn.Module):
    "A table that is no buffer, in an attribute and in a dict"
    def __init__(self):
        super().__init__()
        self.table,self.more,self.fc = torch.randn(8,8, dtype=torch.float64),{},nn.Linear(8,8)
    def forward(self, x):
        if 'k' not in self.more: self.more['k'] = torch.randn(8, dtype=torch.float64)
        return self.fc(x.view(-1, 8)@self.table+self.more['k'])

def tied(m):
    m.c.weight = m.b.weight
    return m
def buffered(m):
    m.register_buffer('scale', torch.rand(8,1,1, dtype=torch.float64)+.5, persistent=False)
    m.b.register_forward_hook(lambda o,args,y: y*m.scale)
    return m
KINDS = dict(plain=lambda m: m, tied=tied, pruned=lambda m: (prune.l1_unstructured(m.b, 'weight', .2),m)[1],
    weight_norm=lambda m: (parametrizations.weight_norm(m.c),m)[1], spectral=lambda m: (parametrizations.spectral_norm(m.c),m)[1])

@pytest.mark.parametrize('kind', KINDS)
def test_models_without_weights(kind):
    "What holds tensors of its own is copied without them as well"
    def f(m, x):
        y = m.c(F.relu(m.b(F.relu(m.a(x)))))
        return m.head(y)+m.cached(y.view(2, 8, -1).mean(-1))[:,:3]
    m = KINDS[kind](net(f, a=conv(3,6), b=conv(6,6), c=conv(6,6), d=conv(6,8), head=nn.Sequential(conv(8,8), head(8)), cached=Cached().double()))
    f2 = lambda m,x: m.head(y:=m.d(m.c(F.relu(m.b(F.relu(m.a(x)))))))+m.cached(y.view(2, 8, -1).mean(-1))[:,:3]
    m.f = f2
    with torch.no_grad(): m(X)
    graph = ChannelGraph(m, X)
    classes = lambda n: next(graph.classes(s.ids) for s in graph.slices if s.layer==n and s.role=='out')
    state = {k:v.clone() for k,v in m.state_dict().items()}
    new,_,removed = legal(m, graph, torch.cat([classes('d')[[1,2]], classes('head.0')[[3]]]))
    assert len(removed)==1 and new.d.out_channels==8 and new.head[0].out_channels==7
    assert not any(o.is_meta for o in (*m.parameters(),*m.buffers(),*new.parameters(),*new.buffers(),new.cached.table,new.cached.more['k'],m.cached.more['k']))
    assert all(torch.equal(v, state[k]) for k,v in m.state_dict().items()) and new(X).shape==(2,3)

# --- a model is as it was

def test_attributes_are_plain_again():
    def f(m, x):
        m.seen = x.shape[1]
        m.sizes.append(m.width)
        m.by['last'] = m.width*2
        m.shape = x.shape
        y = m.a(x).view(len(x), m.width, 8, 8)
        return m.head(y)
    m = net(f, dict(width=8, sizes=[1,2], by={'one':1}, fixed=(1,(2,3)), flag=True), a=conv(3,8), head=head(8))
    was = attributes(m)['']
    fixed,sizes,by = m.fixed,m.sizes,m.by
    ChannelGraph(m, X)
    assert m.fixed is fixed and m.sizes is sizes and m.by is by and m.flag is True
    told = lambda o: isinstance(o, Told) or isinstance(o, (tuple,list)) and any(map(told, o)) or isinstance(o, dict) and any(map(told, o.values()))
    assert not any(told(o) for o in vars(m).values())
    assert (m.sizes,m.by,m.width)==([1,2],{'one':1},8) and not hasattr(m, 'seen') and not hasattr(m, 'shape')

def test_attributes_are_back_after_an_error():
    def f(m, x): raise RuntimeError('no')
    m = net(f, dict(width=8, sizes=[1,2]), a=conv(3,8))
    with pytest.raises(ValueError, match='does not run where its channels are followed .RuntimeError: no.'): ChannelGraph(m, X)
    assert type(m.width) is int and [type(o) for o in m.sizes]==[int,int]

def test_a_plan_for_another_model_like_it():
    m = randomized(Hornet())
    graph = ChannelGraph(m, X)
    gone = graph.classes(graph.out(m.pws[1].weight).ids)[[0,5]]
    plan = json.loads(json.dumps(plan_of(m, graph, gone)))
    plan['kept'] = {k:{int(d):i for d,i in v.items()} for k,v in plan['kept'].items()}
    other = apply_plan(randomized(Hornet()), plan)
    assert other.dims==[2,4,6] and other(X).shape==(2,3) and m.dims==[2,4,8]

def test_again_and_again():
    "The graph goes on with what is left"
    m = net(res2net, dict(width=6, num_scales=3), a=conv(3,24), convs=nn.ModuleList(conv(6,6) for _ in range(3)), head=head(24))
    graph = ChannelGraph(m, X)
    classes = graph.classes(graph.out(m.a.weight).ids)[:6]
    for i,n in ((2,5),(0,4),(5,3)):
        _,removed = cut(m, graph, classes[[i]])
        follow_cut(graph, removed)
        assert len(removed)==1 and m.width==n and m(X).shape==(2,3)
    now = ChannelGraph(m, X)
    assert [s.numbers for s in now.sizings]==[[len(o.rows()) if o.labels else n for n,o in zip(s.numbers, s.axes)] if all(s.axes) else t.numbers for s,t in zip(graph.sizings, now.sizings)]

# --- memory

def formats(m): return {n:p.is_contiguous(memory_format={4:torch.channels_last,5:torch.channels_last_3d}[p.dim()]) and p.stride()!=p.contiguous().stride() for n,p in m.named_parameters() if p.dim()>3 and min(p.shape[1:3])>1}

@pytest.mark.parametrize('dim', [2,3])
@pytest.mark.parametrize('ratio', [None,50])
def test_channels_last_stays(ratio, dim):
    C,N = (nn.Conv2d,nn.BatchNorm2d) if dim==2 else (nn.Conv3d,nn.BatchNorm3d)
    last = torch.channels_last if dim==2 else torch.channels_last_3d
    m = randomized(nn.Sequential(C(3,8,3), N(8), nn.ReLU(), C(8,6,1), nn.ReLU(), C(6,6,3,groups=6), C(6,8,2), nn.AdaptiveAvgPool3d(1) if dim==3 else nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2)))
    x = torch.randn(2, 3, *[8]*dim, dtype=torch.float64).to(memory_format=last)
    m = m.to(memory_format=last)
    opt = torch.optim.SGD(m.parameters(), lr=.1, momentum=.9)
    m.train()(x).sum().backward()
    opt.step()
    m.eval()
    zero([1,4], m[0].weight, m[0].bias, m[1].weight, m[1].bias)
    zero([2], m[3].weight, m[3].bias)
    small = Pruner().prune_model(m, x) if ratio is None else Pruner(m, ratio, example_inputs=x).prune_model(optimizer=opt)
    assert small[0].out_channels<8 and all(formats(small).values())
    assert [p.stride() for p in small.parameters()]==[p.stride() for p in copy.deepcopy(small).to(memory_format=last).parameters()]
    assert small[:4](x).is_contiguous(memory_format=last)==m[:4](x).is_contiguous(memory_format=last)
    if ratio is None: return
    for p in small.parameters():
        for o in (p.grad,opt.state[p]['momentum_buffer']): assert o.shape==p.shape and (p.dim()<4 or o.is_contiguous(memory_format=last))

def test_contiguous_stays():
    m = nn.Sequential(conv(3,8), nn.Conv2d(8,6,1), nn.Conv2d(6,6,3,groups=6), head(6))
    Pruner(m, 50, example_inputs=X.float()).prune_model()
    assert all(p.stride()==p.contiguous().stride()==torch.empty(p.shape).stride() for p in m.parameters())

# --- anything

def random_net(seed):
    "A chain of blocks that split, slice and reshape by attributes, in several spellings"
    gen = torch.Generator().manual_seed(seed)
    pick = lambda n: int(torch.randint(n, (1,), generator=gen))
    class Block(nn.Module):
        def __init__(self, n, kind):
            super().__init__()
            self.n,self.kind = n,kind
            self.part,self.rest = n//3,n-n//3
            self.sizes = [self.part,self.rest]
            self.grid = dict(g=2, w=n//2)
            self.conv,self.inner,self.out = conv(n,n),conv(self.part,self.part),conv(n,n+pick(4)*2)
        def forward(self, x):
            y = F.relu(self.conv(x))
            if self.kind==0: a,b = torch.split(y, self.sizes, 1)
            if self.kind==1: a,b = y[:, :self.part],y[:, self.part:]
            if self.kind==2: a,b = y.narrow(1, 0, self.part),y.narrow(1, self.part, self.rest)
            if self.kind==3: a,b = y[:, :-self.rest],y[:, -self.rest:]
            if self.kind==4: a,b = y.split([self.part,y.shape[1]-self.part], dim=1)
            if self.kind<5: y = torch.cat([b,self.inner(a)], 1)
            if self.kind==5: y = y.view(len(y), self.grid['g'], self.grid['w'], *y.shape[2:]).transpose(1, 2).flatten(1, 2)
            if self.kind==6:
                assert y.shape[1]==self.n
                y = y.reshape(len(y), self.n, -1).unflatten(2, x.shape[2:])
            return self.out(y)
    blocks,n = [],6
    for _ in range(3):
        blocks.append(Block(n, pick(7)))
        n = blocks[-1].out.out_channels
    return randomized(nn.Sequential(conv(3,6), *blocks, head(n)))

@pytest.mark.parametrize('seed', range(25))
def test_random_nets(seed):
    m = random_net(seed)
    gen = torch.Generator().manual_seed(seed)
    for o in m.modules():
        if isinstance(o, nn.Conv2d): off(o, *(i for i in range(o.out_channels) if torch.rand(1, generator=gen)<.3))
    small = lossless(m)
    assert sum(p.numel() for p in small.parameters())<sum(p.numel() for p in m.parameters())
    Pruner(m, 40, example_inputs=X).prune_model()
    widths = [o.conv.out_channels for o in m[1:-1]]
    assert m(X).shape==(2,3) and all(n<o.conv.weight.shape[0]+1 for n,o in zip(widths, m[1:-1]))
    for o in m[1:-1]:
        if o.kind==6: assert o.n==o.conv.out_channels
        if o.kind<5: assert o.inner.in_channels==(o.sizes[0] if o.kind==0 else o.conv.out_channels-o.rest if o.kind==3 else o.part)

class Locked(nn.Module):
    "Holds what has no copy"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.lock,self.numbers = nn.Conv2d(3,8,3),nn.Conv2d(8,4,3),threading.Lock(),(i for i in range(3))
    def forward(self, x):
        with self.lock: return self.b(self.a(x).relu())

def test_what_has_no_copy_is_shared():
    model,x = nn.Sequential(Locked()).eval(),torch.randn(2,3,8,8)
    with torch.no_grad(): model[0].a.weight[:3],model[0].a.bias[:3] = 0,0
    with pytest.warns(UserWarning, match='share objects that cannot be copied: 0.lock, a lock, 0.numbers, a generator'): small = Pruner().prune_model(model, x)
    assert small[0].a.out_channels==5 and small[0].lock is model[0].lock and small[0].b is not model[0].b
    torch.testing.assert_close(small(x), model(x))
    with pytest.warns(UserWarning, match='share objects that cannot be copied'): Pruner(model, 50, example_inputs=x).prune_model()
    assert model[0].a.out_channels==4

@pytest.mark.parametrize('change', [lambda l: prune.l1_unstructured(l, 'weight_ih_l0', .3), lambda l: prune.random_structured(l, 'weight_ih_l0', .3, dim=1), lambda l: prune.l1_unstructured(l, 'weight_hh_l0', .3),
    lambda l: prune.l1_unstructured(l, 'bias_ih_l0', .3), lambda l: parametrizations.spectral_norm(l, 'weight_hh_l0')], ids=['ih','columns','hh','bias','spectral'])
@pytest.mark.parametrize('kind', [nn.LSTM,nn.GRU])
def test_recurrent_layers_whose_weights_are_computed(change, kind):
    "What comes in can be cut as if the weight were a parameter"
    torch.manual_seed(0)
    model = Net(lambda m,x: m.o(m.l(F.relu(m.c(x)).transpose(1, 2))[0][:,-1]), c=nn.Conv1d(3,8,3), l=kind(8,6,batch_first=True), o=nn.Linear(6,2)).eval()
    change(model.l)
    with torch.no_grad(): model.c.weight[:3],model.c.bias[:3] = 0,0
    x = torch.randn(2,3,9)
    small = Pruner().prune_model(model, x)
    assert small.c.out_channels==small.l.input_size==int((model.l.weight_ih_l0!=0).any(0)[3:].sum())
    torch.testing.assert_close(small(x), model(x))
    spectral = hasattr(model.l, 'parametrizations')  # a norm over all of the weight
    with pytest.warns(UserWarning, match='l kept all channels') if spectral else warnings.catch_warnings(): Pruner(model, 50, example_inputs=x).prune_model()
    assert (model.c.out_channels,model.l.input_size,model.l.hidden_size)==(4,4,6 if spectral else 3) and model(x).shape==(2,2)

@pytest.mark.parametrize('keep', [lambda m: setattr(m[1], 'forward', torch.compile(m[1].forward, backend='eager')), lambda m: setattr(m, 'forward', torch.compile(m.forward, backend='eager')),
    lambda m: setattr(m[1], 'forward', functools.partial(m[1].forward)), lambda m: setattr(m[1], 'forward', m[1].forward), lambda m: setattr(m[1], 'forward', torch.compile(functools.partial(m[1].forward), backend='eager'))],
    ids=['compiled','compiled_whole','partial','bound','compiled_partial'])
def test_methods_that_are_attributes(keep):
    "A copy calls those of its own modules"
    m = nn.Sequential(conv(3,8), nn.BatchNorm2d(8), nn.ReLU(), conv(8,6), head(6)).double().eval()
    keep(m)
    off(m[0], 1, 4)
    zero([1,4], m[1].bias)
    for new in (Pruner().prune_model(m, X),BN_Folder().fold(m, X),FC_Decomposer().decompose(m, .5)):
        assert sum(p.numel() for p in new.parameters())<sum(p.numel() for p in m.parameters())
        assert new(X).any()
        for p in new.parameters(): nn.init.zeros_(p)
        assert not new(X).any() and m(X).any()

def closed(m):
    own = m.forward
    m.forward = lambda x: own(x)
def with_default(m): m.forward = lambda x, parts=list(m): parts[1](parts[0](x))
def in_a_dict(m): m.how = dict(first=lambda x, w=m[0].weight: x*w.mean())
def by_name(m):
    _LAYERS_OF['own'] = m.forward
    m.forward = eval('lambda x: own(x)', _LAYERS_OF)
_LAYERS_OF = {}

@pytest.mark.parametrize('keep', [closed,with_default,in_a_dict,by_name])
@pytest.mark.parametrize('call', [lambda m: Pruner().prune_model(m, X), lambda m: Pruner(m, 50, example_inputs=X).prune_model(), lambda m: BN_Folder().fold(m, X), lambda m: FC_Decomposer().decompose(m, .5)],
    ids=['lossless','ratio','fold','decompose'])
def test_functions_that_hold_modules(keep, call):
    "They would compute with the modules of the original, and are refused"
    m = nn.Sequential(conv(3,8), nn.BatchNorm2d(8), nn.ReLU(), conv(8,6), head(6)).double().eval()
    keep(m)
    off(m[0], 1, 4)
    was = {k:v.clone() for k,v in m.state_dict().items()}
    with pytest.raises(ValueError, match='is a function that holds'): call(m)
    assert all(torch.equal(v, was[k]) for k,v in m.state_dict().items())

def test_a_copy_that_computes_with_the_original():
    "What only a run tells: here the code finds a layer by a global name"
    last = nn.Linear(8,2).double()
    _LAYERS.update(last=last)
    m = Net(_by_name, a=conv(3,8), norm=nn.BatchNorm2d(8), last=last).double().eval()
    off(m.a, 1, 4)
    zero([1,4], m.norm.bias)
    for call in (lambda: Pruner().prune_model(m, X),lambda: BN_Folder().fold(m, X)):
        with pytest.raises(ValueError, match='computes with last.weight of the original model'): call()

_LAYERS = {}
def _by_name(m, x): return _LAYERS['last'](m.norm(m.a(x)).mean((2,3)))
