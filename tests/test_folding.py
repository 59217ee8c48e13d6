"What may be folded, and that nothing else is"
import copy,pickle,warnings
from collections import Counter
import pytest,torch
import torch.nn.functional as F
import torchvision
from torch import fx,nn
from torch.nn.utils import parametrizations,prune
from torchvision.ops import FrozenBatchNorm2d
from fasterai.core.proof import check_choices,difference,random_like
from fasterai.misc.bn_folding import BN_Folder
from fasterai.prune.pruner import Pruner,load_pruned,save_pruned
from tiny import Net

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BN = nn.modules.batchnorm._BatchNorm
def norms(m): return [n for n,o in m.named_modules() if isinstance(o, BN) or type(o).__name__=='FrozenBatchNorm2d']
def identities(m): return [n for n,o in m.named_modules() if isinstance(o, nn.Identity)]
def n_params(m): return sum(p.numel() for p in m.parameters())

def randomized(m, seed=0, positive=False):
    "All parameters random, scales negative as well unless `positive`, and the statistics of normalizations"
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=gen)*.5)
        for n,b in m.named_buffers():
            if n.endswith('running_var'): b.copy_(torch.rand(b.shape, generator=gen)+.2)
            if n.endswith('running_mean'): b.copy_(torch.randn(b.shape, generator=gen)*.5)
        if positive:
            for o in m.modules():
                if isinstance(o, BN) and o.weight is not None: o.weight.abs_()
    return m.double().eval()

def fold(m, inputs=None, left=(), **kwargs):
    "A folded copy, checked on other inputs than `BN_Folder` itself used, and that `m` is what it was; `left` are the norms that stay"
    inputs = X if inputs is None else inputs
    was,modes = copy.deepcopy(dict(m.state_dict())),[(n,o.training,len(o._forward_hooks)) for n,o in m.named_modules()]
    folder = BN_Folder(**kwargs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        new = folder.fold(m, inputs)
    said = [str(o.message) for o in said if 'norms stay' in str(o.message)]
    assert len(said)==bool(left) and all(o.startswith(f'{len(left)} of {len(norms(m))} norms stay') for o in said), said
    assert m.state_dict().keys()==was.keys() and all(torch.equal(v, was[k]) for k,v in m.state_dict().items())
    assert modes==[(n,o.training,len(o._forward_hooks)) for n,o in m.named_modules()]
    assert set(folder.left)==set(left) and set(folder.into)==set(norms(m))-set(left), (folder.left,folder.into)
    assert len(norms(new))==len(left)
    for seed in (5,6): assert difference(m, new, random_like(inputs, seed))[0]<1e-10
    return new

# the zoo

def could_go(model):
    """Names of the norms that can go, as the traced code tells, without the library: walk from each norm to a layer, against the flow while nobody else reads and with it for all readers,
    over what commutes with any positive scale and any shift. Unlike the library this knows modules only, and no numbers"""
    traced = fx.Tracer().trace(model)
    mods = dict(model.named_modules())
    def kind(n):
        m = mods.get(n.target) if n.op=='call_module' else None
        if isinstance(m, BN): return 'norm'
        if isinstance(m, (nn.modules.conv._ConvNd,nn.Linear)): return 'layer'
        if isinstance(m, (nn.MaxPool2d,nn.AdaptiveAvgPool2d,nn.Dropout,nn.Identity,nn.Flatten)): return 'passes'
    uses = Counter(n.target for n in traced.nodes if n.op=='call_module')
    def up(n): return len(n.users)==1 and (kind(n)=='layer' and uses[n.target]==1 or kind(n) in ('passes','norm') and up(n.args[0]))
    def takes(n):
        if kind(n)=='layer': return uses[n.target]==1 and not any(getattr(mods[n.target], 'padding', ()))
        return kind(n)=='passes' and down(n)
    def down(n): return len(n.users)>0 and all(takes(o) for o in n.users)
    return {n.target for n in traced.nodes if kind(n)=='norm' and uses[n.target]==1 and (up(n.args[0]) or down(n))}

FAMILIES = '''vgg11_bn resnet18 resnext50_32x4d densenet121 googlenet inception_v3 mnasnet0_5 mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_y_400mf shufflenet_v2_x0_5 maxvit_t'''.split()

@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('name', FAMILIES)
def test_nothing_remains_that_could_go(name):
    "Counted by another road: the traced code of the model, with its names and its paddings"
    m = torchvision.models.get_model(name, weights=None, **(dict(aux_logits=False) if name in ('googlenet','inception_v3') else {}))
    want = could_go(randomized(m, positive=True))
    folder = BN_Folder(verify=False)
    new = folder.fold(m)
    assert set(folder.into)==want, (want^set(folder.into))
    assert set(folder.into)|set(folder.left)==set(norms(m)) and len(norms(new))==len(folder.left)

def test_fresh_norms_shift_nothing():
    "Just initialized, a norm passes a rectifier and a padded convolution as well"
    m = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1)).double()
    fold(m)

# figures

def test_vgg16_bn():
    "40 % of the filters of a vgg16_bn with 10 classes zeroed and removed, then folded"
    from fasterai.sparse.sparsifier import Sparsifier
    m = torchvision.models.vgg16_bn(num_classes=10).eval()
    Sparsifier(m, 'filter', 'local', 'large_final').sparsify_model(40)
    small = Pruner().prune_model(m, torch.randn(1, 3, 32, 32))
    assert n_params(small)==83_975_344
    new = BN_Folder().fold(small, torch.randn(1, 3, 32, 32))
    assert n_params(new)==83_970_260 and not norms(new) and not identities(new)
    assert difference(m, new, torch.randn(2, 3, 32, 32))[0]<1e-5

def test_resnet18():
    m = randomized(torchvision.models.resnet18(num_classes=102), positive=True)
    assert n_params(m)==11_228_838
    new = fold(m, torch.randn(1, 3, 64, 64).double())
    assert n_params(new)==11_224_038
    assert identities(new)==[n for n in norms(m) if 'downsample' not in n], 'only where a forward reads the attribute'

# what peers get wrong

def test_densenet():
    m = randomized(torchvision.models.densenet.DenseNet(8, (2,2), 8, num_classes=5))
    new = fold(m, torch.randn(2, 3, 64, 64).double(), left=[n for n in norms(m) if not n.endswith(('norm0','norm2'))])
    assert 'norm0' not in dict(new.features.named_children()) and 'conv0' in dict(new.features.named_children()), 'names of a Sequential stay'

def test_maxvit():
    m = randomized(torchvision.models.maxvit.MaxVit((64,64), 8, 8, [8,16], [1,1], 4, .0, num_classes=5))
    x = torch.randn(2, 3, 64, 64).double()
    new = fold(m, x)

@pytest.mark.parametrize('same', [False,True])
def test_preactivation_of_equal_widths(same):
    "BN-ReLU-Conv: the norm's neighbour in the list is not its neighbour in the flow"
    body = lambda m, x: m.conv2(F.relu(m.norm2(m.conv1(F.relu(m.norm1(x))) + (x if same else 0))))
    m = randomized(Net(body, conv1=nn.Conv2d(3, 3, 3, padding=1), norm1=nn.BatchNorm2d(3), conv2=nn.Conv2d(3, 3, 3, padding=1), norm2=nn.BatchNorm2d(3)))
    fold(m, left=['norm1','norm2'] if same else ['norm1'])

def test_functional_relu_between():
    m = randomized(Net(lambda m, x: m.norm(F.relu(m.conv(x))), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    fold(m, left=['norm'])

@pytest.mark.parametrize('d', [1,2,3])
@pytest.mark.parametrize('kind', ['Conv','ConvTranspose'])
@pytest.mark.parametrize('groups', [1,2,4])
@pytest.mark.parametrize('bias', [True,False])
def test_before_a_norm(d, kind, groups, bias):
    "Convolutions and transposed ones of one to three dimensions, grouped, depthwise, with any padding"
    layer = getattr(nn, f'{kind}{d}d')(4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    m = randomized(nn.Sequential(layer, getattr(nn, f'BatchNorm{d}d')(8)))
    new = fold(m, torch.randn(2, 4, *[7]*d).double())
    assert len(new)==1 and new[0].bias is not None

@pytest.mark.parametrize('shape', [(5,6),(5,4,6)])
@pytest.mark.parametrize('bias', [True,False])
def test_linear(shape, bias):
    "A Linear before and after a BatchNorm1d, whose channels come second in a sequence"
    turn = (lambda x: x.transpose(1, 2)) if len(shape)==3 else (lambda x: x)
    m = randomized(Net(lambda m, x: m.b(torch.tanh(turn(m.norm2(turn(m.a(turn(m.norm1(turn(x)))))))),), a=nn.Linear(6, 7, bias=bias), norm1=nn.BatchNorm1d(6), norm2=nn.BatchNorm1d(7), b=nn.Linear(7, 2)))
    fold(m, torch.randn(shape).double())

# a norm before a layer

@pytest.mark.parametrize('kind,k,n', [(nn.Conv1d,3,1),(nn.Conv2d,3,2),(nn.Conv3d,2,3),(nn.ConvTranspose2d,1,2)])
@pytest.mark.parametrize('groups', [1,2,4])
@pytest.mark.parametrize('bias', [True,False])
def test_norm_before_unpadded(kind, k, n, groups, bias):
    m = randomized(nn.Sequential(getattr(nn, f'BatchNorm{n}d')(4), kind(4, 8, k, groups=groups, bias=bias)))
    assert len(fold(m, torch.randn(2, 4, *[7]*n).double()))==1

def unshifted(m):
    "A norm that shifts nothing"
    m.running_mean.zero_()
    m.bias.data.zero_()
    return m

@pytest.mark.parametrize('layer', [nn.Conv2d(4, 8, 3, padding=1),nn.Conv2d(4, 8, 1, padding=1),nn.Conv2d(4, 8, 2, padding='same'),nn.ConvTranspose2d(4, 8, 3),nn.ConvTranspose2d(4, 8, 2, 2),
    nn.ConvTranspose2d(4, 8, 1, stride=2)])
def test_padding_counts_if_there_is_a_shift(layer):
    m = randomized(nn.Sequential(nn.BatchNorm2d(4), copy.deepcopy(layer)))
    x = torch.randn(2, 4, 1, 1).double()  # a single place looks constant whatever the padding
    for o in (x, torch.randn(2, 4, 6, 6).double()): fold(m, o, left=['0'])
    unshifted(m[0])
    fold(m, x)

@pytest.mark.parametrize('mode', ['reflect','replicate'])
def test_padding_that_repeats_the_input(mode):
    m = randomized(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)))
    fold(m)

# through operations

BETWEEN = dict(max_pool=nn.MaxPool2d(2), avg_pool=nn.AvgPool2d(2), avg_pool_uncounted=nn.AvgPool2d(3, 2, 1, count_include_pad=False), adaptive=nn.AdaptiveAvgPool2d(3), ceil=nn.AvgPool2d(3, 2, ceil_mode=True),
    adaptive_max=nn.AdaptiveMaxPool2d(3), dropout=nn.Dropout2d(), identity=nn.Identity(), nearest=nn.Upsample(scale_factor=2), bilinear=nn.Upsample(scale_factor=2, mode='bilinear'), reflect=nn.ReflectionPad2d(1), shuffle=nn.ChannelShuffle(2))
SHIFTLESS = dict(relu=nn.ReLU(), relu_=nn.ReLU(inplace=True), leaky=nn.LeakyReLU(), prelu=nn.PReLU(4), zero_pad=nn.ZeroPad2d(1), avg_pool_padded=nn.AvgPool2d(3, 2, 1), divisor=nn.AvgPool2d(2, divisor_override=3), lp=nn.ReLU())
NEVER = dict(relu6=nn.ReLU6(), sigmoid=nn.Sigmoid(), pad_ones=nn.ConstantPad2d(1, 1.), softmax=nn.Softmax(1), group_norm=nn.GroupNorm(2, 4), lp_pool=nn.LPPool2d(2, 2))

@pytest.mark.parametrize('name', [*BETWEEN,*SHIFTLESS,*NEVER])
@pytest.mark.parametrize('shift', [True,False])
@pytest.mark.parametrize('after', [True,False])
def test_between(name, shift, after):
    "A norm behind an operation goes into the convolution before it, or a norm before it into the convolution behind, just where that is exact"
    op = copy.deepcopy({**BETWEEN,**SHIFTLESS,**NEVER}[name])
    m = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), op, nn.BatchNorm2d(4)) if after else Net(lambda m, x: m.conv(m.op(m.norm(x.sin()))), norm=nn.BatchNorm2d(4), op=op, conv=nn.Conv2d(4, 5, 2)), positive=True)
    norm = m[2] if after else m.norm
    if not shift: unshifted(norm)
    x = X if after else torch.randn(2, 4, 8, 8).double()
    stays = name in NEVER or shift and name in SHIFTLESS
    fold(m, x, left=norms(m) if stays else [])
    if not stays and isinstance(op, (nn.MaxPool2d,nn.AdaptiveMaxPool2d,nn.ReLU)):
        norm.weight.data[1] = -1.
        fold(m, x, left=norms(m))

def test_flatten_and_pool():
    "fastai's head: average and maximum joined, flattened, BatchNorm, Dropout, Linear, ReLU, BatchNorm, Dropout, Linear"
    body = lambda m, x: m.tail(torch.cat([F.adaptive_max_pool2d(y:=F.relu(m.conv(x)), 1), F.adaptive_avg_pool2d(y, 1)], 1))
    m = randomized(Net(body, conv=nn.Conv2d(3, 4, 3), tail=nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 6, bias=False), nn.ReLU(inplace=True), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))))
    new = fold(m)
    assert [type(o) for o in new.tail]==[nn.Flatten,nn.Dropout,nn.Linear,nn.ReLU,nn.Dropout,nn.Linear]

@pytest.mark.parametrize('f,stays', [
    (lambda m, x: m.norm(m.a(x)[:, 1:5]), False),
    (lambda m, x: torch.cat([m.norm((y:=m.a(x))[:, :4]), y[:, 4:].sigmoid()], 1), False),
    (lambda m, x: torch.cat([m.norm((y:=m.a(x))[:, :4]), y[:, 3:].sigmoid()], 1), True),
    (lambda m, x: torch.cat([m.norm((y:=m.a(x))[:, :4]), y.transpose(2, 3)[:, 4:].sigmoid()], 1), False),
    (lambda m, x: torch.cat([m.norm((y:=m.a(x))[:, :4]), y.transpose(2, 3)[:, 3:].sigmoid()], 1), True),
    (lambda m, x: (m.norm((y:=m.a(x))[:, :4]), y.transpose(2, 3)), True),
    (lambda m, x: m.norm(m.a(x).chunk(2, 1)[1]), False),
    (lambda m, x: m.norm(m.a(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2)[:, :4]), False),
    (lambda m, x: m.norm(m.a(x)[:, :4].flip(2).roll(1, 3)), False),
    (lambda m, x: m.norm(2*m.c(x)/3 - 1), False),
    (lambda m, x: m.norm(m.c(x)*0), True),
    (lambda m, x: m.norm(-m.c(x)), False),
    (lambda m, x: m.norm(m.c(x) + m.d(x)), False),
    (lambda m, x: m.norm(m.c(x) - m.d(x)), False),
    (lambda m, x: m.norm(m.d(x) - m.c(x)), False),
    (lambda m, x: m.norm((y:=m.c(x)) + y), True),
    (lambda m, x: m.norm(m.c(x) + m.d(x).mean((2,3), keepdim=True)), False),
    (lambda m, x: m.norm(torch.cat([m.e(x), m.f2(x)], 1)), False),
    (lambda m, x: m.norm(torch.cat([y:=m.e(x), y], 1)), True),
    (lambda m, x: m.norm(torch.stack([m.e(x), m.f2(x)], 1).flatten(1, 2)), True),
    (lambda m, x: m.norm(m.c(x)) + m.norm(m.d(x)), False),
    (lambda m, x: m.norm(m.c(x)).add_(1).relu_(), False),
    (lambda m, x: m.norm((y:=m.c(x))) + y, True),
    (lambda m, x: (m.norm(y:=m.c(x)), y), True),
    (lambda m, x: m.norm(m.c(m.c3(x)) + m.c(m.d3(x))), True),
    (lambda m, x: m.norm(m.c(x).mul_(2.)), False),
    (lambda m, x: m.norm((y:=m.c(x), y.view(-1).mul_(2.))[0]), True),
    (lambda m, x: m.norm(m.c(x).double()), False),
    (lambda m, x: m.norm(m.c(x).float().double()), True),
    (lambda m, x: F.batch_norm(m.norm(m.c(x)), torch.ones(4).double(), torch.ones(4).double()), False),
    (lambda m, x: m.norm(m.c(x)).view(2, -1), False),
    (lambda m, x: m.norm(m.c(x).mean((2,3))).sigmoid(), False),
    (lambda m, x: m.norm(m.c(x).amax((2,3))).sigmoid(), False),
    (lambda m, x: m.norm(m.c(x).sum((2,3))).sigmoid(), True),
])
def test_flows_into_a_norm(f, stays):
    class Any(nn.BatchNorm1d):
        def _check_input_dim(self, x): "any number of dimensions"
    layers = dict(a=nn.Conv2d(3, 8, 3), c=nn.Conv2d(3, 4, 3, bias=False), d=nn.Conv2d(3, 4, 3, bias=False), e=nn.Conv2d(3, 2, 3), f2=nn.Conv2d(3, 2, 3), c3=nn.Conv2d(3, 3, 1), d3=nn.Conv2d(3, 3, 1))
    m = randomized(Net(f, norm=Any(4), **layers), positive=True)
    new = fold(m, left=['norm'] if stays else [])
    for k in ('c','d','c3'): assert getattr(new, k) is None or stays is False or (getattr(new, k).bias is None)==(getattr(m, k).bias is None), 'no bias comes for nothing'

@pytest.mark.parametrize('f,stays', [
    (lambda m, x: m.a(y:=m.norm(x)) + m.b(y), False),
    (lambda m, x: m.a(y:=m.norm(x)) + m.p(y), True),
    (lambda m, x: m.a(m.norm(x)) + x, False),
    (lambda m, x: m.a(y:=m.norm(x)) + y, True),
    (lambda m, x: m.w(torch.cat([m.norm(x), x], 1)), False),
    (lambda m, x: m.w(torch.cat([y:=m.norm(x), y], 1)), False),
    (lambda m, x: m.a(m.norm(x)*2 - 1), False),
    (lambda m, x: m.a(m.norm(x).mul_(2)) + x, True),
    (lambda m, x: m.a(m.norm(x.sin()).mul_(2)), False),
    (lambda m, x: m.a(m.norm(x).view(2, 3, 12, 12).mul_(2)) + x, True),
    (lambda m, x: m.a(F.avg_pool2d(m.norm(x), 2).mul_(2)).sum() + x, False),
    (lambda m, x: m.a(m.a(m.norm(x))), True),
    (lambda m, x: m.a(m.norm2(m.norm(x.sin()))), False),
    (lambda m, x: m.norm2(y:=m.norm(x.sin())).relu() + m.norm3(y).relu(), None),
    (lambda m, x: F.conv2d(x, m.norm(m.a.weight)), True),
    (lambda m, x: F.conv2d(x, m.norm(m.a.weight.flatten().view(3, 3, 1, 1)).relu_()), True),
    (lambda m, x: m.l(m.norm(x).permute(0, 2, 3, 1)), False),
    (lambda m, x: m.l2(m.norm(x).permute(0, 2, 3, 1)), False),
    (lambda m, x: m.l2(m.norm(x).transpose(1, 3)[:, 0]) + 1, False),
    (lambda m, x: F.linear(m.norm(x).mean((2,3)), m.l.weight.tanh()), True),
    (lambda m, x: F.linear(m.norm(x).mean((2,3)), m.l.weight), True),
    (lambda m, x: F.linear(m.norm(x).mean((2,3)), m.l.weight, m.l.bias), False),
    (lambda m, x: torch.addmm(m.l.bias, m.norm(x).mean((2,3)), m.l.weight.T, alpha=2), True),
    (lambda m, x: m.norm(x).mean((2,3)) @ m.l.weight.T + m.l.bias, False),
    (lambda m, x: (m.norm(x), x)[0], True),
])
def test_flows_out_of_a_norm(f, stays):
    m = randomized(Net(f, norm=nn.BatchNorm2d(3), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1, bias=False), p=nn.Conv2d(3, 3, 3, padding=1), w=nn.Conv2d(6, 3, 2), l=nn.Linear(3, 4), l2=nn.Linear(3, 4, bias=False)), positive=True)
    twos = 'norm2' in f.__code__.co_names
    if twos: m.norm2,m.norm3 = randomized(nn.BatchNorm2d(3), 1),randomized(nn.BatchNorm2d(3), 2)
    if stays is None: left = ['norm2','norm3']
    else: left = (['norm'] if stays else []) + (['norm3'] if twos else [])
    fold(m, left=left)

def test_a_size_that_shows_nothing():
    "At a single place a sum is an average, and a padding of nothing is none: other sizes would differ"
    m = randomized(Net(lambda m, x: m.norm(m.c(x).sum((2,3))), c=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm1d(4)))
    fold(m, torch.randn(2, 3, 1, 1).double(), left=['norm'])
    same = lambda m, x: m.c(F.pad(m.norm(x), (0,x.shape[3]%2,0,x.shape[2]%2)))
    m = randomized(Net(same, c=nn.Conv2d(3, 4, 2, stride=2), norm=nn.BatchNorm2d(3)))
    for x in (X, X[...,:11,:11]): fold(m, x, left=['norm'])
    m = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2, ceil_mode=True, divisor_override=4), nn.BatchNorm2d(4)))
    fold(m, left=['2'])

# norms of one's own

class Act(nn.BatchNorm2d):
    "A norm with parts behind it, as timm has them"
    def __init__(self, n, act=nn.ReLU, drop=nn.Identity, **kwargs):
        super().__init__(n, **kwargs)
        self.drop,self.act = drop(),act()
    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))

class SyncAct(nn.SyncBatchNorm):
    def __init__(self, n):
        super().__init__(n)
        self.act = nn.Hardswish(inplace=True)
    def forward(self, x):
        x = super().forward(x)
        return self.act(x) if hasattr(self, 'act') else x

class Frozen(nn.Module):
    "Buffers, and no operation that normalizes"
    def __init__(self, n, act=nn.Identity):
        super().__init__()
        for k in ('weight','bias','running_mean','running_var'): self.register_buffer(k, torch.ones(n))
        self.act = act()
    def forward(self, x):
        w,b,mean,var = (o.reshape(1, -1, 1, 1) for o in (self.weight,self.bias,self.running_mean,self.running_var))
        scale = w*(var+1e-5).rsqrt()
        return self.act(x*scale+(b-mean*scale))

class FrozenOrNot(Frozen):
    "As detectron2 has it"
    def forward(self, x):
        if x.requires_grad: return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-5)

class Textbook(nn.Module):
    "Written by hand, with other names"
    def __init__(self, n):
        super().__init__()
        self.gamma,self.beta = (nn.Parameter(torch.ones(1, n, 1, 1)) for _ in range(2))
        for k in ('moving_mean','moving_var'): self.register_buffer(k, torch.ones(1, n, 1, 1))
    def forward(self, x): return self.gamma*((x-self.moving_mean)/torch.sqrt(self.moving_var+1e-5))+self.beta

class Renorm(nn.Module):
    "Keeps a standard deviation"
    def __init__(self, n):
        super().__init__()
        self.weight,self.bias = (nn.Parameter(torch.ones(n)) for _ in range(2))
        for k in ('running_mean','running_std'): self.register_buffer(k, torch.ones(n))
    def forward(self, x):
        y = (x.permute(0, 2, 3, 1)-self.running_mean)/self.running_std
        return (self.weight*y+self.bias).permute(0, 3, 1, 2)

class Absolute(nn.BatchNorm2d):
    "As in-place activated norms have it"
    def forward(self, x): return F.leaky_relu_(F.batch_norm(x, self.running_mean, self.running_var, self.weight.abs()+self.eps, self.bias, False, 0., self.eps), .01)

class ChannelsLast(nn.BatchNorm1d):
    "Turns images for a norm of rows"
    def __init__(self, n, act, f=torch.clone):
        super().__init__(n)
        self.act,self.f = act(),f
    def forward(self, x):
        y = self.f(super().forward(x.permute(0, 2, 3, 1).flatten(0, 2)))
        return self.act(y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2))

class Apply(nn.BatchNorm2d):
    "A function of what the norm gives"
    def __init__(self, n, f):
        super().__init__(n)
        self.f = f
    def forward(self, x): return self.f(super().forward(x))

class Bare(nn.Module):
    "A layer that normalizes by a function"
    def __init__(self, n, shortcut=False):
        super().__init__()
        self.conv,self.shortcut = nn.Conv2d(n, n, 3, padding=1, bias=False),shortcut
        self.w,self.b = (nn.Parameter(torch.ones(n)) for _ in range(2))
        for k in ('avg','var'): self.register_buffer(k, torch.ones(n))
    def forward(self, x):
        y = F.relu(F.batch_norm(self.conv(x), self.avg, self.var, self.w, self.b, self.training))
        return x+y if self.shortcut else y

def lively(m):
    "`m` with random numbers, also in what is not named as torch names it"
    m = randomized(m)
    for n,b in m.named_buffers():
        if n.endswith(('var','std')): b.uniform_(.2, 1.2)
        if n.endswith(('mean','avg','bias')): b.normal_()
        if n.endswith('weight'): b.uniform_(.5, 2)
    return m

def between(norm): return lively(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.Conv2d(4, 5, 3, padding=1)))

def gone(m, inputs=X, sizes=((3,17,15),)):
    "`m` folded: all norms went, other sizes work, it can be pickled and copied"
    folder = BN_Folder()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        new = folder.fold(m, inputs)
    assert folder.into and not folder.left and not [n for n,_ in new.named_buffers()]
    for seed,size in enumerate((tuple(inputs.shape),*((n,inputs.shape[1],*hw) for n,*hw in sizes))):
        x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(inputs)
        assert difference(m, new, x)[0]<1e-12
    assert difference(new, pickle.loads(pickle.dumps(copy.deepcopy(new))), inputs)[0]==0
    return new

def kinds(m): return [type(o).__name__ for o in m.modules() if not list(o.children())]

@pytest.mark.parametrize('norm,rest', [
    (Act(4), ['ReLU']),
    (Act(4, lambda: nn.SiLU(inplace=True), nn.Dropout2d), ['Dropout2d','SiLU']),
    (Act(4, lambda: nn.PReLU(4)), ['PReLU']),
    (Act(4, affine=False), ['ReLU']),
    (Act(4, nn.Identity), []),
    (SyncAct(4), ['Hardswish']),
    (Frozen(4), []),
    (Frozen(4, nn.GELU), ['GELU']),
    (FrozenOrNot(4, nn.GELU), []),
    (Textbook(4), []),
    (Renorm(4), []),
    (ChannelsLast(4, nn.GELU), ['GELU']),
    (ChannelsLast(4, nn.Identity, F.silu), ['Pointwise']),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), []),
    (Absolute(4), ['Pointwise']),
    (Apply(4, torch.relu), ['Pointwise']),
    (Apply(4, nn.ReLU()), ['ReLU']),
])
def test_norms_of_ones_own(norm, rest):
    m = between(copy.deepcopy(norm))
    new = gone(m)
    assert kinds(new)==['Conv2d',*rest,'Conv2d'] and new[0].bias is not None
    parts = [k for k in m.state_dict() if k.startswith('1.act.')]
    assert [k for k in new.state_dict() if k.startswith('1.act.')]==parts, 'what remains keeps its names'

def test_identity_branch():
    "Three branches are summed, as in RepVGG: what scales the input alone has no layer to go into"
    f = lambda m, x: F.relu(m.a(m.conv3(y:=F.relu(m.stem(x))))+m.b(m.conv1(y))+m.c(y))
    m = lively(Net(f, stem=nn.Conv2d(3, 4, 3), conv3=nn.Conv2d(4, 4, 3, padding=1), conv1=nn.Conv2d(4, 4, 1), a=Act(4, nn.Identity), b=nn.BatchNorm2d(4), c=nn.BatchNorm2d(4)))
    fold(m, left=['c'])

def swish(x): return x*x.sigmoid()
def hard_swish(x): return x*F.relu6(x+3)/6
def mish(x): return x*torch.tanh(F.softplus(x))
@pytest.mark.parametrize('f', [swish,hard_swish,mish,F.hardswish,F.gelu,F.selu,torch.sigmoid,F.relu_])
def test_functions_behind_a_norm(f):
    new = gone(between(Apply(4, f)))
    assert kinds(new)==['Conv2d','Pointwise','Conv2d']
    x = torch.randn(2, 4, 5, 5).double()
    assert torch.equal(new[1](x.clone()), f(x.clone()))

def test_parts_before_and_behind():
    class Sandwich(nn.BatchNorm2d):
        def __init__(self, n, again=False):
            super().__init__(n)
            self.first,self.last,self.extra,self.again = nn.Softplus(),nn.Tanh(),nn.BatchNorm2d(n),again
        def forward(self, x):
            if self.training: return self.extra(x)
            y = self.last(F.silu(super().forward(self.first(x)*3).exp()))
            return self.last(y) if self.again else y
    m = lively(nn.Sequential(Sandwich(3), nn.Conv2d(3, 4, 3)))
    folder = BN_Folder()
    with pytest.warns(UserWarning, match='2 of 2 norms stay'): folder.fold(m, X)
    assert 'does not commute' in folder.left['0'] and 'did not run' in folder.left['0.extra']
    class Behind(Sandwich):
        def forward(self, x): return self.extra(x) if self.training else self.last(super(Sandwich, self).forward(x)).exp()
    new = fold(lively(nn.Sequential(nn.Conv2d(3, 4, 3), Behind(4))))
    assert kinds(new)==['Conv2d','Tanh','Pointwise'], 'what runs in training only goes along'

def test_a_part_called_twice():
    class Twice(Act):
        def forward(self, x): return self.act(self.act(super().forward(x))*.5)
    m = between(Twice(4, nn.Tanh))
    folder = BN_Folder()
    with pytest.warns(UserWarning, match='1 of 1'): new = folder.fold(m, X)
    assert 'still runs' in folder.left['1'] and difference(m, new, X)[0]<1e-12

def doubled(x): return 2*x+1
def test_arithmetic_behind_a_norm_goes_along(): assert kinds(gone(between(Apply(4, doubled))))==['Conv2d','Conv2d']

@pytest.mark.parametrize('d', [1,2,3])
def test_any_dimension(d):
    class Own(getattr(nn, f'BatchNorm{d}d')):
        def __init__(self, n):
            super().__init__(n)
            self.act = nn.Tanh()
        def forward(self, x): return self.act(super().forward(x))
    conv = getattr(nn, f'Conv{d}d')
    m = lively(nn.Sequential(conv(3, 4, 3), Own(4), conv(4, 4, 3), Own(4)))
    folder = BN_Folder()
    new = folder.fold(m, x:=torch.randn(2, 3, *[6]*d).double())
    assert folder.into=={'1':['0'],'3':['2']} and not norms(new) and difference(m, new, x)[0]<1e-12

def test_a_layer_that_normalizes_by_a_function():
    m = lively(nn.Sequential(nn.Conv2d(3, 4, 3), Bare(4), Bare(4)))
    new = gone(m)
    assert kinds(new)==['Conv2d','Conv2d','Pointwise','Conv2d','Pointwise'] and [n for n,_ in new.named_parameters()][2:4]==['1.conv.weight','1.conv.bias']

@pytest.mark.parametrize('m', [
    nn.Sequential(nn.Conv2d(3, 4, 3), Bare(4, True)),
    Net(lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)),
    Net(lambda m, x: m.norm(input=m.conv(x)), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)),
    nn.Sequential(nn.Conv2d(3, 4, 3), Apply(4, lambda x: torch.cat([x,x], 1)[:, :4])),
])
def test_a_norm_that_code_calls_runs_on_without_effect(m):
    m = lively(m)
    folder = BN_Folder()
    with pytest.warns(UserWarning, match='1 of 1 norms stay') as said: new = folder.fold(m, X)
    assert len(said)==1 and folder.into.keys()==folder.left.keys() and all('still runs, without effect' in o for o in folder.left.values())
    assert difference(m, new, random_like(X))[0]<1e-12 and new.state_dict().keys()>=m.state_dict().keys()
    shift = [b for n,b in new.named_buffers() if n.endswith(('mean','avg'))][0]
    assert not shift.any()

def test_code_that_counts_on_a_norm():
    "It asks the norm for its size, or reads its weight: that one stays, others go"
    asks = lambda m, x: m.b(m.norm2(m.a(m.norm(m.conv(x)).view(len(x), m.norm.num_features, -1).unsqueeze(3))))
    m = lively(Net(asks, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), a=nn.Conv2d(4, 4, (3,1)), norm2=Act(4), b=nn.Conv2d(4, 3, 1)))
    folder = BN_Folder()
    with pytest.warns(UserWarning, match='1 of 2 norms stay'): new = folder.fold(m, X)
    assert folder.into=={'norm2':['a']} and 'does not run without it' in folder.left['norm'] and difference(m, new, random_like(X))[0]<1e-12
    stays(lively(Net(lambda m, x: m.norm(m.conv(x))*m.norm.weight.mean(), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))), 'norm.weight is used elsewhere')

@pytest.mark.parametrize('norm,takes', [(Act(3, nn.Tanh),True),(Frozen(3, nn.Tanh),True),(FrozenOrNot(3),True),(nn.BatchNorm2d(3, affine=False),True),(Absolute(3),False),(Textbook(3),False)])
def test_a_norm_of_ones_own_takes_another(norm, takes):
    "If its scale and shift are its weight and bias; else the other takes it"
    m = lively(Net(lambda m, x: m.norm(m.other(x.sin())).exp(), norm=copy.deepcopy(norm), other=nn.BatchNorm2d(3)))
    folder = BN_Folder()
    with pytest.warns(UserWarning, match='1 of 2 norms stay'): new = folder.fold(m, X)
    assert folder.into==({'other':['norm']} if takes else {'norm':['other']}), folder.left
    assert difference(m, new, random_like(X))[0]<1e-10

@pytest.mark.parametrize('op', [
    lambda *a: torch.ops.aten.native_batch_norm(*a, False, .1, 1e-5)[0],
    lambda *a: torch.ops.aten._native_batch_norm_legit(*a, False, .1, 1e-5)[0],
    lambda *a: torch.ops.aten._native_batch_norm_legit_no_training(*a, .1, 1e-5)[0],
    lambda *a: torch.ops.aten._batch_norm_no_update(*a, .1, 1e-5)[0],
    lambda *a: torch.batch_norm(*a, False, .1, 1e-5, True),
])
def test_every_spelling(op):
    class Spelt(nn.BatchNorm2d):
        def forward(self, x): return op(x, self.weight, self.bias, self.running_mean, self.running_var)
    m = between(Spelt(4)).cpu()  # not all of them are for a GPU
    assert kinds(gone(m, X.cpu()))==['Conv2d','Conv2d']

def test_spellings_of_other_devices():
    "Told by their arguments"
    from fasterai.core.ops import Call,spec_of
    from fasterai.misc.bn_folding import _by_batch,_normalizes
    x,v = torch.ones(2, 3, 4, 4),torch.ones(3)
    calls = dict(cudnn_batch_norm=(x,v,v,v,v,False,.1,1e-5), miopen_batch_norm=(x,v,v,v,v,False,.1,1e-5), batch_norm=(x,v,v,v,v,False,.1,1e-5,True), instance_norm=(x,v,v,v,v,False,.1,1e-5,True))
    for name,args in calls.items():
        for training in (False,True):
            func = getattr(torch.ops.aten, name).default
            c = Call(func, spec_of(func), [training if o is False else o for o in args], {}, lambda t: t, '')
            assert _normalizes(c) and _by_batch(c)==training, name
    for name,args in dict(native_layer_norm=(x,[4],None,None,1e-5), native_group_norm=(x,v,v,2,3,16,1,1e-5)).items():
        func = getattr(torch.ops.aten, name).default
        assert not _normalizes(Call(func, spec_of(func), args, {}, lambda t: t, ''))

def test_a_norm_in_float32_in_a_network_in_half():
    class Wide(nn.BatchNorm2d):
        def forward(self, x): return super().forward(x.float()).to(x.dtype)
    for dtype in (torch.float16,torch.bfloat16):
        m = between(Wide(4)).to(dtype)
        m[1].float()
        folder = BN_Folder()
        new = folder.fold(m, X.to(dtype))
        assert folder.into=={'1':['0']} and not norms(new) and difference(m, new, X.to(dtype))[0]<16*torch.finfo(dtype).eps
    class Wider(Wide):
        def forward(self, x): return super().forward(x).to(torch.float64)
    m = between(Wider(4)).float()
    m[2].double()
    new = BN_Folder().fold(m, X.float())
    assert not norms(new) and difference(m, new, X.float())==(pytest.approx(0, abs=1e-6),torch.float64), 'a type that changes on the way is changed still'

def test_channels_last_through_an_activation():
    m = between(Act(4)).to(memory_format=torch.channels_last)
    new = BN_Folder().fold(m, X.to(memory_format=torch.channels_last))
    assert not norms(new) and all(o.weight.is_contiguous(memory_format=torch.channels_last) for o in (new[0],new[2]))

# who asks, and around what

def test_wrappers(tmp_path):
    m = between(Act(4))
    dist = torch.distributed
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path/'store'), 1), rank=0, world_size=1)
    try: ddp = nn.parallel.DistributedDataParallel(m)
    finally: dist.destroy_process_group()
    for w in (nn.DataParallel(m),torch.compile(m),torch.compile(nn.DataParallel(m)),ddp,torch.compile(ddp),torch.optim.swa_utils.AveragedModel(m)):
        new = BN_Folder().fold(w, X)
        assert type(new) is nn.Sequential and not norms(new) and difference(m, new, X)[0]<1e-12
    with pytest.raises(ValueError, match='script the result'): BN_Folder().fold(torch.jit.trace(m, X), X)
    with pytest.raises(ValueError, match='0.weight is on the meta device and has no values'): BN_Folder().fold(between(Act(4)).to('meta'), X.to('meta'))

def test_modes_around():
    "Autocast and inference mode around the call leave no trace in what comes out"
    m = between(Act(4)).float()
    x = X.float()
    with torch.autocast('cpu', dtype=torch.bfloat16): a = BN_Folder().fold(m, x)
    with torch.inference_mode(): b = BN_Folder().fold(m, x)
    for new in (a,b):
        assert not norms(new) and difference(m, new, x)[0]<1e-5
        new.train()(x).sum().backward()

def test_subclasses_of_tensors():
    from fastai.torch_core import TensorImage
    m = between(Act(4)).float()
    new = BN_Folder().fold(m, TensorImage(X.float()))
    assert not norms(new) and difference(m, new, X.float())[0]<1e-5

def test_computed_tensors_on_the_model():
    "Left behind by a run, wherever they are"
    m = between(Act(4))
    class Keeper:
        def __call__(self, m, args, out): self.stored = out
    keeper = Keeper()
    m.register_forward_hook(keeper)
    m[0].notes = {'grads':[(m[0].weight*2,)]}
    m(X)
    assert not keeper.stored.is_leaf
    new = BN_Folder().fold(m, X)
    assert not norms(new) and not new[0].notes['grads'][0][0].requires_grad

def test_unet_after_an_interrupt():
    "Its hooks have stored what they saw"
    from fastai.vision.models.unet import DynamicUnet
    from tiny import At,fit,learner,raises
    body = nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])
    data = [(torch.randn(3, 32, 32),torch.randint(0, 3, (32,32))) for _ in range(48)]
    learn = learner(DynamicUnet(body, 3, (32,32)), data=data, bs=2, n=4)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=At('after_loss', raises(KeyboardInterrupt)))
    folder = BN_Folder()
    with pytest.warns(UserWarning, match='norms stay'): new = folder.fold(learn.model, torch.randn(1, 3, 32, 32))
    assert len(folder.into)==20 and len(folder.left)==5 and difference(learn.model, new, torch.randn(1, 3, 32, 32))[0]<1e-4

def test_a_choice_between_equals():
    "Two channels are the same but for rounding, and the larger one decides: which it is changes, and proves nothing"
    f = lambda m, x: torch.where(m.norm(m.conv(x)).argmax(1)==0, x[:, 0], -x[:, 0])
    m = randomized(Net(f, conv=nn.Conv2d(3, 2, 3, padding=1), norm=nn.BatchNorm2d(2)), positive=True).float().cpu()  # where rounding is known
    with torch.no_grad():
        for o in (m.conv.bias,m.norm.running_mean): o.zero_()
        for o in (m.norm.bias,m.norm.running_var): o[1] = o[0]
        m.conv.weight[1],m.norm.weight[1] = m.conv.weight[0]/3,m.norm.weight[0]*3
    x = random_like(X.float().cpu())
    folder = BN_Folder()
    new = folder.fold(m, x)
    assert folder.into=={'norm':['conv']} and difference(m, new, x)[0]>.1, 'or this tests nothing'
    plain = torch.where(m.norm(m.conv(x)).argmax(1)==new.conv(x).argmax(1), 0., (m.norm(m.conv(x))-new.conv(x)).abs().amax(1))
    assert plain.max()<1e-5
    wrong = copy.deepcopy(new)
    with torch.no_grad(): wrong.conv.bias[1] += 1.
    with pytest.raises(ValueError, match='changed'): check_choices(m, wrong, x)

# what is left alone

def stays(m, why, inputs=None):
    folder = BN_Folder()
    with pytest.warns(UserWarning, match='norms stay'): new = folder.fold(m, X if inputs is None else inputs)
    assert len(norms(new))==len(norms(m)) and not hasattr(new, '_pruned')
    assert all(why in o for o in folder.left.values()), folder.left
    assert difference(m, new, X if inputs is None else inputs)[0]==0 and n_params(new)==n_params(m)

def pair(**kwargs): return randomized(nn.Sequential(nn.Conv2d(3, 4, 3, **kwargs), nn.BatchNorm2d(4)))

def test_no_running_statistics(): stays(randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))), 'no running statistics')
def bn(n, bias=True, **kwargs):
    "Only newer releases of PyTorch have an argument `bias`"
    m = nn.BatchNorm2d(n, **kwargs)
    if not bias: m.bias = None
    return m

@pytest.mark.parametrize('kwargs', [dict(affine=False),dict(bias=False)])
def test_not_affine(kwargs): fold(randomized(nn.Sequential(nn.Conv2d(3, 4, 3), bn(4, **kwargs))))

@pytest.mark.parametrize('kwargs', [dict(affine=False),dict(bias=False),{}])
@pytest.mark.parametrize('after', [True,False])
def test_a_norm_takes_a_norm(kwargs, after):
    first,second = bn(3, **kwargs),bn(3)
    if after: m = randomized(Net(lambda m, x: m.b(m.a(x.sin())).tanh(), a=first, b=second))
    else: m = randomized(Net(lambda m, x: m.b(m.a(x.sin())).tanh(), a=second, b=first))
    fold(m, left=['b'])

def test_frozen():
    m = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4), nn.ReLU())
    m = randomized(m)
    m[1].weight.uniform_(.5, 2)
    assert len(fold(m))==2

def test_sync(): fold(randomized(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))))

def test_shared_weight():
    m = pair()
    stays(nn.Sequential(m, nn.ReLU(), nn.Conv2d(4, 3, 1).double(), m[0]), 'used elsewhere as well')
    twin = pair()
    twin.add_module('2', nn.Conv2d(4, 3, 1).double())
    twin.add_module('3', nn.Conv2d(3, 4, 3).double())
    twin[3].weight = twin[0].weight
    stays(nn.Sequential(twin[0], twin[1], nn.ReLU(), twin[2], twin[3]), 'used elsewhere as well')

def test_shared_but_elsewhere_idle():
    "A weight that another module holds may be used any time"
    m = randomized(Net(lambda m, x: m.norm(m.a(x)), a=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), b=nn.Conv2d(3, 4, 3)))
    m.b.weight = m.a.weight
    stays(m, 'used elsewhere as well')

def test_computed_weights():
    for wrap,why in ((parametrizations.weight_norm,'computed'),(parametrizations.spectral_norm,'computed'),(lambda o: prune.l1_unstructured(o, 'weight', .5),'seen by a hook')):
        m = pair()
        wrap(m[0])
        m.eval()
        stays(m, why)

def test_hooks():
    for i,why in ((0,'seen by a hook'),(1,'it has hooks')):
        m = pair()
        m[i].register_forward_hook(lambda m, args, out: None)
        stays(m, why)
    m = pair()
    seen = []
    m.register_forward_hook(lambda m, args, out: seen.append(out))
    assert len(fold(m))==1 and seen, 'a hook of the whole sees what it saw before'

def test_kept_outputs():
    def keep(m, x):
        m.seen = m.conv(x)
        return m.norm(m.seen)
    m = randomized(Net(keep, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    stays(m, 'kept by the model')

def test_own_convolution():
    "A convolution with a forward of its own takes part, if it adds its bias"
    class Same(nn.Conv2d):
        def forward(self, x): return self._conv_forward(F.pad(x, (0,1,0,1)), self.weight, self.bias)
    class Bare(nn.Conv2d):
        def forward(self, x): return F.conv2d(x, self.weight)
    assert len(fold(randomized(nn.Sequential(Same(3, 4, 2, bias=False), nn.BatchNorm2d(4)))))==1
    stays(randomized(nn.Sequential(Bare(3, 4, 2, bias=False), nn.BatchNorm2d(4))), 'uses no bias')

def test_not_run():
    m = randomized(Net(lambda m, x: m.norm(m.conv(x)) if m.training else m.conv(x), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    stays(m, 'did not run in eval mode')

def test_used_twice_into_two():
    m = randomized(Net(lambda m, x: m.norm(m.a(x)).relu() + m.norm(m.b(x)).relu(), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    fold(m)
    m = randomized(Net(lambda m, x: m.norm(m.a(x)).relu() + m.norm(m.b(x).relu()).relu(), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    fold(m, left=['norm'])

# numbers

def test_never_subnormal():
    for dtype in (torch.float32,torch.float64,torch.float16,torch.bfloat16):
        m = pair().to(dtype)
        tiny = torch.finfo(dtype).tiny
        with torch.no_grad():
            m[0].weight[0].mul_(tiny*100)
            m[1].weight[0] = 1e-3
            m[1].weight[1] = tiny/4 if dtype!=torch.bfloat16 else tiny
        new = BN_Folder().fold(m, X.to(dtype))
        for p in new.parameters(): assert not ((p!=0)&(p.abs()<tiny)).any() and p.dtype==dtype
        assert (new[0].weight[0]==0).any()

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_half(dtype):
    m = pair()
    want,half = m(X.to(dtype).double()),m.to(dtype)
    new = BN_Folder().fold(half, X.to(dtype))
    got = new(X.to(dtype)).double()
    assert (got-want).abs().max()<=8*torch.finfo(dtype).eps*want.abs().max()

def test_overflow():
    "A weight that its type cannot hold any more: the norm stays, others go"
    m = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    m[1].running_var.fill_(1e-6)
    m[1].weight.data.fill_(1.)
    m[1].eps = 1e-9
    with torch.no_grad():
        m[0].weight.mul_(2**-13)
        m[0].weight[0,0,0,0] = 1000.
        m[0].bias.zero_()
        m[1].running_mean.zero_()
        m[1].bias.zero_()
    x = X.clone()
    m = m.half()
    m[1].running_var.fill_(1e-6)
    folder = BN_Folder(verify=False)
    folder.fold(m, torch.zeros_like(x).half())
    assert folder.left=={'1':'a weight would overflow'} and folder.into=={'4':['3']}

def test_statistics_that_are_no_numbers():
    m = pair()
    m[1].running_var[0] = -1.
    stays_left = BN_Folder(verify=False)
    stays_left.fold(m, X)
    assert 'not finite' in stays_left.left['1']

# containers

def test_containers():
    "Out of a Sequential that runs by itself; where code counts on a place an Identity takes it"
    block = lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    new = fold(randomized(nn.Sequential(block(), block())))
    assert list(new.state_dict())==['0.0.weight','0.0.bias','1.0.weight','1.0.bias'] and not identities(new)
    new.append(nn.ReLU())
    assert [type(o) for o in new[0]]==[nn.Conv2d,nn.ReLU] and list(new._modules)==['0','1','2']
    new = fold(randomized(Net(lambda m, x: m.body[2](m.body[1](m.body[0](x))), body=block())))
    assert identities(new)==['body.1']
    new = fold(randomized(Net(lambda m, x: m.body(x) + m.body[2](x), body=block())))
    assert identities(new)==['body.1'], 'the Sequential runs, and is indexed as well'
    new = fold(randomized(Net(lambda m, x: m.body['act'](m.body['norm'](m.body['conv'](x))), body=nn.ModuleDict(dict(zip(('conv','norm','act'), block()))))))
    assert identities(new)==['body.norm']
    class Own(nn.Sequential):
        def forward(self, x):
            for o in self: x = o(x)
            return x
    assert identities(fold(randomized(Own(*block()))))==['1']

def test_layout_that_code_counts_on():
    "`view` needs what the norm made contiguous"
    m = randomized(Net(lambda m, x: m.norm2(m.b(m.norm(m.a(x.flatten(2)).transpose(1, 2)).view(len(x), -1))), a=nn.Linear(144, 5), norm=nn.BatchNorm1d(5), b=nn.Linear(15, 2), norm2=nn.BatchNorm1d(2)))
    fold(m, left=['norm'])
    m = randomized(Net(lambda m, x: m.b(m.norm(m.a(x.flatten(2)).transpose(1, 2)).reshape(len(x), -1)), a=nn.Linear(144, 5), norm=nn.BatchNorm1d(5), b=nn.Linear(15, 2)))
    fold(m)

def test_train_mode_is_kept():
    m = torchvision.models.resnet18(num_classes=3).train()
    m.layer1.eval()
    new = BN_Folder().fold(m, torch.randn(2, 3, 32, 32))
    left = dict(new.named_modules())
    assert all(left[n].training==o.training for n,o in m.named_modules() if n in left) and all(p.requires_grad for p in new.parameters())
    new(torch.randn(2, 3, 32, 32)).sum().backward()

def test_channels_last_and_no_grad_are_kept():
    m = pair().to(memory_format=torch.channels_last)
    m[0].weight.requires_grad_(False)
    new = fold(m)
    assert new[0].weight.is_contiguous(memory_format=torch.channels_last) and not new[0].weight.requires_grad

# pruned models, wrong arguments

def test_pruned_then_folded(tmp_path):
    "A folded model is saved with its plan; so is the pruned one, and what is loaded folds to the same"
    m = randomized(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(1), nn.Linear(256, 3)))
    with torch.no_grad(): [o.index_fill_(0, torch.tensor([1,4]), 0) for o in (m[0].weight,m[0].bias,m[1].weight,m[1].bias)]
    small = Pruner().prune_model(m, X)
    new = fold(small)
    save_pruned(new, tmp_path/'a')
    assert all(torch.equal(a, b) for a,b in zip(load_pruned(tmp_path/'a', copy.deepcopy(m)).state_dict().values(), new.state_dict().values()))
    save_pruned(small, tmp_path/'b')
    again = fold(load_pruned(tmp_path/'b', copy.deepcopy(m)))
    assert all(torch.equal(a, b) for a,b in zip(again.state_dict().values(), new.state_dict().values()))

def test_wrong_arguments():
    with pytest.raises(TypeError, match="a model is an nn.Module, not 'resnet18'"): BN_Folder().fold('resnet18')
    with pytest.raises(ValueError, match='no shape yet'): BN_Folder().fold(nn.Sequential(nn.LazyConv2d(3, 3), nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match='example_inputs'): BN_Folder().fold(Net(lambda m, x: m.norm(x['a']), norm=nn.BatchNorm2d(3)))
    with pytest.warns(UserWarning, match='nothing to fold$'): BN_Folder().fold(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3))
    with pytest.warns(UserWarning, match=r'nothing to fold. Its norms \(2 LayerNorm, 1 GroupNorm\)'):
        BN_Folder().fold(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4)), torch.randn(2, 3))

def test_a_norm_for_more_than_one_sample():
    "As where a last batch of one is to be trained with: it stays, and the reason is told"
    def f(m, x):
        y = m.a(x)
        return m.b(F.relu(m.norm(y) if len(x)>1 else y))
    m = randomized(Net(f, a=nn.Linear(6,8), norm=nn.BatchNorm1d(8), b=nn.Linear(8,3))).double().eval()
    x,folder = torch.randn(3, 6, dtype=torch.float64),BN_Folder()
    with pytest.warns(UserWarning, match='1 of 1 norms stay'): new = folder.fold(m, x)
    assert norms(new)==['norm'] and all(difference(m, new, o)[0]<1e-12 for o in (x,x[:1]))
    assert 'with 1 sample: then the code of the model takes another branch' in folder.left['norm']
