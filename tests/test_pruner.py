"What may be removed from a network, and that nothing else is"
import copy,pickle,warnings
import pytest,torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune
from fasterai.core.criteria import Criteria,large_final
from fasterai.core.running import call_with
from fasterai.core.liveness import Liveness
from fasterai.core.proof import difference,random_like
from fasterai.prune.pruner import Pruner,load_pruned,pruned_plan,save_pruned
from fasterai.sparse.sparsifier import Sparsifier
from tiny import Net

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
def n_params(m): return sum(p.numel() for p in m.parameters())

@torch.no_grad()
def zero(idx, *tensors, dim=0):
    for t in tensors: t.index_fill_(dim, torch.tensor(idx), 0)

def randomized(m, seed=0):
    "All parameters random, and the statistics of normalizations"
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=gen)*.3)
        for n,b in m.named_buffers():
            if n.endswith('running_var'): b.copy_(torch.rand(b.shape, generator=gen)+.5)
            if n.endswith('running_mean'): b.copy_(torch.randn(b.shape, generator=gen)*.2)
    return m.double().eval()

def kept(small, name, dim=0, n=None):
    "Indices of the original that are left of dimension `dim` of `name`"
    plan = pruned_plan(small)['kept'].get(name, {})
    return plan[dim] if dim in plan else list(range(dict([*small.named_parameters(),*small.named_buffers()])[name].shape[dim]))

def pruned(m, inputs=None):
    "Lossless copy, checked on other inputs than `Pruner` itself used, and that `m` is what it was"
    inputs = X.double() if inputs is None else inputs
    was,hooks = copy.deepcopy({k:v for k,v in m.state_dict().items()}),[(len(o._forward_hooks),len(o._forward_pre_hooks),o.training) for o in m.modules()]
    small = Pruner().prune_model(m, inputs)
    assert m.state_dict().keys()==was.keys() and all(torch.equal(v, was[k]) for k,v in m.state_dict().items())
    assert hooks==[(len(o._forward_hooks),len(o._forward_pre_hooks),o.training) for o in m.modules()]
    for seed in (5,6): assert difference(m, small, random_like(inputs, seed))[0]<1e-10
    return small

def head(c, n=3): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n))
def conv(i, o, k=3, **kw): return nn.Conv2d(i, o, k, padding=k//2, **kw)

# figures

def test_vgg16_bn():
    m = torchvision.models.vgg16_bn(num_classes=10)
    assert n_params(m)==134_309_962
    Sparsifier(m, 'filter', 'local', large_final, nn.Conv2d).sparsify_model(40)
    small = Pruner().prune_model(m, torch.randn(1, 3, 32, 32))
    assert n_params(small)==83_975_344

# networks with known answers

def test_residual():
    m = randomized(Net(lambda m,x: m.head(F.relu(m.b1(m.c1(F.relu(m.stem(x))))+F.relu(m.stem(x)))), stem=conv(3,6), c1=conv(6,6), b1=nn.BatchNorm2d(6), head=head(6)))
    zero([1,2], m.stem.weight, m.stem.bias)
    zero([2,4], m.c1.weight, m.c1.bias, m.b1.weight, m.b1.bias)
    small = pruned(m)
    assert kept(small, 'stem.weight')==kept(small, 'c1.weight')==kept(small, 'head.2.weight', 1)==[0,1,3,4,5]

def test_inside_a_residual_block():
    m = randomized(Net(lambda m,x: m.head(m.stem(x)+m.c2(F.relu(m.c1(m.stem(x))))), stem=conv(3,4), c1=conv(4,6), c2=conv(6,4), head=head(4)))
    zero([0,5], m.c1.weight, m.c1.bias)
    assert kept(pruned(m), 'c1.weight')==[1,2,3,4]

def test_concat():
    m = randomized(Net(lambda m,x: m.head(m.c(torch.cat([F.relu(m.a(x)),m.b(x)], 1))), a=conv(3,4), b=conv(3,5), c=conv(9,4), head=head(4)))
    zero([1], m.a.weight, m.a.bias)
    zero([0,4], m.b.weight, m.b.bias)
    small = pruned(m)
    assert (kept(small, 'a.weight'),kept(small, 'b.weight'),kept(small, 'c.weight', 1))==([0,2,3],[1,2,3],[0,2,3,5,6,7])

def test_dense():
    m = randomized(Net(lambda m,x: m.head(torch.cat([(y:=m.a(x)),m.b(F.relu(y))], 1)), a=conv(3,4), b=conv(4,3), head=head(7)))
    zero([2], m.a.weight, m.a.bias)
    zero([1], m.b.weight, m.b.bias)
    assert kept(pruned(m), 'head.2.weight', 1)==[0,1,3,4,6]

def test_depthwise():
    m = randomized(nn.Sequential(conv(3,6), nn.ReLU6(), conv(6,6,groups=6), nn.BatchNorm2d(6), conv(6,5,1), head(5)))
    zero([0,3], m[0].weight, m[0].bias)
    zero([3,4], m[2].weight, m[2].bias, m[3].weight, m[3].bias)
    small = pruned(m)
    assert kept(small, '0.weight')==kept(small, '2.weight')==[1,2,5]  # of channel 0 a bias is left, which the last convolution takes over
    assert small[2].groups==small[2].in_channels==small[2].out_channels==3

def test_grouped():
    m = randomized(nn.Sequential(conv(3,8), nn.ReLU(), conv(8,6,groups=2), conv(6,4,1), head(4)))
    zero([1,5,2], m[0].weight, m[0].bias)  # 1 and 5 are at one place of both groups, 2 is alone
    zero([0,3], m[2].weight, m[2].bias)
    small = pruned(m)
    assert kept(small, '0.weight')==[0,2,3,4,6,7] and kept(small, '2.weight')==[1,2,4,5]
    assert (small[2].groups,small[2].in_channels,small[2].out_channels)==(2,6,4)

def shuffle(x, g): return x.view(x.shape[0], g, x.shape[1]//g, *x.shape[2:]).transpose(1, 2).flatten(1, 2)

def test_shuffle():
    m = randomized(Net(lambda m,x: m.head(m.b(shuffle(m.a(x), 2))), a=conv(3,8), b=conv(8,4), head=head(4)))
    zero([1,5,3], m.a.weight, m.a.bias)
    small = pruned(m)
    assert kept(small, 'a.weight')==[0,2,3,4,6,7] and small.b.in_channels==6

def test_a_shuffle_that_would_run_and_be_wrong():
    "Three shuffles of eight channels are none, three of four are one"
    m = randomized(Net(lambda m,x: m.head(shuffle(shuffle(shuffle(m.a(x), 2), 2), 2)), a=conv(3,8), head=head(8)))
    zero([1,3,5,7], m.a.weight, m.a.bias)
    with pytest.warns(UserWarning, match=r'the code of the model depends on their number \(.*test_pruner\.py') as said: assert n_params(pruned(m))==n_params(m)
    assert len(said)==1

def test_squeeze_and_excitation():
    def f(m, x):
        y = F.relu(m.bn(m.a(x)))
        return m.head(y*torch.sigmoid(m.up(F.relu(m.down(y.mean((2,3), keepdim=True))))))
    m = randomized(Net(f, a=conv(3,6), bn=nn.BatchNorm2d(6), down=conv(6,4,1), up=conv(4,6,1), head=head(6)))
    zero([0,3], m.a.weight, m.a.bias, m.bn.weight, m.bn.bias)
    zero([2], m.down.weight, m.down.bias)
    small = pruned(m)
    assert kept(small, 'a.weight')==kept(small, 'up.weight')==[1,2,4,5] and kept(small, 'down.weight')==[0,1,3]

def test_pre_activation():
    m = randomized(Net(lambda m,x: m.head((y:=m.stem(x))+m.c2(F.relu(m.b2(m.c1(F.relu(m.b1(y))))))), stem=conv(3,5), b1=nn.BatchNorm2d(5), c1=conv(5,6,bias=False), b2=nn.BatchNorm2d(6), c2=conv(6,5), head=head(5)))
    zero([1,4], m.c1.weight, m.b2.weight, m.b2.bias)
    zero([0], m.b1.weight, m.b1.bias)  # the channel itself goes on to the sum
    small = pruned(m)
    assert kept(small, 'c1.weight')==[0,2,3,5] and kept(small, 'stem.weight')==[0,1,2,3,4]

class Attention(nn.Module):
    def __init__(self, d=8, v=12, h=2):
        super().__init__()
        self.h,self.qk,self.v,self.out,self.mlp,self.last = h,nn.Linear(d,2*d),nn.Linear(d,v),nn.Linear(v,d),nn.Sequential(nn.Linear(d,12),nn.GELU(),nn.Linear(12,d)),nn.Linear(d,3)
        self.emb,self.norm = nn.Linear(8, d),nn.LayerNorm(d)
        self.dim = v//h
    def forward(self, x):
        x = self.emb(x)
        B,T,_ = x.shape
        q,k = self.qk(x).view(B, T, 2, self.h, -1).permute(2,0,3,1,4)
        v = self.v(x).view(B, T, self.h, self.dim).transpose(1, 2)
        x = x+self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, -1))
        return self.last((x+self.mlp(self.norm(x))).mean(1))

TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

def test_attention():
    m = randomized(Attention())
    zero([1,3,9], m.v.weight, m.v.bias)  # of two heads of six, 3 and 9 are at one place, 1 is alone
    zero([0,5], m.mlp[0].weight, m.mlp[0].bias)
    zero([2], m.qk.weight, m.qk.bias)
    small = pruned(m, TOKENS)
    assert kept(small, 'v.weight')==kept(small, 'out.weight', 1)==[0,1,2,4,5,6,7,8,10,11] and kept(small, 'mlp.0.weight')==[1,2,3,4,6,7,8,9,10,11]
    assert small.dim==5 and small.qk.out_features==16

def test_multihead_attention_and_layer_norm():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.)
    m = randomized(Net(lambda m,x: m.last(m.layer(x)), layer=layer, last=nn.Linear(8,2)))
    zero([0,7,9], m.layer.linear1.weight, m.layer.linear1.bias)
    small = pruned(m, TOKENS)
    assert kept(small, 'layer.linear1.weight')==[1,2,3,4,5,6,8,10,11,12,13,14,15] and small.layer.self_attn.embed_dim==8

def test_pixel_shuffle():
    m = randomized(nn.Sequential(conv(3,12), nn.PixelShuffle(2), conv(3,4), head(4)))
    zero([4,5,6,7,0], m[0].weight, m[0].bias)
    assert kept(pruned(m), '0.weight')==[0,1,2,3,8,9,10,11]

def test_transposed():
    m = randomized(nn.Sequential(conv(3,4), nn.ConvTranspose2d(4,6,2,stride=2), nn.ReLU(), nn.ConvTranspose2d(6,6,3,groups=6), nn.ConvTranspose2d(6,4,3,groups=2), head(4)))
    zero([2], m[0].weight, m[0].bias)
    zero([1,4,3], m[1].weight, dim=1)
    zero([1,4,3], m[1].bias)
    zero([1,4], m[3].weight, m[3].bias)
    small = pruned(m)
    assert kept(small, '0.weight')==[0,1,3] and kept(small, '1.weight', 1)==[0,2,3,5]
    assert (small[3].groups,small[3].in_channels,small[4].groups,small[4].in_channels)==(4,4,2,4)

@pytest.mark.parametrize('norm', [nn.InstanceNorm2d, lambda c: nn.InstanceNorm2d(c, affine=True), lambda c: nn.GroupNorm(c, c), lambda c: nn.BatchNorm2d(c, affine=False)])
def test_norms(norm):
    m = randomized(nn.Sequential(conv(3,6,bias=False), norm(6), nn.ReLU(), conv(6,4), head(4)))
    for k in ('weight','bias','running_mean'):
        if getattr(m[1], k, None) is not None: zero([1,2], getattr(m[1], k).data)
    zero([1,2], m[0].weight)
    small = pruned(m)
    assert kept(small, '0.weight')==[0,3,4,5] and 4 in (getattr(small[1], 'num_features', 0),getattr(small[1], 'num_channels', 0))

@pytest.mark.parametrize('norm', [lambda: nn.GroupNorm(2, 6), lambda: nn.GroupNorm(1, 6)])
def test_statistics_over_channels_keep_them(norm):
    m = randomized(nn.Sequential(conv(3,6), norm(), conv(6,4), head(4)))
    zero([0,3], m[0].weight, m[0].bias, m[1].weight, m[1].bias)
    assert n_params(pruned(m))==n_params(m)

def test_sum_over_channels():
    m = randomized(Net(lambda m,x: m.a(x).sum((2,3))[:,:,None].sum(1)*m.c, a=conv(3,4), c=nn.Parameter(torch.ones(1,2))))
    zero([1], m.a.weight, m.a.bias)
    m.c.requires_grad_(False)
    assert kept(pruned(m), 'a.weight')==[0,2,3]

def test_gates():
    m = randomized(nn.Sequential(nn.Linear(8,12), nn.GLU(), nn.Linear(6,3)))
    zero([1,7,2], m[0].weight, m[0].bias)  # 1 is gated by 7; 2 is zero whatever gates it
    assert kept(pruned(m, TOKENS), '0.weight')==[0,3,4,5,6,9,10,11]

@pytest.mark.parametrize('act', [nn.PReLU(6), nn.Hardswish(), nn.ELU(), nn.Tanh(), nn.Mish(), nn.Softsign(), nn.LeakyReLU(inplace=True), nn.Hardtanh(), nn.Softshrink()])
def test_activations_that_keep_zero(act):
    m = randomized(nn.Sequential(conv(3,6), act, conv(6,4), head(4)))
    zero([0,3], m[0].weight, m[0].bias)
    assert kept(pruned(m), '0.weight')==[1,2,4,5]

def test_recurrent():
    m = randomized(Net(lambda m,x: m.b(m.l(m.a(x))[0]), a=nn.Linear(8,6), l=nn.LSTM(6,5,batch_first=True), b=nn.Linear(5,3)))
    zero([1], m.a.weight, m.a.bias)
    small = pruned(m, TOKENS)
    assert kept(small, 'a.weight')==[0,2,3,4,5] and small.l.input_size==5

def test_a_sum_over_tokens_is_no_constant():
    m = randomized(Net(lambda m,x: m.o(m.n((m.k(x).transpose(1,2)@m.k(x)))), k=nn.Linear(8,4), n=nn.ReLU(), o=nn.Linear(4,3)))
    zero(list(range(4)), m.k.weight)
    small = Pruner().prune_model(m, TOKENS)
    longer = torch.cat([TOKENS,TOKENS], 1)
    assert torch.allclose(small(longer), m(longer))

# constants

def test_constants_are_folded():
    m = randomized(nn.Sequential(conv(3,5), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5,4,3,bias=False), nn.ReLU(), head(4)))
    zero([1,2], m[1].weight)
    with torch.no_grad(): m[1].bias[1],m[1].bias[2] = .7,-.7  # the second is silenced by the ReLU, so it is zero
    small = pruned(m)
    assert kept(small, '0.weight')==[0,3,4] and small[3].bias is not None
    assert torch.allclose(small[3].bias, .7*m[3].weight[:,1].sum((1,2)))

def test_constants_at_a_border_stay():
    m = randomized(nn.Sequential(conv(3,5), nn.BatchNorm2d(5), conv(5,4), head(4)))
    zero([1], m[1].weight)
    assert n_params(pruned(m))==n_params(m)

def test_a_constant_may_not_depend_on_the_size():
    "A 1x1 image is nothing but border: its constant is another one for larger images"
    m = randomized(nn.Sequential(conv(3,5), nn.BatchNorm2d(5), conv(5,5,groups=5), head(5)))
    zero([1], m[1].weight)
    small = pruned(m, torch.randn(2, 3, 1, 1, dtype=torch.float64))
    assert difference(m, small, X.double())[0]<1e-10 and n_params(small)==n_params(m)

def test_constant_through_pooling_into_a_linear():
    m = randomized(nn.Sequential(conv(3,5), nn.BatchNorm2d(5), nn.MaxPool2d(3, 2, 1), head(5)))
    zero([0,4], m[1].weight)
    small = pruned(m)
    assert kept(small, '0.weight')==[1,2,3] and difference(m, small, torch.randn(1, 3, 33, 33, dtype=torch.float64))[0]<1e-10

def test_a_layer_used_twice_sees_two_constants():
    m = randomized(Net(lambda m,x: m.fc(m.na(m.a(x.mean((2,3)))))+m.fc(m.nb(m.b(x.mean((2,3))))), a=nn.Linear(3,5), b=nn.Linear(3,5), na=nn.BatchNorm1d(5), nb=nn.BatchNorm1d(5), fc=nn.Linear(5,2)))
    zero([1,2], m.na.weight, m.nb.weight)
    with torch.no_grad(): m.na.bias[1] = m.nb.bias[1] = .5
    assert kept(pruned(m), 'fc.weight', 1)==[0,1,2,3,4] or kept(pruned(m), 'fc.weight', 1)==[0,2,3,4]

# zeros of any origin

def test_shared_kernel():
    m = randomized(nn.Sequential(conv(3,6), nn.ReLU(), conv(6,4), nn.ReLU(), head(4)))
    Sparsifier(m[2], 'shared_kernel', example_inputs=torch.randn(1,6,8,8,dtype=torch.float64)).sparsify_model(50)
    unread = (m[2].weight==0).all(3).all(2).all(0)
    small = pruned(m)
    assert unread.sum()==3 and kept(small, '0.weight')==(~unread).nonzero().flatten().tolist()

@pytest.mark.parametrize('permanent', [True,False])
def test_torch_prune(permanent):
    m = randomized(nn.Sequential(conv(3,6,bias=False), nn.ReLU(), conv(6,4), head(4)))
    prune.ln_structured(m[0], 'weight', .5, 2, dim=0)
    call_with(m, X.double())
    alive = (m[0].weight!=0).flatten(1).any(1).nonzero().flatten().tolist()
    if permanent: prune.remove(m[0], 'weight')
    small = pruned(m)
    assert kept(small, '0.weight' if permanent else '0.weight_orig')==alive and small[0].out_channels==3

def test_only_scale_and_shift_are_zero():
    m = randomized(nn.Sequential(conv(3,6), nn.BatchNorm2d(6), nn.ReLU(), conv(6,4), head(4)))
    zero([0,5], m[1].weight, m[1].bias)
    assert kept(pruned(m), '0.weight')==[1,2,3,4]

def test_never_the_last_one():
    m = randomized(nn.Sequential(conv(3,6), nn.ReLU(), conv(6,4), nn.ReLU(), head(4)))
    zero(list(range(6)), m[0].weight, m[0].bias)
    small = pruned(m)
    assert small[0].out_channels==1

def test_a_silent_relu_may_speak():
    m = randomized(nn.Sequential(conv(3,6), nn.ReLU(), conv(6,4), head(4)))
    with torch.no_grad(): m[0].bias[2] = -1e6
    assert n_params(pruned(m))==n_params(m)

# outputs, and other forms of networks

def test_head_followed_by_dropout():
    m = randomized(nn.Sequential(conv(3,4), nn.ReLU(), head(4, 10), nn.Dropout(.5)))
    zero([1,2], m[2][2].weight, m[2][2].bias)
    assert pruned(m)[2][2].out_features==10
    assert Pruner(m, 50, example_inputs=X.double()).prune_model()[2][2].out_features==10

def test_an_if_on_the_data():
    def f(m, x): return m.head(m.a(x) if x.sum()>0 else m.b(x))
    m = randomized(Net(f, a=conv(3,4), b=conv(3,4), head=head(4)))
    zero([1], m.a.weight, m.a.bias)
    with pytest.warns(UserWarning, match='unknown'): small = Pruner().prune_model(m, X.double().abs())
    assert n_params(small)==n_params(m)
    for x in (X.double().abs(),-X.double().abs()): assert torch.equal(small(x), m(x))

def test_an_if_on_the_shape():
    m = randomized(Net(lambda m,x: m.head(m.a(x) if x.shape[-1]>4 else x), a=conv(3,4), head=head(4)))
    zero([1], m.a.weight, m.a.bias)
    assert kept(pruned(m), 'a.weight')==[0,2,3]

def test_module_used_twice():
    m = randomized(Net(lambda m,x: m.head(F.relu(m.a(F.relu(m.a(m.stem(x)))))), stem=conv(3,5), a=conv(5,5), head=head(5)))
    zero([1,3], m.a.weight, m.a.bias)
    zero([3], m.stem.weight, m.stem.bias)
    small = pruned(m)
    assert kept(small, 'a.weight')==kept(small, 'stem.weight')==[0,1,2,4]

def test_tied_weights():
    m = Net(lambda m,x: m.out(F.relu(m.mid(m.emb(x)))), emb=nn.Embedding(11,6), mid=nn.Linear(6,6), out=nn.Linear(6,11,bias=False))
    m.out.weight = m.emb.weight
    randomized(m)
    zero([2], m.emb.weight, dim=1)
    zero([2,3], m.mid.weight, m.mid.bias)
    small = pruned(m, torch.randint(0, 11, (2,7)))
    assert small.out.weight is small.emb.weight and small.emb.embedding_dim==small.out.in_features==5 and kept(small, 'emb.weight', 1)==[0,1,3,4,5]

def test_dict_outputs_and_keyword_inputs():
    def f(m, *, image, scale=1.): return dict(logits=m.head(y:=F.relu(m.a(image))), extra=[m.b(y)*scale])
    m = randomized(Net(f, a=conv(3,5), b=conv(5,2), head=head(5)))
    zero([0,3], m.a.weight, m.a.bias)
    zero([1], m.b.weight, m.b.bias)
    small = pruned(m, dict(image=X.double(), scale=2.))
    assert kept(small, 'a.weight')==[1,2,4] and small.b.out_channels==2

def test_masked_tokens():
    def f(m, ids, mask): return m.out((F.relu(m.a(m.emb(ids)))*mask[...,None]).sum(1)/mask.sum(1, keepdim=True))
    m = randomized(Net(f, emb=nn.Embedding(9,4), a=nn.Linear(4,6), out=nn.Linear(6,2)))
    zero([1,5], m.a.weight, m.a.bias)
    small = pruned(m, (torch.randint(0, 9, (2,5)),torch.ones(2, 5, dtype=torch.long)))
    assert kept(small, 'a.weight')==[0,2,3,4]

def test_in_place_and_views():
    def f(m, x):
        y = m.a(x)
        y.relu_().mul_(m.s)
        if m.fill: y[:,:,0] = 1.
        return m.head(y)
    m = randomized(Net(f, a=conv(3,5), s=nn.Parameter(torch.ones(5,1,1)), head=head(5), fill=False))
    zero([1], m.a.weight, m.a.bias)
    zero([2], m.s)
    assert kept(pruned(m), 'a.weight')==[0,3,4]
    m.fill = True
    assert kept(pruned(m), 'a.weight')==[0,1,2,3,4]

def test_a_number_in_the_code():
    m = randomized(Net(lambda m,x: m.b(F.adaptive_avg_pool2d(m.a(F.relu(m.stem(x))), 2).view(-1, 5*4)), stem=conv(3,4), a=conv(4,5), b=nn.Linear(20,3)))
    zero([1], m.a.weight, m.a.bias)
    zero([0], m.stem.weight, m.stem.bias)
    small = pruned(m)
    assert small.a.out_channels==5 and kept(small, 'stem.weight')==[1,2,3]

def test_an_attribute_that_channels_only_pass():
    def f(m, x): return m.head(m.norm(m.a(x).reshape(len(x), m.width, 144).transpose(1, 2)).mean(1))
    m = randomized(Net(f, a=conv(3,8), norm=nn.LayerNorm(8), head=nn.Linear(8,3), width=8))
    Pruner(m, 50, example_inputs=X.double()).prune_model()
    assert (m.width,m.a.out_channels,m.norm.normalized_shape)==(4,4,(4,))

# safety

def test_untouched():
    m = nn.Sequential(conv(3,6), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), head(6)).train()
    m[1].eval()
    m[0].register_forward_hook(lambda *a: None)
    zero([1], m[0].weight, m[0].bias, m[1].weight, m[1].bias)
    was,rng = copy.deepcopy(m.state_dict()),torch.get_rng_state()
    small = Pruner().prune_model(m, X)
    assert [o.training for o in small.modules()]==[o.training for o in m.modules()]==[True,True,False,True,True,True,True,True,True]
    assert all(torch.equal(v, was[k]) for k,v in m.state_dict().items()) and torch.equal(rng, torch.get_rng_state()) and len(m[0]._forward_hooks)==1

def test_a_broken_cut_is_noticed(monkeypatch):
    m = randomized(nn.Sequential(conv(3,6), nn.ReLU(), conv(6,4), head(4)))
    was = copy.deepcopy(m.state_dict())
    monkeypatch.setattr(Liveness, 'dead', lambda self: self.graph.classes(self.graph.out('0.weight').ids)[:2])
    with pytest.raises(ValueError, match='outputs have changed'): Pruner().prune_model(m, X.double())
    assert all(torch.equal(v, was[k]) for k,v in m.state_dict().items())
    assert Pruner(verify=False).prune_model(m, X.double())[0].out_channels==4

# by ratio

def test_ratio_removes_the_lowest():
    m = randomized(nn.Sequential(conv(3,10), nn.BatchNorm2d(10), nn.ReLU(), conv(10,7), head(7)))
    low = set(m[0].weight.abs().flatten(1).mean(1).argsort()[:3].tolist())
    same = Pruner(m, 30, 'local', large_final, example_inputs=X.double()).prune_model()
    assert same is m and kept(m, '0.weight')==[i for i in range(10) if i not in low]
    assert (m[1].num_features,m[3].out_channels,m[4][2].out_features)==(7,5,3)

def test_ratio_scores_tied_filters_together():
    m = randomized(Net(lambda m,x: m.head(m.a(x)+m.b(x)), a=conv(3,8), b=conv(3,8,1), head=head(8)))
    rows = torch.cat([m.a.weight.abs().flatten(1),m.b.weight.abs().flatten(1)], 1).mean(1)
    Pruner(m, 50, example_inputs=X.double()).prune_model()
    assert kept(m, 'a.weight')==kept(m, 'b.weight')==rows.argsort()[4:].sort().values.tolist()

@pytest.mark.parametrize('criteria', ['squared_final','small_final','random','movement','taylor',Criteria(large_final, reducer='l2'),lambda w, w0: w.abs()-w0.abs()])
def test_any_criteria(criteria):
    m = randomized(nn.Sequential(conv(3,8), nn.ReLU(), conv(8,8), head(8)))
    p = Pruner(m, 25, 'global', criteria, example_inputs=X.double())
    m(X.double()).sum().backward()
    p.prune_model()
    assert m[0].out_channels+m[2].out_channels==12 and m[0].weight.grad.shape==m[0].weight.shape

@pytest.mark.parametrize('context', ['local','global','isomorphic','erk','uniform_plus','lamp'])
def test_any_context(context):
    m = randomized(nn.Sequential(conv(3,8), nn.ReLU(), conv(8,8), nn.ReLU(), conv(8,8), head(8)))
    Pruner(m, 25, context, example_inputs=X.double()).prune_model()
    assert sum(m[i].out_channels for i in (0,2,4))==18

def test_layers_of_one_shape_compete():
    "Those with small weights lose more, and others are not asked"
    m = randomized(nn.Sequential(conv(3,8), nn.ReLU(), conv(8,8), nn.ReLU(), conv(8,8), head(8)))
    with torch.no_grad():
        for p in m[2].parameters(): p.mul_(1e-3)
    Pruner(m, 25, 'isomorphic', example_inputs=X.double()).prune_model()
    assert [m[i].out_channels for i in (0,2,4)]==[6,4,8]

def test_global_keeps_one_of_each():
    m = randomized(nn.Sequential(conv(3,8), nn.ReLU(), conv(8,8), head(8)))
    with torch.no_grad(): m[0].weight.mul_(1e-6)
    Pruner(m, 90, 'global', example_inputs=X.double()).prune_model()
    assert (m[0].out_channels,m[2].out_channels)==(1,1)

def test_ratio_by_layer_and_ignored():
    m = randomized(nn.Sequential(conv(3,8), nn.ReLU(), conv(8,8), nn.ReLU(), conv(8,8), head(8)))
    Pruner(m, {'0':50,'2':25}, example_inputs=X.double()).prune_model()
    assert [m[i].out_channels for i in (0,2,4)]==[4,6,8]
    Pruner(m, 50, example_inputs=X.double(), ignored_layers=[m[0],'2']).prune_model()
    assert [m[i].out_channels for i in (0,2,4)]==[4,6,4]

def test_round_to():
    m = randomized(nn.Sequential(conv(3,32), nn.ReLU(), conv(32,24), head(24)))
    Pruner(m, 40, 'local', example_inputs=X.double(), round_to=8).prune_model()
    assert (m[0].out_channels,m[2].out_channels)==(24,16)

def test_layer_type():
    m = randomized(nn.Sequential(conv(3,8), nn.ReLU(), head(8, 8), nn.Linear(8,3)))
    Pruner(m, 50, example_inputs=X.double(), layer_type=nn.Linear).prune_model()
    assert (m[0].out_channels,m[2][2].out_features)==(8,4)

def test_ratio_of_attention():
    m = randomized(Attention())
    out = call_with(m, TOKENS)
    Pruner(m, 50, example_inputs=TOKENS).prune_model()
    assert m(TOKENS).shape==out.shape and m.mlp[0].out_features==6 and m.dim==3 and m.emb.out_features==4

@pytest.mark.parametrize('args,said', [((120,),'from 0 to 100'), ((-1,),'from 0 to 100'), (({'9':30},),"no layer '9'"), ((30,'golbal'),'global'), ((30,'local','large_finl'),'large_final'),
    (('30',),'percent'), ((True,),'percent')])
def test_refused_at_the_door(args, said):
    m = randomized(nn.Sequential(conv(3,8), head(8)))
    with pytest.raises(ValueError, match=said): Pruner(m, *args)

def test_refused_before_anything_changes():
    m = randomized(nn.Sequential(conv(3,8), nn.ReLU(), head(8)))
    was = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match='output of the model'): Pruner(m, {'2.2':30}, example_inputs=X.double()).prune_model()
    with pytest.raises(ValueError, match='gradients'): Pruner(m, 30, 'local', 'taylor', example_inputs=X.double()).prune_model()
    with pytest.raises(ValueError, match='at least 1'): Pruner(m, 30, round_to=0)
    with pytest.raises(ValueError, match='needs a model'): Pruner(pruning_ratio=30)
    with pytest.raises(ValueError, match="did you mean '0'|no layer"): Pruner(m, 30, ignored_layers=['00'])
    with pytest.raises(ValueError, match='may mean 30 percent .as a fraction. or 0.3 percent'): Pruner(m, .3)
    assert Pruner(m, .3, unit='fraction').pruning_ratio==30
    assert all(torch.equal(v, was[k]) for k,v in m.state_dict().items())

def test_nothing_to_remove():
    m = randomized(nn.Sequential(nn.Linear(8,3)))
    with pytest.raises(ValueError, match='no channel'): Pruner(m, 30, example_inputs=TOKENS).prune_model()
    m = randomized(Net(lambda m,x: m.b(m.a(x).view(-1, 2, 3).flatten(1)), a=nn.Linear(8,6), b=nn.Linear(6,3)))
    with pytest.warns(UserWarning, match='a kept all channels'): Pruner(m, 50, example_inputs=TOKENS[0]).prune_model()

def test_layers_that_did_not_run():
    m = randomized(Net(lambda m,x: m.head(y:=m.a(x)) if not m.training else m.aux(y), a=conv(3,4), head=head(4), aux=nn.Linear(4,2)))
    zero([1], m.a.weight, m.a.bias)
    with pytest.warns(UserWarning, match='aux did not run'): Pruner().prune_model(m, X.double())

# optimizers

@pytest.mark.parametrize('make', [lambda ps: torch.optim.SGD(ps, .01, momentum=.9), lambda ps: torch.optim.AdamW(ps, .01, amsgrad=True)])
def test_optimizer_goes_on(make):
    m = nn.Sequential(conv(3,8), nn.BatchNorm2d(8), nn.ReLU(), conv(8,8), head(8))
    opt = make(m.parameters())
    loss = m(X).square().sum()
    loss.backward()
    opt.step()
    was,grad,params = {k:v.clone() for k,v in opt.state[m[3].weight].items()},m[3].weight.grad.clone(),list(m.parameters())
    keepalive = m(X).sum()  # a graph that remembers the old shapes
    Pruner(m, 50, example_inputs=X).prune_model(optimizer=opt)
    o,i = kept(m, '3.weight'),kept(m, '3.weight', 1)
    assert all(a is b for a,b in zip(params, m.parameters())) and torch.equal(m[3].weight.grad, grad[o][:,i])
    for k,v in opt.state[m[3].weight].items(): assert torch.equal(v, was[k][o][:,i] if was[k].dim() else was[k])
    before = m[3].weight.detach().clone()
    opt.zero_grad()
    m(X).square().sum().backward()
    opt.step()
    assert not torch.equal(before, m[3].weight) and keepalive.isfinite()

def test_fastai_optimizer():
    from fastai.optimizer import Adam
    m = nn.Sequential(conv(3,8), nn.ReLU(), conv(8,8), head(8))
    opt = Adam(list(m.parameters()), lr=.01)
    m(X).sum().backward()
    opt.step()
    was = opt.state[m[2].weight]['grad_avg'].clone()
    Pruner(m, 50, example_inputs=X).prune_model(optimizer=opt)
    assert torch.equal(opt.state[m[2].weight]['grad_avg'], was[kept(m, '2.weight')][:,kept(m, '2.weight', 1)])
    opt.zero_grad()
    m(X).sum().backward()
    opt.step()

# files

def make(n=6): return randomized(nn.Sequential(conv(3,n), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n,8,3,bias=False), conv(8,8,groups=8), head(8)))

def test_save_and_load(tmp_path):
    m = make()
    zero([1], m[0].weight, m[0].bias, m[1].weight, m[1].bias)
    zero([4], m[1].weight)
    small = pruned(m)
    Pruner(small, 25, example_inputs=X.double()).prune_model()  # and once more
    small = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    assert not any('pruned' in k for k in small.state_dict())
    save_pruned(small, tmp_path/'a.safetensors')
    fresh = load_pruned(tmp_path/'a.safetensors', make())
    assert all(torch.equal(v, fresh.state_dict()[k]) and v.dtype==fresh.state_dict()[k].dtype for k,v in small.state_dict().items())
    assert torch.equal(fresh(X.double()), small(X.double())) and str(fresh)==str(small) and pruned_plan(fresh)==pruned_plan(small)
    save_pruned(fresh, tmp_path/'b.safetensors')
    assert (tmp_path/'a.safetensors').read_bytes()==(tmp_path/'b.safetensors').read_bytes()

def test_wrong_files(tmp_path):
    from safetensors.torch import save_file
    small = Pruner(make(), 50, example_inputs=X.double()).prune_model()
    save_pruned(small, tmp_path/'a.safetensors')
    for other in (make(7),nn.Sequential(conv(3,6)),nn.Linear(2,2)):
        was = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match='another architecture'): load_pruned(tmp_path/'a.safetensors', other)
        assert all(torch.equal(v, was[k]) for k,v in other.state_dict().items())
    save_file(dict(a=torch.ones(2)), tmp_path/'b.safetensors')
    with pytest.raises(ValueError, match='save_pruned'): load_pruned(tmp_path/'b.safetensors', make())
    data = (tmp_path/'a.safetensors').read_bytes()
    (tmp_path/'c.safetensors').write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match='damaged'): load_pruned(tmp_path/'c.safetensors', make())
    with pytest.raises(FileNotFoundError): load_pruned(tmp_path/'none.safetensors', make())

def test_weights_of_the_model_itself_are_counted():
    "Two of them in one module: no more channels are reported than were asked for"
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1,self.w2,self.i,self.o = nn.Parameter(torch.randn(4,16,32)),nn.Parameter(torch.randn(4,32,16)),nn.Linear(6,16),nn.Linear(16,3)
        def forward(self, x):
            x = self.i(x).relu()
            return self.o(x + torch.einsum('beh,ehd->bed', torch.einsum('bd,edh->beh', x, self.w1).relu(), self.w2).sum(1))
    p = Pruner(Experts(), 40, example_inputs=torch.randn(5,6))
    with pytest.warns(UserWarning, match='of the 26 channels that pruning_ratio 40 asks for, 14 were not removed: w1 kept all channels'): p.prune_model()
    row, = p.left
    assert (row['layer'],row['channels'],row['dead'],row['removed'])==('w1',36,14,0)
