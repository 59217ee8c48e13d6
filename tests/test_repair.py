"A changed network gives what it gave before, as far as least squares can have it so"
import itertools
import pytest, torch
from copy import deepcopy
from torch import nn
from torch.nn import functional as F
from fasterai.core.reads import Weights, columns_in, columns_out, follow, n_columns, reads_of
from fasterai.core.running import call_with
from fasterai.misc.all import FC_Decomposer
from fasterai.prune.all import Pruner
from fasterai.quantize.all import KMeansQuantizer
from fasterai.repair.all import Criteria, repair
from fasterai.repair.least_squares import Free, Moments, Shared, SharedInParts, kind_of
from fasterai.sparse.all import Sparsifier

def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()

def differs(a, b, x):
    "Share of the variance of what `b` gives"
    y,z = call_with(a, x),call_with(b, x)
    return ((y-z).square().sum()/(z-z.mean(0)).square().sum()).item()

# --- one layer

LAYERS = dict(
    linear=(lambda: nn.Linear(6, 4), (50,6)), no_bias=(lambda: nn.Linear(6, 4, bias=False), (50,6)), tokens=(lambda: nn.Linear(6, 4), (5,9,6)),
    conv1d=(lambda: nn.Conv1d(4, 6, 3, padding=1), (8,4,9)), conv2d=(lambda: nn.Conv2d(3, 5, (3,2), stride=(2,1), padding=(1,0)), (6,3,9,8)),
    conv3d=(lambda: nn.Conv3d(2, 3, 2, dilation=2), (6,2,6,5,5)), same=(lambda: nn.Conv2d(3, 5, 4, padding='same'), (6,3,7,7)),
    reflect=(lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode='reflect', bias=False), (6,3,7,7)), grouped=(lambda: nn.Conv2d(4, 6, 3, groups=2), (6,4,7,7)),
    depthwise=(lambda: nn.Conv2d(4, 8, 3, groups=4), (6,4,7,7)), transposed=(lambda: nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1, output_padding=1), (6,3,6,6)),
    transposed_grouped=(lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, groups=2), (9,4,8)))

def columns_of(layer, x):
    "What a layer reads and gives, by groups, in double precision"
    found = []
    def take(key, call, y):
        at = torch.arange(n_columns(call, y))
        found.append((columns_in(call, at).double(),columns_out(call, y, at).double(),Weights(call)))
    follow(layer, x, [('weight',0)], take)
    return found[0]

@pytest.mark.parametrize('kind', LAYERS)
def test_one_layer_is_least_squares(kind):
    "What `torch.linalg.lstsq` gives for each group, with a column of ones for the bias"
    make,shape = LAYERS[kind]
    layer,teacher,x = seeded(make),seeded(make, 1),torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    moved = nn.Sequential(nn.Identity(), layer)  # what comes in differs from what the teacher gets, so that no weight is exact
    class Bent(nn.Module):
        def __init__(self, layer, bend): super().__init__(); self.layer,self.bend = layer,bend
        def forward(self, x): return self.layer(x.sign()*x.abs()**self.bend)
    mine,theirs = Bent(layer, 1.5),Bent(teacher, 1.)
    cols,_,_ = columns_of(layer, x.sign()*x.abs()**1.5)
    _,wanted,_ = columns_of(teacher, x)
    repair(mine, theirs, x, ridge=0)
    held = columns_of(layer, x)[2].matrix().detach()
    for g in range(len(cols)):
        a = cols[g].T if layer.bias is None else torch.cat([cols[g].T,torch.ones(cols.shape[-1],1).double()], 1)
        best = torch.linalg.lstsq(a, wanted[g].T).solution.T
        torch.testing.assert_close(held[g], best[:,:cols.shape[1]].float(), rtol=1e-4, atol=1e-5)
        if layer.bias is not None: torch.testing.assert_close(layer.bias.detach().view(len(cols), -1)[g], best[:,-1].float(), rtol=1e-4, atol=1e-5)

# --- whatever spells it

class Attention(nn.Module):
    def __init__(self, dim=8, fused=True):
        super().__init__()
        self.inside,self.attn,self.out = nn.Linear(6, dim),nn.MultiheadAttention(dim, 2, batch_first=True),nn.Linear(dim, 3)
        self.other = nn.Linear(6, dim) if not fused else None
    def forward(self, x):
        y = self.inside(x)
        return self.out(self.attn(y, self.other(x) if self.other else y, y)[0])

class Functions(nn.Module):
    "Weights as parameters, read by functions"
    def __init__(self):
        super().__init__()
        self.qkv,self.b,self.w,self.c = (nn.Parameter(torch.randn(*o)/3) for o in ((12,6),(12,),(4,5),(5,)))
    def forward(self, x):
        q,k,v = F.linear(x, self.qkv, self.b).chunk(3, -1)
        y = (q*k).tanh()+v
        return torch.addmm(self.c, y.flatten(0, 1), self.w).view(*x.shape[:2], 5)

class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn,self.out = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True),nn.Linear(10, 3)
    def forward(self, x): return self.out(self.rnn(x)[0])

class Twice(nn.Module):
    "One layer, used for two inputs"
    def __init__(self):
        super().__init__()
        self.shared,self.out = nn.Linear(6, 8),nn.Linear(16, 3)
    def forward(self, x): return self.out(torch.cat([self.shared(x).relu(),self.shared(x.flip(1)*2).relu()], -1))

SPELLED = dict(attention=Attention, cross=lambda: Attention(fused=False), functions=Functions, lstm=lambda: Recurrent(nn.LSTM), gru=lambda: Recurrent(nn.GRU), siamese=Twice)
READS = dict(attention={'inside','attn','attn.out_proj','out'}, cross={'inside','other','attn','attn.out_proj','out'}, functions={''}, lstm={'rnn','out'}, gru={'rnn','out'}, siamese={'shared','out'})

@pytest.mark.parametrize('kind', SPELLED)
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64])
def test_spellings(kind, dtype):
    "Another network with the same layers can be had from scratch, where there are enough columns: each layer is found however it is spelled"
    mine,teacher = seeded(SPELLED[kind]).to(dtype),seeded(SPELLED[kind], 1).to(dtype)
    x = torch.randn(64, 9, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for n,p in mine.named_parameters():  # a state cannot be fitted: only what reads inputs is another
            if 'hh' in n: p.copy_(teacher.get_parameter(n))
    before = differs(mine, teacher, x)
    table = repair(mine, teacher, x, ridge=1e-9)
    fitted = table[table.why=='']
    assert set(fitted.layer)==READS[kind]
    assert (fitted.after<=fitted.before+1e-12).all()
    assert differs(mine, teacher, x)<1e-4*before

# --- what has changed a network

class Net(nn.Module):
    "A residual network with branches, norms and a grouped convolution"
    def __init__(self):
        super().__init__()
        self.stem,self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False),nn.BatchNorm2d(16)
        self.wide,self.wide_norm,self.back = nn.Conv2d(16, 24, 1),nn.BatchNorm2d(24),nn.Conv2d(24, 16, 3, padding=1, groups=2)
        self.left,self.right,self.fc = nn.Conv2d(16, 8, 3, stride=2),nn.Conv2d(16, 8, 1, stride=2),nn.Linear(16, 10)
        with torch.no_grad():
            for m in (self.norm,self.wide_norm): m.running_mean.normal_(), m.running_var.uniform_(.5, 2), m.weight.uniform_(.5, 1.5), m.bias.normal_()
    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x+self.back(self.wide_norm(self.wide(x)).relu())
        return self.fc(torch.cat([self.left(x).relu().mean((2,3)),self.right(x).relu().mean((2,3))], 1))

def images(n=48): return F.interpolate(torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)), 9, mode='bilinear')

def pruned(net, x): Pruner(net, 40, example_inputs=x[:1]).prune_model(); return net
def lossless(net, x):
    Sparsifier(net, 'filter', 'local', coupled=True, example_inputs=x[:1]).sparsify_model(40)
    return Pruner().prune_model(net, x[:1])
def sparse(net, x): Sparsifier(net, 'weight', 'local', layer_type=(nn.Conv2d,nn.Linear)).sparsify_model(60); return net
def patterned(net, x): Sparsifier(net, '2:4', 'local', layer_type=nn.Linear).sparsify_model(50); return net
def shared(net, x): return KMeansQuantizer(bits=2).quantize(net)
def decomposed(net, x): return FC_Decomposer().decompose(net, percent_removed=.5)
def half(net, x): return pruned(net, x).bfloat16().float()
CHANGES = [pruned,lossless,sparse,patterned,shared,decomposed,half]

@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('seed', range(3))
def test_what_has_changed(change, seed):
    "The error of no layer rises, that of the outputs falls, zeros stay zero and shared values shared"
    teacher,x = seeded(Net, seed),images()
    as_it_was = deepcopy(teacher.state_dict())
    mine = change(deepcopy(teacher), x)
    zeros,values = {n:p==0 for n,p in mine.named_parameters()},{n:len(p.unique()) for n,p in mine.named_parameters()}
    before,table = differs(mine, teacher, x),repair(mine, teacher, list(x.split(16)))
    assert (table.after.dropna()<=table.before.dropna()).all() and differs(mine, teacher, x)<.8*before
    assert all(((p==0)|~zeros[n]).all() for n,p in mine.named_parameters())
    if change is shared: assert all(len(p.unique())<=values[n] for n,p in mine.named_parameters() if p.dim()>1)
    assert all(torch.equal(v, teacher.state_dict()[n]) for n,v in as_it_was.items())
    again = repair(mine, teacher, list(x.split(16)))
    assert (again.after.dropna()<=again.before.dropna()).all()

def test_bits_of_two_bytes():
    "The error of what is kept counts, not of what was computed"
    teacher,x = seeded(Net).bfloat16(),images().bfloat16()
    mine = pruned(deepcopy(teacher), x)
    table = repair(mine, teacher, x)
    assert (table.after.dropna()<=table.before.dropna()).all() and table.after.sum()<table.before.sum() and next(mine.parameters()).dtype is torch.bfloat16

def test_zeroed_filters_stay_removable():
    "Nothing comes back in a filter that was zeroed with its bias and norm"
    teacher,x = seeded(Net),images()
    mine = deepcopy(teacher)
    Sparsifier(mine, 'filter', 'local', coupled=True, example_inputs=x[:1]).sparsify_model(40)
    n = [sum(o.numel() for o in Pruner().prune_model(mine, x[:1]).parameters())]
    repair(mine, teacher, x)
    assert [sum(o.numel() for o in Pruner().prune_model(mine, x[:1]).parameters())]==n

# --- data, wrappers, errors

def test_same_from_each_kind_of_data():
    teacher,x = seeded(Net),images()
    class Named(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, image): return dict(out=self.net(image))
    kinds = [x, [x], (x,torch.zeros(len(x))), [dict(image=x)], torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(len(x))), batch_size=len(x)), iter([x])]
    found = []
    for data in kinds:
        mine = pruned(deepcopy(teacher), x)
        by_name = isinstance(data, list) and isinstance(data[0], dict)
        repair(Named(mine) if by_name else mine, Named(teacher) if by_name else teacher, data)
        found.append(mine.state_dict())
    assert all(torch.equal(a, b) for o in found[1:] for a,b in zip(found[0].values(), o.values()))

def test_nothing_else_changes():
    "Modes, hooks, gradients and the global generator are as they were"
    teacher,x = seeded(Net),images()
    mine = pruned(deepcopy(teacher), x).train()
    class Reader:
        def __init__(self): self.seen = []
        def read(self, m, args, y): self.seen.append(y.shape)
    reader,state = Reader(),torch.get_rng_state()
    mine.fc.register_forward_hook(reader.read)
    repair(mine, teacher, x)
    assert mine.training and mine.norm.training and not reader.seen and torch.equal(state, torch.get_rng_state()) and len(mine.fc._forward_hooks)==1
    assert all(p.requires_grad and p.grad is None for p in mine.parameters())

class Broken(Exception): "Comes in the middle"

@pytest.mark.parametrize('n', [1,9,15])
def test_as_it_was_after_an_error(n):
    teacher,x = seeded(Net),images()
    mine,left = pruned(deepcopy(teacher), x),[n]
    was = deepcopy(mine.state_dict())
    class Data:
        def __len__(self): return 3
        def __iter__(self):
            for b in x.split(16):
                left[0] -= 1
                if not left[0]: raise Broken
                yield b
    with pytest.raises(Broken): repair(mine, teacher, Data())
    assert all(torch.equal(v, mine.state_dict()[k]) for k,v in was.items())

@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrappers(wrap):
    teacher,x = seeded(Net),images()
    mine,plain = pruned(deepcopy(teacher), x),pruned(deepcopy(teacher), x)
    wrapped = wrap(mine)
    repair(wrapped, wrap(teacher), x)
    repair(plain, teacher, x)
    assert all(torch.equal(a, b) for a,b in zip((wrapped.module).state_dict().values(), plain.state_dict().values()))

def test_refused():
    teacher,x = seeded(Net),images()
    mine = pruned(deepcopy(teacher), x)
    with pytest.raises(ValueError, match='keep a copy'): repair(mine, mine, x)
    with pytest.raises(ValueError, match='no batch'): repair(mine, teacher, [])
    with pytest.raises(ValueError, match='ridge must be a number'): repair(mine, teacher, x, ridge=-1)
    with pytest.raises(ValueError, match='such layer'): repair(nn.Sequential(nn.Conv2d(3, 4, 3)), teacher, x)
    with pytest.raises(ValueError, match='outputs, but 16 in the teacher'):
        other = Net().eval()
        other.stem,other.norm,other.wide,other.back,other.left,other.right = nn.Conv2d(3, 12, 3, padding=1),nn.BatchNorm2d(12),nn.Conv2d(12, 24, 1),nn.Conv2d(24, 12, 3, padding=1),nn.Conv2d(12, 8, 3, stride=2),nn.Conv2d(12, 8, 1, stride=2)
        repair(other, teacher, x)
    with pytest.raises(ValueError, match='not all finite|infinite|nan'): repair(mine, teacher, x/0)

def test_what_stays_is_told():
    "A weight that is read in two ways cannot be fitted for one of them"
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed,self.mid,self.head = nn.Embedding(20, 8),nn.Linear(8, 8),nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight
        def forward(self, ids): return self.head(self.mid(self.embed(ids)).relu())
    teacher,ids = seeded(Tied),torch.arange(20).view(2, 10)
    mine = deepcopy(teacher)
    with torch.no_grad(): mine.mid.weight += .1
    with pytest.warns(UserWarning, match='embed.weight: read by embedding'): table = repair(mine, teacher, ids)
    assert list(table[table.why!=''].layer)==['embed'] and differs(mine, teacher, ids)<1e-3

class Folding(nn.Module):
    "A norm reads a part of what a convolution gives, and two more follow"
    def __init__(self):
        super().__init__()
        self.a,self.part,self.twice,self.out = nn.Conv2d(3, 8, 3),nn.BatchNorm2d(4),nn.Sequential(nn.BatchNorm2d(4),nn.BatchNorm2d(4)),nn.Linear(4, 3)
        with torch.no_grad():
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(), m.running_var.uniform_(.5, 2), m.weight.uniform_(.5, 1.5), m.bias.normal_()
    def forward(self, x): return self.out(self.twice(self.part(self.a(x)[:,:4])).relu().mean((2,3)))

def test_norms_of_a_part_and_in_a_row():
    "Each has a row of its own, and answers as the teacher's"
    teacher,x = seeded(Folding),images()
    mine = deepcopy(teacher)
    with torch.no_grad():
        for m in mine.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.add_(.5), m.running_var.mul_(2)
    table = repair(mine, teacher, x)
    assert [o for o in table.layer if o!='a']==['part','twice.0','twice.1','out'] and differs(mine, teacher, x)<1e-6

def test_one_column_a_batch():
    "Images one by one: the last layer sees one column of each, some of which are held out"
    teacher,x = seeded(Net),images(64)
    one,all_ = pruned(deepcopy(teacher), x),pruned(deepcopy(teacher), x)
    single = repair(one, teacher, list(x.split(1)))
    repair(all_, teacher, x)
    assert single[single.layer=='fc'].ridge.item()<10 and differs(one, teacher, x)<1.5*differs(all_, teacher, x)

def test_products_that_are_no_layers_are_told():
    class Experts(nn.Module):
        def __init__(self): super().__init__(); self.w,self.out = nn.Parameter(torch.randn(2, 6, 5)),nn.Linear(5, 3)
        def forward(self, x): return self.out(torch.bmm(x.expand(2, -1, -1), self.w).sum(0))
    teacher,x = seeded(Experts),torch.randn(40, 6)
    mine = deepcopy(teacher)
    with torch.no_grad(): mine.out.weight.mul_(.9)
    with pytest.warns(UserWarning, match='not repaired: w: read by bmm'): table = repair(mine, teacher, x)
    assert differs(mine, teacher, x)<1e-4 and table.why.str.contains('bmm').sum()==1

@pytest.mark.parametrize('kind', ['images','tokens'])
def test_widen(kind):
    "Images are looked at in three ways, unless a ridge is given or it is declined; what is no image, as it is"
    if kind=='images': make,change,x = Net,pruned,images()
    else: make,x,change = Attention,torch.randn(48, 5, 6, generator=torch.Generator().manual_seed(0)),lambda net, x: sparse(net, x)
    teacher,found = seeded(make),{}
    for ridge in (None,1e-3):
        for widen in (None,True,False):
            mine = change(deepcopy(teacher), x)
            repair(mine, teacher, list(x.split(16)), ridge, widen=widen)
            found[ridge,widen] = torch.cat([p.flatten() for p in mine.parameters()])
    same = lambda a, b: torch.equal(found[a], found[b])
    assert same((None,None), (None,True)) and same((1e-3,None), (1e-3,False))
    assert all(same((o,True), (o,False))==(kind=='tokens') for o in (None,1e-3))

def test_widen_by_hand():
    "Upside down, and mixed with the batch before; the first with itself, rolled. Layers without windows do not look at these"
    class Windows(nn.Sequential):
        def __init__(self): super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, (1,3)))
    teacher,x = seeded(Windows),images(24)
    a,b = x[:12],x[12:,:,:7]
    every = [a, a.flip(2), (a+a.roll(1, 0))/2, b, b.flip(2), (b+a[:,:,:7])/2]
    def repaired(changed, data, widen):
        mine = deepcopy(teacher)
        with torch.no_grad(): mine[changed].weight.mul_(torch.rand(mine[changed].weight.shape, generator=torch.Generator().manual_seed(0)))
        repair(mine, teacher, data, 1e-3, widen=widen)
        return mine[changed].weight
    for changed,looked_at in ((0,every),(2,[a,b]),(4,every)):
        wide,plain = repaired(changed, [a,b], True),repaired(changed, looked_at, False)
        torch.testing.assert_close(wide, plain, rtol=1e-3, atol=1e-4)
        if changed!=2: assert not torch.allclose(wide, repaired(changed, [a,b], False), rtol=1e-3, atol=1e-4)

# --- in one argument

def test_in_one_argument():
    "Where something is lost, `repair=True` gives what `repair` does"
    teacher,x = seeded(Net),images()
    def both(change):
        mine,other = deepcopy(teacher),deepcopy(teacher)
        plain = change(mine, {})
        repair(plain, teacher, x)
        whole = change(other, dict(data=x, repair=True))
        assert all(torch.equal(a, b) for a,b in zip(plain.state_dict().values(), whole.state_dict().values()))
    both(lambda m, more: Pruner(m, 40, example_inputs=x[:1], **more).prune_model())
    both(lambda m, more: Sparsifier(m, 'weight', 'global', layer_type=(nn.Conv2d,nn.Linear), **more).sparsify_model(50))

def test_again_and_again():
    "More zeros are repaired by what the model gave at first"
    teacher,x = seeded(Net),images()
    mine = deepcopy(teacher)
    sp = Sparsifier(mine, 'weight', 'local', layer_type=(nn.Conv2d,nn.Linear), data=x, repair=True)
    found = []
    for s in (30,50,70):
        sp.sparsify_model(s)
        found.append(differs(mine, teacher, x))
        assert round(sp.report().sparsity.iloc[-1])==s and (sp.repaired.after.dropna()<=sp.repaired.before.dropna()).all()
    other = deepcopy(teacher)
    Sparsifier(other, 'weight', 'local', layer_type=(nn.Conv2d,nn.Linear)).sparsify_model(70)
    assert found==sorted(found) and found[-1]<.5*differs(other, teacher, x)

def test_in_steps():
    "What is removed or zeroed step by step is repaired by what the model gave at the start"
    teacher,x = seeded(Net),images()
    mine,bare = deepcopy(teacher),deepcopy(teacher)
    p,q = Pruner(mine, 40, example_inputs=x[:1], data=x, repair=True),Pruner(bare, 40, example_inputs=x[:1])
    for ratio in (10,25,40):
        p.update(ratio), q.update(ratio)
        assert (p.repaired.after.dropna()<=p.repaired.before.dropna()).all() and differs(mine, teacher, x)<.8*differs(bare, teacher, x)
    mine,bare = deepcopy(teacher),deepcopy(teacher)
    for m,sp in ((mine,Sparsifier(mine, 'weight', data=x, repair=True)),(bare,Sparsifier(bare, 'weight'))):
        for s in (30,60): sp.update(s)
    assert differs(mine, teacher, x)<.8*differs(bare, teacher, x)

def test_refused_before_anything_is_cut():
    teacher,x = seeded(Net),images()
    was = deepcopy(teacher.state_dict())
    for make in (lambda **kw: Pruner(teacher, 40, example_inputs=x[:1], **kw).prune_model(), lambda **kw: Sparsifier(teacher, 'weight', **kw).sparsify_model(50), lambda **kw: FC_Decomposer().decompose(teacher, .5, **kw)):
        with pytest.raises(ValueError, match='needs inputs'): make(repair=True)
        with pytest.raises(ValueError, match='channels|does not run|shape'): make(repair=True, data=[torch.zeros(2, 5, 9, 9)])
    with pytest.raises(ValueError, match='repair needs a pruning_ratio or a target'): Pruner(repair=True)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k,v in was.items())

# --- what is lost after repair

class Wide(nn.Module):
    "Eight channels, in groups of every kind that readers have"
    def __init__(self, kind):
        super().__init__()
        self.kind,self.make = kind,nn.Conv2d(3, 8, 3)
        self.read = dict(conv=lambda: nn.Conv2d(8, 6, 3), no_bias=lambda: nn.Conv2d(8, 6, 2, bias=False), transposed=lambda: nn.ConvTranspose2d(8, 6, 3, stride=2), linear=lambda: nn.Linear(8*49, 6),
            several=lambda: nn.ModuleList([nn.Conv2d(8, 3, 1),nn.Conv2d(8, 5, 3)]), rnn=lambda: nn.LSTM(8, 5, batch_first=True))[kind]()
    def forward(self, x):
        y = self.make(x).relu()
        if self.kind=='linear': return self.read(y.flatten(1))
        if self.kind=='several': return torch.cat([m(y).flatten(1) for m in self.read], 1)
        if self.kind=='rnn': return self.read(y.flatten(2).transpose(1, 2))[0]
        return self.read(y)

def columns_read(net, x):
    "For each reader, what it reads as [channels, features a channel, columns], its weight, and whether it has a bias"
    found = []
    for layer in (net.read if net.kind=='several' else [net.read]):
        name = 'weight_ih_l0' if net.kind=='rnn' else 'weight'
        def take(key, call, y):
            at = torch.arange(n_columns(call, y))
            cols,w = columns_in(call, at).double()[0],Weights(call).matrix().double()[0]
            found.append((cols.view(8, -1, cols.shape[-1]),w.detach(),Weights(call).bias is not None))
        full = next(n for n,p in net.named_parameters() if p is getattr(layer, name))
        follow(net, x, [(full,0)], take)
    return found

def lost_without(found, gone, ridge=1e-2):
    "Share of the outputs that least squares cannot have without channels `gone`, with the ridge of the criteria"
    kept,total = [c for c in range(8) if c not in gone],0.
    for cols,w,bias in found:
        one = torch.ones(1, cols.shape[-1]).double()
        every = torch.cat([cols.flatten(0, 1),one]) if bias else cols.flatten(0, 1)
        damp = (ridge*every.square().sum(1).mean())**.5
        def penalized(x): return torch.cat([x,damp*torch.eye(len(x)).double()], 1)
        size = every.shape[0]
        w = F.pad(w, (0,size-w.shape[1]))
        goal = torch.cat([w@every,damp*w], 1)
        pick = torch.cat([torch.arange(8).repeat_interleave(cols.shape[1]),torch.full((size-8*cols.shape[1],), -1)])
        rows = torch.isin(pick, torch.tensor([*kept,-1]))
        a = torch.cat([every,damp*torch.eye(size).double()], 1)[rows]
        best = torch.linalg.lstsq(a.T, goal.T).solution
        total += (goal-best.T@a).square().sum()/(w@every).square().sum()
    return total.item()

@pytest.mark.parametrize('kind', ['conv','no_bias','transposed','linear','several','rnn'])
@pytest.mark.parametrize('seed', range(2))
def test_obs_is_the_best_choice(kind, seed):
    "What goes is what a search of all sets says"
    net = seeded(lambda: Wide(kind), seed)
    x = F.interpolate(torch.randn(48, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), 9, mode='bilinear')
    found = columns_read(net, x)
    best = min(itertools.combinations(range(8), 3), key=lambda o: lost_without(found, o))
    Pruner(net, {'make':37.5}, criteria='obs', example_inputs=x[:1], data=x).prune_model()
    gone = tuple(sorted(set(range(8))-set(net._pruned['kept']['make.weight'][0])))
    assert gone==best or lost_without(found, gone)<=lost_without(found, best)*(1+1e-4)

def test_obs_beats_magnitude():
    "In most of ten networks, and by far in the mean"
    ours,theirs = [],[]
    for seed in range(10):
        teacher,x = seeded(Net, seed),images()
        for criteria,found in (('obs',ours),('large_final',theirs)):
            mine = deepcopy(teacher)
            Pruner(mine, 40, criteria=criteria, example_inputs=x[:1], data=x, repair=True).prune_model()
            found.append(differs(mine, teacher, x))
    assert sum(a<b for a,b in zip(ours, theirs))>=8 and sum(ours)<.8*sum(theirs)

def test_obs_with_a_normalizer_or_a_reducer():
    teacher,x = seeded(Net),images()
    Pruner(deepcopy(teacher), 40, 'global', Criteria('obs', normalizer='sum'), example_inputs=x[:1], data=x).prune_model()
    with pytest.raises(ValueError, match='takes no reducer'): Pruner(teacher, 40, criteria=Criteria('obs', 'max'), data=x)

def test_obs_needs_data():
    teacher,x = seeded(Net),images()
    with pytest.raises(ValueError, match='data'): Pruner(teacher, 40, criteria='obs', example_inputs=x[:1]).prune_model()

# --- inputs that say little, and those that do not fit

def test_nothing_to_learn():
    "Where the teacher gives the same for all inputs, it is told, and nothing is made up"
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for x,layers in ((torch.ones(5, 3, 9, 9),['0','2','6']),(images(1),['6'])):
        mine = pruned(deepcopy(teacher), x)
        with pytest.warns(UserWarning, match=rf'nothing to learn: {", ".join(f"{o}.weight" for o in layers)}: for all inputs the teacher gives the same'): table = repair(mine, teacher, [x])
        assert table.layer[table.after.isna()].tolist()==layers and (table.after.dropna()<table.before.dropna()).all()

def test_a_path_that_does_not_fit():
    "Some inputs run what others did not, and what was not cut: told with the inputs, and nothing is changed"
    class Paths(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem,self.a,self.b,self.head = nn.Conv2d(3, 8, 3),nn.Conv2d(8, 4, 3),nn.Conv2d(8, 4, 3),nn.Linear(4, 2)
        def forward(self, x):
            h = self.stem(x).relu()
            return self.head((self.a(h) if x.mean()>0 else self.b(h)).mean((2,3)))
    teacher,x = seeded(Paths),torch.rand(6, 3, 9, 9)
    mine = deepcopy(teacher)
    with pytest.warns(UserWarning, match='b kept all channels'): Pruner(mine, 50, example_inputs=x).prune_model()
    was = deepcopy(mine.state_dict())
    with pytest.raises(ValueError, match=r'Paths does not run with data float32 \[6, 3, 9, 9\].*a path that others did not'): repair(mine, teacher, [x,x,-x])
    assert all(torch.equal(v, was[k]) for k,v in mine.state_dict().items())

@pytest.mark.parametrize('norm', [nn.Identity,nn.BatchNorm2d])
def test_a_sum_is_fitted_as_a_whole(norm):
    "What is wrong beside the last layer of a block is made up for by it, also behind a normalization"
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide,self.back,self.norm,self.wrong = nn.Conv2d(3, 8, 1),nn.Conv2d(8, 3, 1, bias=norm is nn.Identity),norm(3),0.
        def forward(self, x):
            h = self.wide(x).relu()
            return self.norm(self.back(h))+(x+self.wrong*h[:,:3])
    teacher,x = seeded(Block),images()
    if norm is nn.BatchNorm2d:
        for t in (teacher.norm.weight.data,teacher.norm.running_var): t.uniform_(.5, 2)
        for t in (teacher.norm.bias.data,teacher.norm.running_mean): t.normal_()
    mine = deepcopy(teacher)
    mine.wrong = .5
    assert differs(mine, teacher, x)>.01
    repair(mine, teacher, x, ridge=1e-12)
    assert differs(mine, teacher, x)<1e-10

@pytest.mark.parametrize('norm', [nn.Identity,nn.BatchNorm2d])
@pytest.mark.parametrize('path_first', [True,False])
def test_the_later_of_two_layers_takes_the_sum(norm, path_first):
    "Which of the two runs first does not matter: the one of the higher level can make up for what the other could not"
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.path = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), norm(4))
            self.short = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4))
        def forward(self, x):
            if path_first: return self.path(x)+self.short(x)
            return self.short(x)+self.path(x)
    reads,_ = reads_of(seeded(Block), images(2))
    assert [o.name.rpartition('.')[0] for o in reads if o.summed]==['path.2' if norm is nn.Identity else 'path.3']

# --- weights that are read in other ways than a layer does, and networks that do not belong together

class Twice(nn.Module):
    "A weight that is read twice, and a layer that can be fitted"
    def __init__(self, how):
        super().__init__()
        self.w,self.b,self.b2 = (nn.Parameter(torch.randn(*s)*.3) for s in ((12,12),(12,),(12,)))
        self.o,self.how = nn.Linear(12, 4),how
    def forward(self, x): return self.o(self.how(self, x))

TWICE = dict(
    biases=lambda m, x: F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.w, m.b2), one_bias=lambda m, x: F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.w),
    transposed=lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w.t()), inputs=lambda m, x: torch.tanh(F.linear(x[:,:6], m.w[:,:6]))+F.linear(x[:,6:], m.w[:,6:]),
    whole_and_part=lambda m, x: F.linear(x, m.w)[:,:6].repeat(1, 2)+F.linear(x, m.w[:6]).repeat(1, 2))
MADE = dict(scaled=lambda m, x: F.linear(x, m.w*.5, m.b), turned=lambda m, x: F.linear(x, m.w.flip(1)), standardized=lambda m, x: F.linear(x, (m.w-m.w.mean())/m.w.std()),
    alpha=lambda m, x: torch.addmm(m.b, x, m.w, alpha=2.), beta=lambda m, x: torch.addmm(m.b, x, m.w, beta=.5))

@pytest.mark.parametrize('how', [*TWICE,*MADE])
def test_what_no_layer_does_is_told(how):
    "It stays as it is, and the layer behind it makes up for it"
    teacher,x = seeded(lambda: Twice((TWICE|MADE)[how])),torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    mine = deepcopy(teacher)
    with torch.no_grad(): mine.w[mine.w.abs()<.1] = 0
    was,before = mine.w.clone(),differs(mine, teacher, x)
    with pytest.warns(UserWarning, match=r'not repaired: w: read '+('in several ways, or with several biases' if how in TWICE else 'by')): table = repair(mine, teacher, [x])
    assert torch.equal(mine.w, was) and differs(mine, teacher, x)<before and table[table.layer=='o'].after.item()<table[table.layer=='o'].before.item()

def test_one_weight_in_one_way():
    "Read twice alike, or as parts with rows of their own, it is fitted"
    parts = lambda m, x: torch.cat([F.linear(x, w, b) for w,b in zip(m.w.chunk(2), m.b.chunk(2))], 1)
    again = lambda m, x: F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.w, m.b)
    for how in (parts,again):
        teacher,x = seeded(lambda: Twice(how)),torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
        mine = deepcopy(teacher)
        with torch.no_grad(): mine.w[mine.w.abs()<.1] = 0
        table = repair(mine, teacher, [x])
        assert (table[table.weight=='w'].after<table[table.weight=='w'].before).all() and not table.why.any()

def test_read_in_another_way_later():
    "An input that takes a path where a weight is turned is refused"
    teacher = seeded(lambda: Twice(lambda m, x: F.linear(x, m.w if x.mean()>0 else m.w.t(), m.b)))
    mine,x = deepcopy(teacher),torch.rand(20, 12)
    with torch.no_grad(): mine.w[mine.w.abs()<.1] = 0
    with pytest.raises(ValueError, match='w is read in another way for some inputs'): repair(mine, teacher, [x,-x])

def test_rows_that_values_choose():
    "Another network may choose others, and its rows are no answer to those of the teacher"
    class Best(nn.Module):
        def __init__(self, take):
            super().__init__()
            self.stem,self.head,self.all,self.take = nn.Linear(6, 8),nn.Linear(8, 3),nn.Linear(8, 2),take
        def forward(self, x):
            h = self.stem(x)
            return self.head(self.take(h)), self.all(h)
    takes = lambda h: h[h.sum(1).topk(5).indices], lambda h: h.gather(0, h.argsort(0)), lambda h: h[h.sum(1)>0], lambda h: torch.masked_select(h, h>0)[:16].view(2, 8), lambda h: torch.zeros(5, 8).index_put((torch.arange(5),), h[h.sum(1).topk(5).indices])
    for take in takes:
        teacher,x = seeded(lambda: Best(take)),torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
        mine = deepcopy(teacher)
        with torch.no_grad(): mine.stem.weight[mine.stem.weight.abs()<.1] = 0
        with pytest.warns(UserWarning, match=r'not repaired: head.weight: values choose what it reads'): table = repair(mine, teacher, [x])
        assert torch.equal(mine.head.weight, teacher.head.weight) and table[table.layer=='all'].why.item()==''

def test_networks_that_do_not_belong_together():
    "Swapped, folded, or of the same numbers: in words, and nothing is changed"
    from fasterai.misc.all import BN_Folder
    teacher,x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval(),images(12)
    cut,folded = pruned(deepcopy(teacher), x),BN_Folder().fold(deepcopy(teacher), x)
    for pair,says in (((teacher,cut),'^0.weight has 8 outputs, but [0-9] in the teacher'), ((folded,teacher),'of the model were folded'), ((teacher,folded),'of the teacher were folded'),
                      ((cut,nn.Sequential(*cut)),'are the same tensor.*deepcopy'), ((nn.ReLU(),nn.ReLU()),'has no parameters')):
        was = [p.clone() for p in pair[0].parameters()]
        with pytest.raises(ValueError, match=says): repair(*pair, [x])
        assert all(map(torch.equal, was, pair[0].parameters()))

# --- shared values stay shared

def separable():
    torch.manual_seed(0)
    def conv(i, o, **kw): return [nn.Conv2d(i, o, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*conv(3, 16, kernel_size=3, padding=1), *conv(16, 16, kernel_size=3, padding=1, groups=16), *conv(16, 24, kernel_size=1), *conv(24, 24, kernel_size=3, groups=4),
        nn.ConvTranspose2d(24, 16, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(16, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)).eval()

def n_values(model, per_channel):
    "Of each weight how many values it has, or of each of its channels"
    res = {}
    for n,m in model.named_modules():
        if (w := getattr(m, 'weight', None)) is None or w.dim()<2: continue
        rows = w.detach().transpose(0, int(isinstance(m, nn.ConvTranspose2d))).flatten(1) if per_channel else w.detach().flatten()[None]
        res[n] = torch.tensor([len(o.unique()) for o in rows])
    return res

@pytest.mark.parametrize('dtype', [torch.float32,torch.float64])
@pytest.mark.parametrize('per_channel', [False,True])
@pytest.mark.parametrize('bits', [1,2,4,6,8])
def test_shared_values_stay_shared(bits, per_channel, dtype):
    "However few weights a layer has, and however many values"
    teacher = separable().to(dtype)
    data = [torch.randn(4, 3, 10, 10, dtype=dtype) for _ in range(3)]
    model = deepcopy(teacher)
    KMeansQuantizer(bits, per_channel=per_channel).quantize(model)
    before = n_values(model, per_channel)
    table = repair(model, teacher, data, progress=False)
    after = n_values(model, per_channel)
    assert all((after[n]<=before[n]).all() for n in before)
    assert (table.after.dropna()<=table.before.dropna()*(1+1e-9)).all()
    if bits<8: assert (table.after<.98*table.before).any()

@pytest.mark.parametrize('bits', [1,2,3,4])
def test_shared_values_of_two_bytes_stay_shared(bits):
    teacher = separable().to(torch.bfloat16)
    model = deepcopy(teacher)
    KMeansQuantizer(bits).quantize(model)
    before = n_values(model, False)
    repair(model, teacher, [torch.randn(4, 3, 10, 10, dtype=torch.bfloat16) for _ in range(3)], progress=False)
    assert all((n<=before[k]).all() for k,n in n_values(model, False).items())

@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16,torch.float16])
@pytest.mark.parametrize('shape', [(1,4,9), (1,16,27), (16,1,9), (1,24,16), (4,6,54), (1,64,64), (2,8,300)])
def test_what_is_not_shared_is_free(shape, dtype):
    "Two bytes give few numbers, some of them twice, though nothing is shared"
    for seed in range(5):
        gen = torch.Generator().manual_seed(seed)
        for w in (torch.randn(shape, generator=gen), torch.rand(shape, generator=gen)-.5): assert type(kind_of(w.to(dtype).double())) is Free

def test_parts_are_solved_as_wholes():
    "Outputs that share values of their own are solved for as each would be alone, and the others as if they were free"
    torch.manual_seed(0)
    x,w = torch.randn(2, 8, 200).double(),torch.randn(2, 200, 8).double()
    w[:,3:] = w[:,3:].sign()*torch.rand(2, 197, 1)
    y = torch.randn(2, 200, 200).double()
    m = Moments()
    m.add(x, y)
    kind = kind_of(w)
    found = kind.solved(m, ridge := 1e-10)  # a share of the mean over groups
    assert isinstance(kind, SharedInParts) and torch.allclose(found[:,:3], Free(w).solved(m, ridge)[:,:3])
    for i,j in ((0,5),(1,5),(1,77)):
        alone = Moments()
        alone.add(x[i:i+1], y[i:i+1,j:j+1])
        assert torch.allclose(found[i,j], Shared(w[i:i+1,j:j+1]).solved(alone, ridge)[0,0])

def test_rows_that_keep_their_places():
    "Places that inputs tell, codes that values choose, and ranks: what is read belongs to the same row in the teacher. Keys that are made of a parameter come from a layer like others"
    class Kept(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.stem,self.key,self.head,self.codes,self.how = nn.Linear(6, 8),nn.Linear(8, 8),nn.Linear(8, 3),nn.Parameter(torch.randn(12, 8)),how
        def forward(self, x): return self.head(self.how(self, self.stem(x), x))
    for how in (lambda m, h, x: h[x.sum(1)>0], lambda m, h, x: h[x.argsort(0)[:,0]], lambda m, h, x: m.codes[(h@m.codes.mT).argmax(1)]+h, lambda m, h, x: h.sort(1).values, lambda m, h, x: h+h[:0][h[:0].sum(1)>0].sum(),
                lambda m, h, x: (h@m.key(m.codes).mT).softmax(1)@m.codes):
        teacher,x = seeded(lambda: Kept(how)),torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
        mine = deepcopy(teacher)
        with torch.no_grad(): mine.stem.weight[mine.stem.weight.abs()<.1] = 0
        table = repair(mine, teacher, [x])
        assert table[table.layer.isin(['stem','head'])].why.tolist()==['','']
