"The channel graph on whole networks: facts known of them, and what it calls removable is removed"
import copy
import pytest,torch,torchvision
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations,prune
from torch.utils._pytree import tree_leaves,tree_map
from fasterai.core.graph import *
from fasterai.core.graph import _Trace,_empty_result
from fasterai.core.running import *
from fasterai.core.running import tensors_of

ZOO = dict(resnet18=None, vgg11_bn=None, densenet121=None, googlenet=None, inception_v3=None, mobilenet_v2=None, mobilenet_v3_small=None,
           shufflenet_v2_x1_0=None, squeezenet1_1=None, efficientnet_b0=None, regnet_y_400mf=None, convnext_tiny=None, vit_b_16=dict(image_size=32),
           swin_t=None, swin_v2_t=None, maxvit_t=None, resnext50_32x4d=None, mnasnet0_5=None)

def zoo(name):
    torch.manual_seed(0)
    kw = dict(init_weights=False) if name in ('googlenet','inception_v3','vgg11_bn') else {}
    return lively(torchvision.models.get_model(name, weights=None, num_classes=10, **kw, **(ZOO.get(name) or {})))

def lively(m):
    "`m` with no parameter at a value that would hide a mistake"
    with torch.no_grad():
        for p in m.parameters():
            if p.numel()==1 or p.std()<1e-3: p.normal_(.5, .2)
        for l in m.modules():
            if getattr(l, 'running_var', None) is not None:
                l.running_mean.normal_()
                l.running_var.uniform_(.5, 2)
    return m.eval()

# --- removal in its simplest form: slice what the graph names, and tell the modules their new sizes
def resized(l):
    "Module `l` with attributes that agree with its parameters"
    if isinstance(l, nn.modules.conv._ConvNd):
        i,o = l.weight.shape[:2] if l.transposed else l.weight.shape[1::-1]
        if l.groups>1 and l.groups==l.in_channels: l.groups = i if l.transposed else len(l.weight)*l.groups//l.out_channels
    elif isinstance(l, nn.GroupNorm) and l.weight is not None:
        if l.num_groups==l.num_channels: l.num_groups = len(l.weight)
        l.num_channels = len(l.weight)
    elif isinstance(l, (nn.LayerNorm,nn.RMSNorm)) and l.weight is not None: l.normalized_shape = tuple(l.weight.shape)
    elif isinstance(l, nn.modules.batchnorm._NormBase) and l.weight is not None: l.num_features = len(l.weight)
    elif isinstance(l, nn.MultiheadAttention): l.embed_dim,l.head_dim = l.out_proj.weight.shape[1],l.out_proj.weight.shape[1]//l.num_heads
    elif isinstance(l, nn.Transformer): l.d_model = l.encoder.layers[0].linear1.weight.shape[1]
    elif isinstance(l, nn.RNNBase): l.input_size,l.hidden_size = l.weight_ih_l0.shape[1],l.weight_hh_l0.shape[1]
    elif type(l).__name__=='VisionTransformer': l.hidden_dim = len(l.conv_proj.weight)
    elif type(l).__name__=='RelativePositionalMultiHeadAttention': l.head_dim = l.merge.weight.shape[1]//l.n_heads

def entries(m): return {**dict(m.named_parameters()), **dict(m.named_buffers())}

def at(flags, p): return flags.nonzero().flatten().to(p.device)
def shuffled(n): return torch.randperm(n, device='cpu')  # as the graph's numbers are

def deleted(m, g, dead):
    "`m` without the channels of classes `dead`"
    m,kept = copy.deepcopy(m),{}
    own,modules = entries(m),dict(m.named_modules())
    for s in g.slices: kept.setdefault((s.name,s.dim), ~torch.isin(g.classes(s.ids), dead))
    for s in g.slices: assert kept[s.name,s.dim].equal(~torch.isin(g.classes(s.ids), dead)), f'uses of {s.name} disagree'
    for (name,dim),k in kept.items():
        assert k.any(), f'nothing left of {name}'
        own[name].data = own[name].data.index_select(dim, at(k, own[name]))
    for l in m.modules(): resized(l)
    for s in g.sized: modules[s.name].normalized_shape = (int((~torch.isin(g.classes(s.ids), dead)).sum()),)
    return m

def zeroed(m, g, dead):
    "`m` with the channels of classes `dead` zero wherever they are"
    m = copy.deepcopy(m)
    for s in g.slices:
        k = torch.isin(g.classes(s.ids), dead)
        if k.any() and s.kind!='stat' and not (s.name.endswith('original1') and s.dim==0): (p := entries(m)[s.name]).data.index_fill_(s.dim, at(k, p), 0)
    return m

def run(m, g):
    with torch.no_grad(): return tensors_of(call_with(m, g.example_inputs))

def made(g):
    "Removable classes of each weight's channels"
    return {(s.name,s.dim):c[c>0] for s in g.slices if s.role=='out' for c in [g.classes(s.ids).unique()] if (c>0).sum()>1}

def check_groups(m, g, limit=None):
    "A third of the classes of each weight (or of `limit` weights), deleted or zeroed: same outputs"
    torch.manual_seed(1)
    mixed = torch.cat([g.classes(i) for i,_ in g.mixes]) if g.mixes else torch.tensor([0], device='cpu')
    todo = list(made(g).values())
    for i in shuffled(len(todo))[:limit].tolist():
        dead = todo[i][shuffled(len(todo[i]))[:max(1, len(todo[i])//3)]]
        for a,b in zip(run(zeroed(m, g, dead), g), run(deleted(m, g, dead), g)):
            assert a.shape==b.shape
            if not torch.isin(dead, mixed).any(): assert (a-b).norm()<=1e-9*a.norm()

def check_all(m, g, share):
    "About `share` of all classes at once: runs, outputs keep their shape"
    torch.manual_seed(2)
    dead = [torch.zeros(0, dtype=torch.long, device='cpu')]
    seen = torch.tensor([0], device='cpu')
    for c in sorted(made(g).values(), key=len):
        c = c[~torch.isin(c, seen)]
        dead.append(c[shuffled(len(c))[:min(int(share*len(c)+.5), len(c)-1)]] if len(c)>1 else c[:0])
        seen = torch.cat([seen,c])
    small = deleted(m, g, torch.cat(dead))
    assert [o.shape for o in run(m, g)]==[o.shape for o in run(small, g)]
    return sum(p.numel() for p in small.parameters())

# --- torchvision
FREE = dict(resnet18=2880, vgg11_bn=10944, densenet121=10240, googlenet=9584, inception_v3=18112, squeezenet1_1=2944)  # no ties but the residual ones

@pytest.mark.parametrize('name', ZOO)
def test_zoo(name, recwarn):
    m = zoo(name)
    g = ChannelGraph(m)
    assert not g.unknown and not [o for o in recwarn if 'channel graph' in str(o.message)]
    outs = torch.cat([s.ids for s in g.slices if s.role=='out'])
    last = [s for s in g.slices if s.role=='out'][-1]
    assert len(last.ids)==10 and (g.classes(last.ids)==0).all() and g.why(last.ids)==['output of the model']
    assert (g.classes(outs)==0).sum()==10*len([n for n,_ in m.named_modules() if n in ('fc','aux1','aux2','AuxLogits')] or [0]) if name!='swin_v2_t' else True  # nothing but the outputs is pinned; swin_v2's heads are
    if name in FREE: assert len(g.classes(outs).unique())-1==FREE[name]
    n = sum(p.numel() for p in m.parameters())
    assert check_all(m, g, .3)<.85*n
    assert not g.unused  # auxiliary heads, which run in training, among what is known
    if n<2.4e7: check_groups(m.double(), ChannelGraph(m), 2)

def test_resnet18():
    m = zoo('resnet18')
    g = ChannelGraph(m, torch.randn(2,3,224,224))
    outs = torch.cat([s.ids for s in g.slices if s.role=='out'])
    assert len(outs)==4810 and len(g.roots(outs).unique())==2890
    assert g.order[:4]==['conv1','bn1','layer1.0.conv1','layer1.0.bn1'] and g.order[-1]=='fc'
    assert sum(g.macs().values())==1_814_073_344-990*512
    first = g.describe()[0]
    assert first['made_by']==['conv1','layer1.0.conv2','layer1.1.conv2'] and first['classes']==64 and first['removable']

@pytest.mark.parametrize('name', ['resnet18','googlenet'])
def test_following_is_its_batchnorm(name):
    m = zoo(name)
    g = ChannelGraph(m)
    for n,l in m.named_modules():
        if not isinstance(l, nn.Conv2d) or n.startswith('aux'): continue
        norm = n.replace('conv','bn') if name=='resnet18' else n.rsplit('conv', 1)[0]+'bn'
        if 'downsample' in n: norm = n[:-1]+'1'
        rows = torch.arange(l.out_channels, device='cpu')
        assert [(k,r.tolist()) for k,r in g.following(n+'.weight')]==[(norm+o,rows.tolist()) for o in ('.weight','.bias')]

def test_following_through_concatenations():
    g = ChannelGraph(zoo('densenet121'))
    at = 'features.denseblock1.denselayer'
    assert [n for n,_ in g.following(at+'6.conv1.weight')]==[at+'6.norm2.weight',at+'6.norm2.bias']
    rows = dict(g.following(at+'5.conv2.weight'))
    assert list(rows)==[at+'6.norm1.weight',at+'6.norm1.bias','features.transition1.norm.weight','features.transition1.norm.bias']
    for r in rows.values(): assert r.equal(64+4*32+torch.arange(32, device='cpu'))

def test_following_makes_zero_filters_silent():
    "The channel of a zeroed filter is exactly zero after its normalization, so that nothing reads anything from it"
    m = zoo('googlenet')
    g = ChannelGraph(m)
    w = dict(m.named_parameters())['inception3a.branch2.1.conv.weight']
    seen = []
    m.inception3a.branch2[1].register_forward_hook(lambda l,i,o: seen.append(o))
    with torch.no_grad():
        w[[3,5]] = 0
        for n,rows in g.following(w): m.get_parameter(n)[rows[[3,5]]] = 0
    run(m, g)
    assert not seen[0][:,[3,5]].any() and seen[0].any()

# --- small networks
class Net(nn.Module):
    def __init__(self, f, **layers):
        super().__init__()
        self.f = f
        for k,v in layers.items(): setattr(self, k, v)
    def forward(self, *args, **kwargs): return self.f(self, *args, **kwargs)

class Attention(nn.Module):
    "As in vision transformers: `kind` of product, one projection or three, of the input's width or their own"
    def __init__(self, d, h, hd=None, fused=True, kind='sdpa'):
        super().__init__()
        self.h,self.fused,self.kind,n = h,fused,kind,h*(hd or d//h)
        self.qkv = nn.Linear(d, 3*n) if fused else nn.ModuleList(nn.Linear(d, n) for _ in range(3))
        self.proj = nn.Linear(n, d)
    def forward(self, x):
        b,n,c = x.shape
        if self.fused: q,k,v = self.qkv(x).reshape(b, n, 3, self.h, -1).permute(2,0,3,1,4)
        else: q,k,v = (l(x).view(b, n, self.h, -1).transpose(1, 2) for l in self.qkv)
        if self.kind=='sdpa': o = F.scaled_dot_product_attention(q, k, v)
        elif self.kind=='einsum': o = torch.einsum('bhnm,bhmd->bhnd', torch.einsum('bhnd,bhmd->bhnm', q, k).softmax(-1), v)
        elif self.kind=='cosine': o = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2,-1)).softmax(-1) @ v
        elif self.kind=='channels': o = ((q.transpose(-2,-1) @ k).softmax(-1) @ v.transpose(-2,-1)).transpose(-2,-1)
        return x + self.proj(o.transpose(1, 2).flatten(2))

class Norm2d(nn.Module):
    "A LayerNorm over channels written by hand"
    def __init__(self, n):
        super().__init__()
        self.weight,self.bias = nn.Parameter(torch.ones(n)),nn.Parameter(torch.zeros(n))
    def forward(self, x):
        u = x.mean(1, keepdim=True)
        return self.weight[:,None,None]*((x-u)/torch.sqrt((x-u).pow(2).mean(1, keepdim=True)+1e-6)) + self.bias[:,None,None]

def C(i, o, k=3, **kw): return nn.Conv2d(i, o, k, padding=k//2, **kw)
def P(*n): return nn.Parameter(torch.randn(*n))
def blow(x, r):
    n,c,h,w = x.shape
    return x.view(n, c//r**2, r, r, h, w).permute(0,1,4,2,5,3).reshape(n, c//r**2, h*r, w*r)
def assigned(s, x):
    x,y = s.a(x),torch.zeros(len(x), 8, 8, 8, dtype=x.dtype)
    y[:,:8] = x
    return s.head(y.mean((2,3)))
def pruned():
    m = nn.Sequential(C(3,8), nn.ReLU(), C(8,6), nn.Flatten(), nn.Linear(6*64,3))
    prune.ln_structured(m[0], 'weight', .5, 2, 0)
    return prune.l1_unstructured(m[2], 'weight', .5) and m

img,seq,ids,head = torch.randn(2,3,8,8),torch.randn(2,7,5),torch.randint(0, 11, (2,9)),lambda n: nn.Linear(n,3)
def SMALL(): return dict(  # network, input, classes that can be removed of each weight's channels
    transposed=(nn.Sequential(C(3,8), nn.ConvTranspose2d(8,6,2,2), nn.BatchNorm2d(6), nn.ConvTranspose2d(6,12,2,2,groups=3),
                              nn.ConvTranspose2d(12,12,3,groups=12), C(12,4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(4)), img, [8,2,4,4,4,0]),
    depth_multiplier=(nn.Sequential(C(3,4), C(4,12,groups=4), C(12,5), nn.Flatten(), head(320)), img, [4,4,5,0]),
    pixel_shuffle=(nn.Sequential(C(3,16), nn.PixelShuffle(2), C(4,8), nn.PixelUnshuffle(2), C(32,4), nn.Flatten(), head(256)), img, [4,8,4,0]),
    pixel_shuffle_by_hand=(Net(lambda s,x: s.head(s.b(blow(s.a(x), 2)).mean((2,3))), a=C(3,16), b=C(4,6), head=head(6)), img, [4,6,0]),
    channel_shuffle=(nn.Sequential(C(3,12), nn.ChannelShuffle(3), C(12,6), nn.Flatten(), head(384)), img, [4,6,0]),
    norms=(nn.Sequential(C(3,8), nn.PReLU(8), C(8,6), nn.GroupNorm(3,6), C(6,6), nn.GroupNorm(6,6), C(6,5), nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
                         nn.Flatten(), head(320)), img, [8,2,6,5,0]),
    norms_without_parameters=(nn.Sequential(nn.Linear(5,8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8,6), nn.RMSNorm(6), head(6)), seq, [8,6,0]),
    norm_by_hand=(nn.Sequential(C(3,8), Norm2d(8), C(8,6), nn.Flatten(), head(384)), img, [8,6,0]),
    frozen_norm=(nn.Sequential(C(3,8), torchvision.ops.FrozenBatchNorm2d(8), C(8,6), nn.Flatten(), head(384)), img, [8,6,0]),
    conv1d=(nn.Sequential(nn.Conv1d(5,8,3,padding=1), nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.Conv1d(8,6,3,groups=2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), head(6)),
            torch.randn(2,5,20), [4,3,0]),
    conv3d=(nn.Sequential(nn.Conv3d(3,8,3), nn.BatchNorm3d(8), nn.AvgPool3d(2), nn.Conv3d(8,6,1), nn.Flatten(), head(6*27)), torch.randn(2,3,8,8,8), [8,6,0]),
    unet=(Net(lambda s,x: (lambda h: s.o(F.relu(s.c(torch.cat([h,s.u(F.relu(s.b(h)))], 1)))))(s.a(x)), a=C(3,8), b=C(8,12,stride=2),
              u=nn.ConvTranspose2d(12,8,2,2), c=C(16,6), o=C(6,2)), img, [8,12,8,6,0]),
    pyramid=(Net(lambda s,x: (lambda h: s.o(F.interpolate(s.l2(s.b(h)), scale_factor=2)+s.l1(h)))(s.a(x)), a=C(3,8), b=C(8,12,stride=2), l1=C(8,6,1), l2=C(12,6,1),
                 o=C(6,5)), img, [8,12,6,6,0]),
    padded_shortcut=(Net(lambda s,x: (lambda h: s.head(s.c(F.pad(h,(0,0,0,0,2,2))+s.b(h)).mean((2,3))))(s.a(x)), a=C(3,8), b=C(8,12), c=C(12,12), head=head(12)),
                     img, [8,8,12,0]),
    spatial_attention=(Net(lambda s,x: (lambda h: s.head((h*s.g(torch.cat([h.mean(1, keepdim=True),h.amax(1, keepdim=True)], 1)).sigmoid()).mean((2,3))))(s.a(x)),
                           a=C(3,8), g=C(2,1,7), head=head(8)), img, [8,0]),
    gated=(Net(lambda s,x: (lambda p: s.head(F.silu(p[0])*p[1]))(s.a(x).chunk(2, -1)), a=nn.Linear(5,16), head=head(8)), seq, [8,0]),
    glu=(nn.Sequential(nn.Linear(5,16), nn.GLU(), nn.Linear(8,6), head(6)), seq, [8,6,0]),
    uneven=(Net(lambda s,x: (lambda p: s.head(p[0])+s.more(p[1]))(s.a(x).split([6,10], -1)), a=nn.Linear(5,16), head=head(6), more=head(10)), seq, [0,0,0]),
    halves=(Net(lambda s,x: (lambda h: s.head(torch.cat([h[:,:4],s.b(h[:,4:])], 1).mean((2,3))))(s.a(x)), a=C(3,8), b=C(4,4), head=head(8)), img, [4,4,0]),
    four_steps=(Net(lambda s,x: (lambda p: s.head(s.o(torch.cat([p[0],s.b(p[1]),s.c(p[2]+p[3])], 1)).mean((2,3))))(s.a(x).chunk(4, 1)), a=C(3,12), b=C(3,3), c=C(3,3),
                   o=C(9,4), head=head(4)), img, [3,3,3,4,0]),
    moved=(Net(lambda s,x: (lambda h: s.head(h.repeat(1,2,1,1).mean((2,3)).view(2,2,-1).sum(1)))((lambda h: h.roll(2, 2)+s.b(h).flip(1))(s.a(x))), a=C(3,8), b=C(8,8),
               head=head(8)), img, [8,8,0]),
    rolled=(Net(lambda s,x: s.head(s.a(x).roll(1, 1).mean((2,3))), a=C(3,8), head=head(8)), img, [0,0]),
    picked=(Net(lambda s,x: s.head(s.a(x)[:,[1,0,2,3]].mean((2,3))), a=C(3,4), head=head(4)), img, [0,0]),
    strided=(Net(lambda s,x: s.head(s.a(x).as_strided((2,8,4,8), (512,64,16,1)).mean((2,3))), a=C(3,8), head=head(8)), img, [0,0]),
    in_place=(Net(lambda s,x: (lambda h: (h.add_(s.b(x)),h.view(2,8,-1).relu_(),s.head(h.mean((2,3))))[-1])(s.a(x)), a=C(3,8), b=C(3,8), head=head(8)), img, [8,8,0]),
    assigned=(Net(assigned, a=C(3,8), head=head(8)), img, [0,0]),
    numpy=(Net(lambda s,x: s.head(torch.from_numpy(s.a(x).detach().cpu().numpy()*2).to(x.device).mean((2,3))), a=C(3,8), head=head(8)), img, [0,0]),
    bilinear=(Net(lambda s,x: s.head(s.c(s.a(x),s.b(x))), a=nn.Linear(5,8), b=nn.Linear(5,6), c=nn.Bilinear(8,6,4), head=head(4)), seq, [0,0,0]),
    weight_norm=(nn.Sequential(parametrizations.weight_norm(C(3,8)), nn.ReLU(), parametrizations.weight_norm(C(8,6)), nn.Flatten(), head(384)), img, [8,8,6,6,0]),
    spectral_norm=(nn.Sequential(parametrizations.spectral_norm(C(3,8)), nn.ReLU(), C(8,6), nn.Flatten(), head(384)), img, [0,6,0]),
    masked=(pruned(), img, [8,8,6,6,0]),
    tied=(Net(lambda s,i: (lambda h: F.linear(h+s.b(F.gelu(s.a(s.n(h)))), s.e.weight))(s.e(i)+s.p(torch.arange(i.shape[1]))), e=nn.Embedding(11,12), p=nn.Embedding(9,12),
              n=nn.LayerNorm(12), a=nn.Linear(12,20), b=nn.Linear(20,12)), ids, [12,12,20,12,0]),
    positions=(Net(lambda s,x: (lambda h: s.head((h+s.g*s.l(h))[:,0]))(torch.cat([s.cls.expand(len(x),-1,-1),s.e(x)], 1)+s.p), e=nn.Linear(5,12), cls=P(1,1,12), p=P(1,8,12),
                   g=P(12), l=nn.Linear(12,12), head=head(12)), seq, [12,12,0]),
    mixer=(Net(lambda s,x: (lambda h: (lambda h: s.head((h+s.b(F.relu(s.a(h)))).mean(1)))(h+s.u(F.relu(s.t(h.transpose(1,2)))).transpose(1,2)))(s.e(x)), e=nn.Linear(5,12),
               t=nn.Linear(7,6), u=nn.Linear(6,7), a=nn.Linear(12,9), b=nn.Linear(9,12), head=head(12)), seq, [12,6,0,9,12,0]),
    queries=(Net(lambda s,x: s.head(s.q+(s.wq(s.q)[None].expand(2,-1,-1) @ s.k(x).transpose(1,2)).softmax(-1) @ s.v(x)), q=P(4,8), wq=nn.Linear(8,6), k=nn.Linear(5,6),
                 v=nn.Linear(5,8), head=head(8)), seq, [8,6,6,8,0]),
    lstm=(Net(lambda s,x: s.head(s.r(s.e(x))[0]), e=nn.Linear(5,6), r=nn.LSTM(6,8,batch_first=True), head=head(8)), seq, [6,8,8,0]),
    encoder=(nn.Sequential(nn.Linear(5,16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), head(16)), seq, [4,4,4,32,4,0]),
    transformer=(Net(lambda s,x: s.head(s.t(s.e(x),s.e(x))), e=nn.Linear(5,16), t=nn.Transformer(16, 4, 1, 1, 32, batch_first=True), head=head(16)), seq, None),
    other_widths=(Net(lambda s,x: (lambda h: s.head(s.t(h, s.k(x), s.v(x))[0]))(s.e(x)), e=nn.Linear(5,16), k=nn.Linear(5,6), v=nn.Linear(5,10),
                      t=nn.MultiheadAttention(16, 4, kdim=6, vdim=10, batch_first=True), head=head(16)), seq, [16//4,6,10,4,4,4,16,0]),
    **{f'attention_{k}_{f}':(nn.Sequential(nn.Linear(5,16), Attention(16, 4, None, f, k), head(16)), seq, [4,*[4]*(1 if f else 3),4,0])
       for k in ('sdpa','einsum','cosine','channels') for f in (True,False)},
    attention_of_own_width=(nn.Sequential(nn.Linear(5,10), Attention(10, 3, 4, False), head(10)), seq, [10,4,4,4,10,0]),
)

@pytest.mark.parametrize('name', SMALL())
def test_small(name):
    torch.manual_seed(0)
    m,x,expected = SMALL()[name]
    m,x = lively(m).double(),x.double() if x.is_floating_point() else x
    before = copy.deepcopy(m.state_dict())
    g = ChannelGraph(m, x)
    assert all(torch.equal(before[k], v) for k,v in m.state_dict().items())
    found = [int((g.classes(s.ids).unique()>0).sum()) for s in g.slices if s.role=='out']
    if expected is not None: assert found==expected
    check_groups(m, g)
    check_all(m, g, .5)

# --- inputs and what must not change
@pytest.mark.parametrize('inputs', [torch.randn(1,3,8,8), (torch.randn(1,3,8,8),), dict(image=torch.randn(1,3,8,8))], ids=['tensor','tuple','dict'])
def test_inputs(inputs):
    m = Net(lambda s,image,scale=2.: s.head(s.a(image.mul_(scale)).mean((2,3))), a=C(3,8), head=head(8))
    was = tree_map(torch.clone, inputs)
    g = ChannelGraph(m, inputs)
    assert len(g.classes(g.out('a.weight').ids).unique())==8
    assert all(map(torch.equal, tensors_of(was), tensors_of(inputs)))

def test_nothing_changes():
    class Busy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.bn,self.emb = C(3,4),nn.BatchNorm2d(4, momentum=None),nn.Embedding(4, 4, max_norm=.1)
            self.register_buffer('calls', torch.zeros(()))
        def forward(self, x, fail=False):
            self.calls = self.calls+1
            x = self.bn(self.conv(x)) + self.emb(torch.zeros(1, dtype=torch.long)).view(1,4,1,1)*torch.rand(1)
            return x/0 if not fail else x.nothing
    m,rng = Busy(),torch.get_rng_state()
    m.conv.eval(); m.bn.weight.requires_grad_(False)
    m.conv.weight.grad = torch.ones_like(m.conv.weight)
    state = lambda: ([(k,v.clone()) for k,v in entries(m).items()], [o.training for o in m.modules()], [p.requires_grad for p in m.parameters()],
                     [len(o._forward_hooks)+len(o._forward_pre_hooks) for o in m.modules()], m.emb.max_norm, torch.backends.mha.get_fastpath_enabled(),
                     torch.is_grad_enabled())
    was = state()
    ChannelGraph(m)
    with pytest.raises(ValueError, match='does not run where its channels are followed .AttributeError'): ChannelGraph(m, dict(x=img, fail=True))
    now = state()
    assert all(k==j and torch.equal(v,w) for (k,v),(j,w) in zip(was[0], now[0])) and was[1:]==now[1:]
    assert torch.equal(rng, torch.get_rng_state()) and m.conv.weight.grad.eq(1).all()
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks

def test_half_and_scripted():
    m = nn.Sequential(C(3,8), nn.BatchNorm2d(8), nn.ReLU(), C(8,4)).eval()
    for o in (m, copy.deepcopy(m).to(torch.bfloat16), torch.jit.script(m)):
        g = ChannelGraph(o, img.to(next(o.parameters()).dtype))
        assert [len(s.ids) for s in g.slices if s.role=='out' and g.classes(s.ids).all()]==[8]

def test_lazy_and_wrong_names():
    with pytest.raises(ValueError, match='0.weight'): ChannelGraph(nn.Sequential(nn.LazyLinear(3)))
    g = ChannelGraph(nn.Sequential(C(3,8), C(8,4)))
    for f in (g.following, g.out, lambda o: g.tied([o])):
        with pytest.raises(ValueError, match='0.weight'): f('O.weight')

@pytest.mark.parametrize('m,shape', [(nn.Sequential(nn.Linear(4,2)),(2,4)), (nn.Sequential(nn.Conv1d(4,2,3)),(2,4,32)), (nn.Sequential(nn.Embedding(4,2)),(2,8)),
    (nn.Sequential(nn.Conv2d(1,2,5), nn.Flatten(), nn.Linear(2*24*24,2)),(2,1,28,28)), (nn.Sequential(nn.Flatten(), nn.Linear(784,2)),(2,784)),
    (nn.GRU(4,2),(2,16,4)), (nn.TransformerEncoderLayer(8,2),(2,16,8)), (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3,2,40)),(2,3,64,64))], ids=str)
def test_example_inputs(m, shape): assert example_inputs_for(m)[0].shape==shape

X = torch.randn(2, 4, 9, 7)
@pytest.mark.parametrize('f', [lambda: F.max_pool2d(X, 3, 2, 1), lambda: F.max_pool2d(X, 2, dilation=2, return_indices=True), lambda: F.max_pool2d(X, 2, ceil_mode=True),
    lambda: F.max_pool3d(X, 2, 1), lambda: F.avg_pool2d(X, (3,2), 1, 1), lambda: F.avg_pool1d(X[0], 3), lambda: F.avg_pool3d(X, 2), lambda: X.softmax(-2), lambda: X.log_softmax(0),
    lambda: torch.cat([X,X[:,:1]], -3), lambda: torch.cat([X,X.double()], 1), lambda: F.layer_norm(X, (9,7)), lambda: F.layer_norm(X, (7,), torch.ones(7), torch.ones(7)),
    lambda: X.mT.contiguous(), lambda: F.batch_norm(X, torch.zeros(4), torch.ones(4)), lambda: F.relu6(X), lambda: F.conv2d(X, torch.ones(6,2,3,3), None, 2, 1, 2, 2), lambda: X@X.mT])
def test_blanks_are_like_results(f):
    "What is not computed has the shape, type and strides of what would be"
    class Same(_Trace):
        def compute(self, call, func, args, kwargs):
            blank,result = _empty_result(call, self.blanks.like),func(*args, **kwargs)
            for a,b in zip(tree_leaves(blank), tree_leaves(result)):
                if a is not None and a.numel(): assert (a.shape,a.dtype,a.stride())==(b.shape,b.dtype,b.stride())
            self.known.append(blank is not None)
            return result
    trace = Same(nn.Identity())
    trace.known = []
    with trace: f()
    assert trace.known

@pytest.mark.parametrize('f', [lambda x: x.softmax(4), lambda x: torch.cat([x,x[:,:,1:]], 1), lambda x: F.max_pool2d(x, 2, padding=2), lambda x: F.avg_pool2d(x, 99),
    lambda x: F.layer_norm(x, (3,))])
def test_mistakes_are_told_as_they_are(f):
    class Wrong(nn.Sequential):
        def forward(self, x): return f(super().forward(x))
    m = Wrong(nn.Conv2d(3,4,3))
    with pytest.raises(Exception) as plain: m(torch.randn(1,3,9,9))
    with pytest.raises(ValueError) as told: ChannelGraph(m, torch.randn(1,3,9,9))
    assert str(plain.value).partition('\n')[0] in str(told.value)
