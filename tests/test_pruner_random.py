"Random networks with random zeros: outputs stay, for inputs of other sizes as well; and they run with fewer channels by ratio"
import random,warnings
import pytest,torch
import torch.nn.functional as F
from torch import nn
from fasterai.core.proof import difference
from fasterai.prune.left import LAST
from fasterai.prune.pruner import Pruner
from tiny import Net

def shuffled(m, x): return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
def halves(m, x): return torch.cat([(o:=x.chunk(2, 1))[0], m.a(o[1])], 1)
def excited(m, x): return x*m.gate(m.up(F.relu(m.down(x.mean((2,3), keepdim=True)))))

def act(r): return r.choice([nn.ReLU,nn.Sigmoid,nn.Hardswish,nn.ReLU6,nn.Tanh,nn.GELU,nn.Identity,nn.Softplus])()
def norm(r, c):
    return r.choice([nn.BatchNorm2d,nn.BatchNorm2d,lambda c: nn.BatchNorm2d(c, affine=False),lambda c: nn.InstanceNorm2d(c, affine=True),lambda c: nn.GroupNorm(2, c),
        lambda c: nn.GroupNorm(c, c),lambda c: nn.Identity()])(c)

def block(r, c):
    "A block of `c` channels that leaves the image's size, and how many it makes"
    o,bias = r.choice([4,6,8]),r.choice([True,False])
    conv = lambda i,o,k=3,**kw: nn.Conv2d(i, o, k, padding=k//2, bias=bias, padding_mode=r.choice(['zeros','zeros','reflect']), **kw)
    return r.choice([
        lambda: (nn.Sequential(conv(c,o), norm(r,o), act(r)), o),
        lambda: (nn.Sequential(conv(c,o,1), norm(r,o), act(r)), o),
        lambda: (nn.Sequential(conv(c,c,groups=c), act(r)), c),
        lambda: (nn.Sequential(conv(c,o,groups=2), norm(r,o), act(r)), o),
        lambda: (Net(lambda m,x: x+m.b(m.a(x)), a=nn.Sequential(conv(c,o), norm(r,o), act(r)), b=conv(o,c)), c),
        lambda: (Net(lambda m,x: torch.cat([m.a(x),m.b(x)], 1), a=conv(c,o), b=nn.Sequential(conv(c,4,1), norm(r,4), act(r))), o+4),
        lambda: (Net(excited, down=nn.Conv2d(c,3,1), up=nn.Conv2d(3,c,1), gate=r.choice([nn.Sigmoid(),nn.Hardsigmoid(),nn.ReLU()])), c),
        lambda: (Net(shuffled), c),
        lambda: (Net(halves, a=nn.Sequential(conv(c//2,c//2), act(r))), c),
        lambda: (Net(lambda m,x: m.a(F.relu(m.a(x))), a=nn.Sequential(conv(c,c), norm(r,c))), c),
        lambda: (nn.Sequential(nn.ConvTranspose2d(c,o,2,2,bias=bias), r.choice([nn.MaxPool2d(2),nn.AvgPool2d(2)])), o),
        lambda: (nn.Sequential(nn.Conv2d(c,4*o,1), nn.PixelShuffle(2), nn.AvgPool2d(2)), o),
        lambda: (r.choice([nn.MaxPool2d(3,1,1),nn.AvgPool2d(3,1,1),nn.AvgPool2d(2,1),nn.Upsample(scale_factor=2, mode='bilinear')]), c)])()

def images(r):
    c = r.choice([4,6,8])
    layers = [nn.Conv2d(3, c, 3, padding=r.choice([0,1]), bias=r.choice([True,False])), norm(r, c)]
    for _ in range(r.randint(1, 5)):
        b,c = block(r, c)
        layers.append(b)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3)), lambda n: torch.randn(2, 3, 10+n, 13+2*n, dtype=torch.float64)

def attended(m, x):
    (B,T,C),split = x.shape, lambda o: o.view(*o.shape[:2], m.h, -1).transpose(1, 2)
    if m.fused:
        q,k,v = m.qkv(x).reshape(B, T, 3, m.h, C//m.h).permute(2,0,3,1,4)
        y = (q@k.transpose(-2, -1)/C**.5).softmax(-1)@v
    else: y = F.scaled_dot_product_attention(*map(split, (m.q(x),m.k(x),m.v(x))))
    return m.out(y.transpose(1, 2).flatten(2))

def attention(r, d):
    h,a,b,fused = r.choice([1,2,4]),r.choice([2,3]),r.choice([2,3]),r.choice([True,False])
    if fused: return Net(attended, h=h, fused=True, qkv=nn.Linear(d,3*d), out=nn.Linear(d,d))
    return Net(attended, h=h, fused=False, q=nn.Linear(d,h*a), k=nn.Linear(d,h*a), v=nn.Linear(d,h*b), out=nn.Linear(h*b,d))

def layer(r, d):
    f,ns = r.choice([6,8]),[r.choice([nn.LayerNorm,nn.LayerNorm,lambda d: nn.Identity()])(d) for _ in range(2)]
    mlp = r.choice([nn.Sequential(nn.Linear(d,f), act(r), nn.Linear(f,d)), nn.Sequential(nn.Linear(d,2*f), nn.GLU(), nn.Linear(f,d))])
    return Net(lambda m,x: (y:=x+m.a(m.n1(x)))+m.mlp(m.n2(y)), a=attention(r, d), n1=ns[0], n2=ns[1], mlp=mlp)

def texts(r):
    d = r.choice([8,12])
    start = Net(lambda m,x: torch.cat([m.cls.expand(len(x), -1, -1), m.e(x)+m.p(torch.arange(x.shape[1]))], 1), e=nn.Embedding(13,d), p=nn.Embedding(30,d), cls=nn.Parameter(torch.zeros(1,1,d)))
    pool = r.choice([lambda m,x: x.mean(1), lambda m,x: x[:,0]])
    return nn.Sequential(start, *[layer(r, d) for _ in range(r.randint(1, 3))], Net(pool), nn.Linear(d, 3)), lambda n: torch.randint(0, 13, (2, 7+n))

@torch.no_grad()
def spoiled(m, r):
    "Random parameters and statistics; rows, columns, scales are zero here and there"
    for p in m.parameters(): p.normal_(0, .3)
    for n,b in m.named_buffers():
        if n.endswith('running_mean'): b.normal_(0, .2)
        if n.endswith('running_var'): b.uniform_(.5, 1.5)
    for o in m.modules():
        w,b,how = getattr(o, 'weight', None),getattr(o, 'bias', None),r.choice(['row','row and bias','column'])
        if w is None: continue
        gone = torch.rand(w.shape[0])<r.choice([0,.4,.7])
        if how!='column': w[gone] = 0
        elif w.dim()>1: w[:,torch.rand(w.shape[1])<.4] = 0
        if how=='row and bias' and b is not None and len(b)==len(gone): b[gone] = 0
    return m.double().eval()

def n_params(m): return sum(p.numel() for p in m.parameters())

def checked_words(m, x):
    "A smaller copy of `m`, and that there is one warning if something stays or nothing goes, and else none"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        small = (p := Pruner()).prune_model(m, x)
    texts,went = [str(o.message) for o in said],n_params(small)<n_params(m)
    left = [o for o in p.left if o['why']!=LAST or not went]
    if left: assert len(texts)==1 and 'were not removed' in texts[0]
    elif not went: assert len(texts)==1 and 'nothing to remove' in texts[0]
    else: assert not texts
    for o in left: assert o['channels']>=o['dead']>o['removed']>=0 and o['why'] and (o['layer'] in texts[0] or ' more' in texts[0])
    return small

@pytest.mark.parametrize('make', [images,texts], ids=lambda o: o.__name__)
def test_outputs_stay(make):
    saved = 0
    for seed in range(25):
        torch.manual_seed(seed)
        m,inputs = make(random.Random(seed))
        spoiled(m, random.Random(seed))
        small = checked_words(m, inputs(0))
        for n in (1,8): assert difference(m, small, inputs(n))[0]<1e-9, seed
        saved += sum(p.numel() for p in small.parameters())<sum(p.numel() for p in m.parameters())
    assert saved>12

@pytest.mark.filterwarnings('ignore:.*kept all channels')
@pytest.mark.parametrize('make', [images,texts], ids=lambda o: o.__name__)
def test_ratio_runs(make):
    smaller = 0
    for seed in range(25):
        torch.manual_seed(seed)
        r = random.Random(seed)
        m,inputs = make(r)
        x,size = inputs(0),sum(p.numel() for p in m.parameters())
        shape = m.eval().double()(x).shape
        Pruner(m, r.choice([30,60]), r.choice(['local','global']), example_inputs=x).prune_model()
        assert m(x).shape==shape
        smaller += sum(p.numel() for p in m.parameters())<size
    assert smaller>20
