"Patterns met in networks that nobody here developed on"
import copy,warnings
import pytest,torch
import torch.nn.functional as F
from torch import nn
from fasterai.core.graph import ChannelGraph
from fasterai.core.running import call_with
from fasterai.core.proof import difference
from fasterai.prune.pruner import Pruner,load_pruned,pruned_plan,save_pruned
from test_pruner import Net,X,conv,head,kept,n_params,pruned,randomized,zero
from tiny import warnings_are

XD = X.double()

# the model asks for values

def masked(m, x, mask):
    y = F.relu(m.a(x))
    if not mask.all(): y = y*mask[...,None]
    return m.b(y)

def test_both_answers_to_a_question_agree():
    m = randomized(Net(masked, a=nn.Linear(5,6), b=nn.Linear(6,2)))
    zero([1,4], m.a.weight, m.a.bias)
    x,mask = torch.randn(2, 7, 5, dtype=torch.float64),torch.ones(2, 7, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small = Pruner().prune_model(m, (x,mask))
    assert small.a.out_features==4
    for o in (mask,torch.rand(2, 7)<.5): assert difference(m, small, (x,o))[0]<1e-12

def test_answers_that_disagree_keep_the_channel():
    def f(m, x):
        y = m.a(x)
        return m.b(y if x.sum()>0 else y+1)
    m = randomized(Net(f, a=nn.Linear(5,6), b=nn.Linear(6,2)))
    zero([1,4], m.a.weight, m.a.bias)
    small = Pruner().prune_model(m, XD[:,0,:5,0].abs())
    assert small.a.out_features==6
    for x in (XD[:,0,:5,0].abs(),-XD[:,0,:5,0].abs()): assert difference(m, small, x)[0]<1e-12

def test_inputs_that_are_refused_are_no_answer():
    def f(m, x):
        if x.isnan().any(): raise ValueError('not a number')
        return m.b(F.relu(m.a(x)))
    m = randomized(Net(f, a=nn.Linear(5,6), b=nn.Linear(6,2)))
    zero([1,4], m.a.weight, m.a.bias)
    assert Pruner().prune_model(m, XD[:,0,:5,0]).a.out_features==4

def detect(m, x):
    y = m.c(F.relu(m.b(F.relu(m.a(x))))).flatten(2)
    return [o[:,o[0]>0] for o in y]

def test_what_is_let_go_before_a_question_cannot_be_read_otherwise():
    "As in detection: how many boxes there are depends on the image"
    m = randomized(Net(detect, a=conv(3,6), b=conv(6,5), c=conv(5,4)))
    zero([0,3], m.a.weight, m.a.bias)
    zero([2], m.b.weight, m.b.bias)
    with warnings_are('error'): small = Pruner().prune_model(m, XD)  # all went: there is nothing to tell
    assert (small.a.out_channels,small.b.out_channels)==(4,4)
    for n in (9,17): assert difference(m, small, torch.randn(2, 3, n, n, dtype=torch.float64))[0]<1e-12
    m = m.float()
    Pruner(m, 50, example_inputs=X).prune_model()
    assert m.a.out_channels==3 and [o.shape[0] for o in m(X)]==[4,4]

def test_what_is_held_at_a_question_may_be_read_otherwise():
    def f(m, x):
        y = m.a(x)
        n = int((x>0).sum())
        return m.b(y if n>3 else y+n+1)
    m = randomized(Net(f, a=nn.Linear(5,6), b=nn.Linear(6,2)))
    zero([1,4], m.a.weight, m.a.bias)
    x = XD[:,0,:5,0].abs()
    with pytest.warns(UserWarning, match='asks for their values'): small = Pruner().prune_model(m, x)
    for o in (x,-x): assert difference(m, small, o)[0]<1e-12

def test_order_of_equal_findings_is_no_change():
    def f(m, x):
        y = m.b(F.relu(m.a(x))).flatten(1)
        y = y[:,(y[0]*1e12).round()%2==0]  # what rounding decides
        return y
    m = randomized(Net(f, a=conv(3,6), b=conv(6,4)))
    zero([0,3], m.a.weight, m.a.bias)
    small = Pruner().prune_model(m, XD)
    assert small.a.out_channels==4

# training does more

def aux(m, x):
    a = m.a(x)
    y = m.head(m.b(a))
    return (y,m.aux(a.mean((2,3)))) if m.training else y

@pytest.mark.parametrize('ratio', [None,50])
def test_auxiliary_head_of_training_fits(ratio):
    m = randomized(Net(aux, a=nn.Sequential(conv(3,8),nn.BatchNorm2d(8),nn.ReLU()), b=conv(8,6), head=head(6), aux=nn.Sequential(nn.Linear(8,4),nn.Dropout(),nn.Linear(4,3))))
    was = copy.deepcopy(m.state_dict())
    zero([1,2], m.a[0].weight, m.a[0].bias, m.a[1].weight, m.a[1].bias)
    small = pruned(m) if ratio is None else Pruner(m, ratio, example_inputs=XD).prune_model()
    assert small.aux[0].in_features==small.a[0].out_channels==(6 if ratio is None else 4)
    y,z = small.train()(XD)
    assert z.shape==(2,3)
    (y.sum()+z.sum()).backward()

@pytest.mark.parametrize('dropout', [F.dropout, lambda y: torch.native_dropout(y, .5, True)[0]], ids=['function','as on a GPU'])
def test_random_regularization_of_training_is_known(dropout):
    def f(m, x):
        y = m.a(x)
        if m.training: y = y*torch.empty(len(y), 1, 1, 1).bernoulli_(.5).to(y) + 0*m.aux(dropout(y)).mean()
        return m.head(y)
    m = randomized(Net(f, a=conv(3,8), aux=conv(8,2), head=head(8)))
    Pruner(m, 50, example_inputs=XD).prune_model()
    assert m.a.out_channels==m.aux.in_channels==4
    m.train()(XD)

# the code counts on sizes

def test_a_fixed_split_keeps_only_what_it_splits():
    def f(m, x):
        a,b = m.a(x).chunk(2, 1)
        a,b = m.b(torch.max(a, b)).split(6, 1)  # six, whatever comes
        return m.head(torch.max(a, b))
    m = randomized(Net(f, a=conv(3,16), b=conv(8,12), head=head(6)))
    zero([1,9], m.a.weight, m.a.bias)
    zero([2,8], m.b.weight, m.b.bias)
    small = pruned(m)
    assert (small.a.out_channels,small.b.out_channels)==(14,12)
    with pytest.warns(UserWarning, match='b kept all channels'): Pruner(m, 50, example_inputs=XD).prune_model()
    assert (m.a.out_channels,m.b.out_channels)==(8,12) and call_with(m, XD).shape==(2,3)

# operations

def test_what_a_recurrent_layer_reads():
    m = Net(lambda m,x: m.fc(m.l(m.c(x).transpose(1,2))[0][:,-1]), c=nn.Conv1d(3,8,3), l=nn.LSTM(8,5,batch_first=True,bidirectional=True), fc=nn.Linear(10,2)).eval()
    x = torch.randn(2, 3, 12)
    zero([1,6], m.c.weight, m.c.bias)
    small = Pruner().prune_model(m, x)
    assert small.l.input_size==6 and difference(m, small, torch.randn(3, 3, 20))[0]<1e-5
    Pruner(m, 50, example_inputs=x).prune_model()
    assert m.l.input_size==m.c.out_channels==4
    m.train()(x).sum().backward()

class Standardized(nn.Conv2d):
    def forward(self, x):
        O = len(self.weight)
        w = F.batch_norm(self.weight.view(1, O, -1), None, None, weight=self.gain.view(-1)*.5, training=True).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, 1, 1)
def standardized(i, o):
    m = Standardized(i, o, 3)
    m.gain = nn.Parameter(torch.ones(o,1,1,1))
    return m

def test_a_standardized_weight():
    m = randomized(nn.Sequential(standardized(3,8), nn.ReLU(), standardized(8,6), nn.ReLU(), head(6)))
    zero([1,3], m[0].gain, m[0].bias)
    zero([2,5], m[2].gain, m[2].bias)
    small = pruned(m)  # what a standardized filter reads is part of its mean
    assert (small[0].out_channels,small[2].out_channels)==(8,4) and small[2].gain.shape[0]==4
    Pruner(m, 50, example_inputs=XD).prune_model()
    assert (m[0].out_channels,m[2].out_channels)==(4,3) and m(XD).shape==(2,3)

@pytest.mark.parametrize('norm', [nn.utils.parametrizations.weight_norm,nn.utils.weight_norm])
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_a_weight_with_a_norm_of_its_own(norm, tmp_path):
    make = lambda: nn.Sequential(norm(conv(3,8)), nn.ReLU(), head(8))
    m = randomized(make())
    g = m[0].parametrizations.weight.original0 if norm is nn.utils.parametrizations.weight_norm else m[0].weight_g
    zero([1,3], g, m[0].bias)
    small = pruned(m, XD)
    assert small[0].out_channels==6
    save_pruned(small, tmp_path/'a')
    assert difference(small, load_pruned(tmp_path/'a', make().double().eval()), XD)[0]<1e-12

def test_one_transposed_output_channel():
    m = randomized(nn.Sequential(conv(3,8), nn.ReLU(), nn.ConvTranspose2d(8,1,2,2)))
    zero([1,3], m[0].weight, m[0].bias)
    assert pruned(m)[2].in_channels==6

def edges(m, x):
    "Of a graph of nearest neighbours: `gather`, `cdist`, `topk`"
    y = m.a(x)
    at = torch.cdist(y.transpose(1,2), y.transpose(1,2)).topk(3, largest=False).indices
    near = torch.gather(y[...,None].expand(-1,-1,-1,3), 2, at[:,None].expand(-1,y.shape[1],-1,-1))
    return m.fc(m.b(near-y[...,None]).max(-1)[0].amax(2))

def test_neighbours():
    m = randomized(Net(edges, a=nn.Conv1d(3,8,1), b=nn.Conv2d(8,6,1), fc=nn.Linear(6,2)))
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    zero([1,4], m.b.weight, m.b.bias)
    assert Pruner().prune_model(m, x).b.out_channels==4
    Pruner(m, 50, example_inputs=x).prune_model()
    assert (m.a.out_channels,m.b.out_channels)==(4,3) and m(torch.randn(1, 3, 15, dtype=torch.float64)).shape==(1,2)

def experts(m, x):
    y = F.relu(m.a(x))
    w,at = m.gate(y).softmax(-1).topk(2, -1)
    out = torch.zeros_like(y)
    for i,e in enumerate(m.experts):
        rows,k = (at==i).nonzero(as_tuple=True)
        if len(rows): out.index_add_(0, rows, e(y[rows])*w[rows,k,None])
    return m.fc(out+y)

def test_experts():
    m = randomized(Net(experts, a=nn.Linear(5,8), gate=nn.Linear(8,3), experts=nn.ModuleList(nn.Sequential(nn.Linear(8,6),nn.GELU(),nn.Linear(6,8)) for _ in range(3)), fc=nn.Linear(8,2)))
    x = torch.randn(20, 5, dtype=torch.float64)
    Pruner(m, 50, example_inputs=x).prune_model()
    assert m.a.out_features==4 and [e[0].out_features for e in m.experts]==[3,3,3] and m.gate.out_features==3
    assert m(torch.randn(9, 5, dtype=torch.float64)).shape==(9,2)

def test_regions():
    from torchvision.ops import roi_align
    boxes = [torch.tensor([[0.,0,5,5],[2,2,9,9]], dtype=torch.float64)]*2
    m = randomized(Net(lambda m,x: m.fc(roi_align(m.a(x), boxes, 3).flatten(1)), a=conv(3,8), fc=nn.Linear(72,2)))
    zero([1,3], m.a.weight, m.a.bias)
    assert pruned(m).fc.in_features==54

# sizes that are fixed, or that follow

def pooled(m, x): return m.fc(F.relu(x).mean((2,3)))

def test_rows_of_a_fixed_size():
    "Where what stands in a row meets numbers of its own, as in a rotary embedding, whole rows go"
    def f(m, x):
        y = F.relu(m.a(x)).unflatten(1, (-1,3))
        y = y*torch.tensor([1.,2.,3.])[:,None,None]
        return pooled(m, m.b(y.flatten(1, 2)))
    m = randomized(Net(f, a=conv(3,12), b=conv(12,6), fc=nn.Linear(6,2)))
    m = m.float()
    graph = ChannelGraph(m, X)
    classes = graph.classes(graph.out('a.weight').ids).view(4, 3)
    assert (classes>0).all() and (classes==classes[:,:1]).all() and len(classes.unique())==4
    Pruner(m, 50, example_inputs=X).prune_model()
    assert m.a.out_channels==6 and m.b.in_channels==6 and m(X).shape==(2,2)

def test_what_is_fixed_in_every_direction_stays():
    def f(m, x): return pooled(m, m.b((F.relu(m.a(x)).unflatten(1, (4,3))*torch.arange(12.).view(4, 3, 1, 1)).flatten(1, 2)))
    m = randomized(Net(f, a=conv(3,12), b=conv(12,6), fc=nn.Linear(6,2))).float()
    graph = ChannelGraph(m, X)
    ids = graph.out('a.weight').ids
    assert not graph.classes(ids).any() and any('fixed size, mul' in o for o in graph.why(ids))

class Eca(nn.Module):
    "Efficient channel attention: Wang et al., arXiv 1910.03151"
    def __init__(self, k=3):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k, padding=k//2, bias=False)
    def forward(self, x): return x*self.conv(x.mean((2,3))[:,None]).sigmoid().flatten(1)[...,None,None]

@pytest.mark.parametrize('k', [1,3,5])
def test_convolution_over_channels(k):
    "By ratio they go; without loss only where no channel reads its neighbours, and that is told"
    m = randomized(Net(lambda m, x: pooled(m, m.b(m.eca(F.relu(m.a(x))))), a=conv(3,12), eca=Eca(k), b=conv(12,6), fc=nn.Linear(6,2)))
    zeroed = copy.deepcopy(m)
    zero([1,4], zeroed.a.weight, zeroed.a.bias)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        pruner = Pruner()
        small = pruner.prune_model(zeroed, XD)
    assert difference(zeroed, small, XD)[0]<1e-12
    assert small.a.out_channels==(10 if k==1 else 12)
    assert k==1 or 'takes all channels together' in pruner.left[0]['why'] and len(seen)==1
    Pruner(m, 50, example_inputs=XD).prune_model()
    assert (m.a.out_channels,m.b.out_channels)==(6,3) and m(XD).shape==(2,2)

def group_std(x, groups, flat):
    B,C,H,W = x.shape
    x = x.reshape(B, groups, -1) if flat else x.reshape(B, groups, C//groups, H, W)
    std = x.var(2 if flat else (2,3,4), keepdim=True).add(1e-5).sqrt()
    return std.expand(x.shape).reshape(B, C, H, W)

@pytest.mark.parametrize('groups,size', [(2,6),(6,2),(4,4)])
@pytest.mark.parametrize('flat', [False,True])
@pytest.mark.parametrize('out', ['div','mul'])
def test_statistics_of_groups(groups, size, flat, out):
    "As EvoNorm has them: Liu et al., arXiv 2004.02967. As many channels go from each group"
    n = groups*size
    def f(m, x):
        y = m.a(x)
        y = y/group_std(y, groups, flat) if out=='div' else y*group_std(y, groups, flat).reciprocal()
        return pooled(m, m.b(y*m.scale[:,None,None]))
    m = randomized(Net(f, a=conv(3,n), b=conv(n,6), fc=nn.Linear(6,2), scale=nn.Parameter(torch.ones(n)))).float()
    Pruner(m, 50, example_inputs=X).prune_model()
    assert m.a.out_channels==n//2 and len(m.scale)==n//2 and m(X).shape==(2,2)

class Blur(nn.Module):
    "Zhang, arXiv 1904.11486; how many channels there are is an attribute, and the filter a buffer"
    def __init__(self, n, own):
        super().__init__()
        self.channels,self.own = n,own
        self.register_buffer('filt', torch.ones(n if own else 1, 1, 3, 3)/9)
    def forward(self, x):
        if self.own: return F.conv2d(x, self.filt, stride=2, groups=self.channels)
        return F.conv2d(x, self.filt.expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])

@pytest.mark.parametrize('own', [True,False])
def test_groups_in_an_attribute(own):
    m = randomized(Net(lambda m, x: pooled(m, m.b(m.blur(F.relu(m.a(x))))), a=conv(3,12), blur=Blur(12, own), b=conv(12,6), fc=nn.Linear(6,2)))
    zeroed = copy.deepcopy(m)
    zero([1,4], zeroed.a.weight, zeroed.a.bias)
    small = Pruner().prune_model(zeroed, XD)
    assert small.a.out_channels==10 and difference(zeroed, small, XD)[0]<1e-12
    Pruner(m, 50, example_inputs=XD).prune_model()
    assert (m.a.out_channels,m.b.out_channels)==(6,3) and m(XD).shape==(2,2)

def test_an_attribute_that_two_layers_share():
    "A part of the channels passes through an attention that makes as many: what the code insists on is held, others go in its place"
    class Partial(nn.Module):
        def __init__(self, d, p):
            super().__init__()
            self.p,self.rest = p,d-p
            self.v,self.proj = nn.Conv2d(p, p, 1),nn.Conv2d(d, d, 1)
        def forward(self, x):
            a,b = x.split([self.p,self.rest], 1)
            v = self.v(a).flatten(2)
            a = (v@(v.transpose(-2, -1)@v).softmax(-1)).reshape(len(x), self.p, *x.shape[2:])
            return self.proj(torch.cat([a,b], 1))
    torch.manual_seed(0)
    m = Net(lambda m, x: pooled(m, m.b(m.mid(m.a(x)))), a=conv(3,24), mid=Partial(24, 8), b=conv(24,8), fc=nn.Linear(8,2))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        pruner = Pruner(m, 50, example_inputs=X)
        pruner.prune_model()
    assert m(X).shape==(2,2) and pruner.reached()>=40
    assert bool(seen)==bool(pruner.left)

def test_norms_of_what_is_not_found():
    "A detector that finds nothing has run its last layers on nothing, and their norms are cut all the same"
    def f(m, x):
        y = F.relu(m.a(x))
        found = y.flatten(1)[y.mean((1,2,3))>9.]
        return m.c(F.relu(m.norm(m.b(found.view(-1, *y.shape[1:]))))).mean((2,3))
    m = randomized(Net(f, a=conv(3,8), b=conv(8,8), norm=nn.BatchNorm2d(8), c=conv(8,2))).float()
    assert len(m(X))==0
    Pruner(m, 50, example_inputs=X).prune_model()
    assert m.norm.num_features==m.b.out_channels==4 and len(m(X))==0

@pytest.mark.parametrize('same', [lambda y,h: y.shape==h.shape, lambda y,h: y.shape[1]==h.shape[1], lambda y,h: not y.size(1)!=h.size(1)])
def test_a_branch_on_a_size(same):
    "What is added only where widths are equal is not added because a cut has made them equal"
    def f(m, x):
        y = F.relu(m.a(x))
        h = F.relu(m.b(y))
        return m.c(y+h if same(y, h) else h).mean((2,3))
    m = randomized(Net(f, a=conv(3,12), b=conv(12,6), c=conv(6,2)))
    zeroed = copy.deepcopy(m)
    zero(range(6), zeroed.a.weight, zeroed.a.bias)
    small = Pruner().prune_model(zeroed, XD)
    assert small.a.out_channels!=6 and difference(zeroed, small, XD)[0]<1e-12
    Pruner(m, {'a':50}, example_inputs=XD).prune_model()
    assert m.a.out_channels!=6 and m(XD).shape==(2,2)

@pytest.mark.parametrize('make', [lambda x, n: torch.zeros(len(x), n, *x.shape[2:]), lambda x, n: torch.ones((len(x), n, 1, 1)), lambda x, n: x.new_zeros(size=(len(x), n, *x.shape[2:])),
    lambda x, n: x.new_full((len(x), n, *x.shape[2:]), 2.), lambda x, n: torch.full([len(x), n, 1, 1], 3.)])
def test_tensors_that_are_made_with_a_size(make):
    "What is made as wide as the channels goes with them"
    def f(m, x):
        y = F.relu(m.a(x))
        return pooled(m, m.b(y+make(x, y.shape[1])))
    m = randomized(Net(f, a=conv(3,12), b=conv(12,6), fc=nn.Linear(6,2))).float()
    Pruner(m, 50, example_inputs=X).prune_model()
    assert (m.a.out_channels,m.b.out_channels)==(6,3) and m(X).shape==(2,2)

def test_an_output_that_only_has_the_size():
    "A detector that finds nothing gives an empty tensor, as wide as what it looks for: that stays"
    def f(m, x):
        y = m.b(F.relu(m.a(x)))
        return torch.zeros((0, y.shape[1]))
    m = randomized(Net(f, a=conv(3,12), b=conv(12,6))).float()
    Pruner(m, 50, example_inputs=X).prune_model()
    assert (m.a.out_channels,m.b.out_channels)==(6,6)

WIDTHS = dict(tensor=lambda m,y: y.shape[1]**-.5, attribute=lambda m,y: m.a.out_channels**-.5, weight=lambda m,y: m.a.weight.shape[0]**-.5, length=lambda m,y: len(m.a.bias)**-.5,
    entries=lambda m,y: m.a.bias.numel()**-.5, divided=lambda m,y: 1/m.a.out_channels, tensor_of=lambda m,y: torch.tensor([m.a.out_channels]).sqrt(), full=lambda m,y: torch.full((1,), m.a.weight.size(0)))
@pytest.mark.parametrize('width', WIDTHS.values(), ids=WIDTHS)
def test_a_width_that_is_computed_with(width):
    "However the code reads it, a lossless copy keeps the channels, and says why; by ratio they go"
    m = randomized(Net(lambda m,x: pooled(m, m.b(F.relu(m.a(x))*width(m, m.a(x)))), a=conv(3,64), b=conv(64,6), fc=nn.Linear(6,2)))
    zero([1], m.a.weight, m.a.bias)
    with pytest.warns(UserWarning, match='computes with their number'): small = Pruner().prune_model(m, XD)
    assert small.a.out_channels==64
    Pruner(m, 50, example_inputs=XD).prune_model()
    assert m.a.out_channels==32

@pytest.mark.parametrize('scale,left', [(lambda m: m.wide**-.5,8),(lambda m: .5,6)])
def test_an_attribute_that_is_computed_with(scale, left):
    "Heads that are scaled by their width in `forward` keep it"
    m = Net(lambda m,x: m.fc((m.v(x).view(*x.shape[:2], -1, m.wide)*scale(m)).flatten(2)), v=nn.Linear(6,8), fc=nn.Linear(8,2))
    m.wide = 4
    m = randomized(m)
    zero([1,5], m.v.weight, m.v.bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    small = Pruner().prune_model(m, x)
    assert small.v.out_features==left and difference(m, small, x)[0]<1e-12

@pytest.mark.parametrize('drop', [F.dropout,F.dropout2d,F.alpha_dropout,F.feature_alpha_dropout,torch.feature_dropout])
def test_dropout_as_a_function(drop):
    "It is not followed as in training, where another layer runs only then, or never"
    m = randomized(Net(lambda m,x: pooled(m, m.b(drop(m.a(x), .3, m.training))), a=conv(3,8), b=conv(8,6), fc=nn.Linear(6,2), idle=nn.Linear(3,1)))
    Pruner(m, 50, example_inputs=XD).prune_model()
    assert m.a.out_channels==4

# what runs only in training, or not at all

def test_what_runs_only_in_training_stays():
    "A mean teacher's student, a head for another loss: nothing of it is zero"
    f = lambda m,x: m.net(x) if m.training else m.ema(x)
    net = nn.Sequential(nn.Linear(5,8), nn.ReLU(), nn.Linear(8,3))
    x = torch.randn(4, 5, dtype=torch.float64)
    projected = Net(lambda m,x: m.proj(m.body(x)) if m.training else m.body(x), body=net, proj=copy.deepcopy(nn.Sequential(nn.Linear(3,8), nn.ReLU(), nn.Linear(8,2))))
    for m in (randomized(Net(f, net=net, ema=copy.deepcopy(net))),randomized(projected)):
        small = Pruner().prune_model(m, x)
        assert n_params(small)==n_params(m) and torch.equal(small.train()(x), m.train()(x))

def test_a_head_of_training_is_cut_to_fit():
    "And loses what is zero in it"
    def f(m, x):
        y = F.relu(m.a(x))
        return m.b(y)+m.proj(y) if m.training else m.b(y)
    m = randomized(Net(f, a=nn.Linear(5,8), b=nn.Linear(8,3), proj=nn.Sequential(nn.Linear(8,6), nn.ReLU(), nn.Linear(6,3))))
    zero([1,4], m.a.weight, m.a.bias)
    zero([2], m.proj[0].weight, m.proj[0].bias)
    x = torch.randn(4, 5, dtype=torch.float64)
    small = Pruner().prune_model(m, x)
    assert small.proj[0].weight.shape==(5,6)
    torch.testing.assert_close(small.train()(x), m.train()(x))

def test_a_layer_that_is_left_out_at_random():
    "Whether one runs is drawn in training"
    def f(m, x):
        y = F.relu(m.a(x))
        for o in m.many:
            if not (m.training and torch.rand(())<.1): y = y+F.relu(o(y))
        return m.b(y+m.mask if m.training else y)
    m = Net(f, a=nn.Linear(5,8), many=nn.ModuleList(nn.Linear(8,8) for _ in range(3)), b=nn.Linear(8,3))
    m.mask = nn.Parameter(torch.zeros(8))
    m = randomized(m)
    Pruner(m, 50, example_inputs=torch.randn(2, 5, dtype=torch.float64)).prune_model()
    assert m.a.out_features==4 and m.many[2].weight.shape==(4,4)

def test_a_layer_that_did_not_run_is_told_of():
    "By ratio, too, and however few outputs it has"
    def f(m, x):
        y = F.relu(m.a(x))
        return m.early(y) if y.amax()>1e6 else m.late(F.relu(m.b(y)))
    m = randomized(Net(f, a=nn.Linear(5,16), b=nn.Linear(16,16), late=nn.Linear(16,2), early=nn.Linear(16,2)))
    with pytest.warns(UserWarning, match='^early did not run') as told: Pruner(m, 40, example_inputs=torch.randn(2, 5, dtype=torch.float64)).prune_model()
    assert len(told)==1

# another number of samples

@pytest.mark.parametrize('n', [1,3])
def test_a_branch_on_the_number_of_samples(n):
    "A copy that is right for the samples at hand alone is refused"
    m = randomized(Net(lambda m,x: m.b(F.relu(m.a(x))+(len(x)!=n)), a=nn.Linear(5,8), b=nn.Linear(8,3)))
    zero([1,4], m.a.weight, m.a.bias)
    x = torch.randn(n, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match='with 1 sample:' if n>1 else 'with 2 samples:'): Pruner().prune_model(m, x)
    assert Pruner(verify=False).prune_model(m, x).a.out_features==6

# transformers

def test_the_size_of_heads_is_told_by_an_attribute():
    "Heads of a model whose output is as wide as what they read go by themselves"
    def f(m, x):
        q,k,v = (o(x).view(*x.shape[:2], -1, m.wide).transpose(1, 2) for o in (m.q,m.k,m.v))
        return x+m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    m = Net(lambda m,x: f(m, m.i(x)), i=nn.Linear(5,8), q=nn.Linear(8,8), k=nn.Linear(8,8), v=nn.Linear(8,8), o=nn.Linear(8,8))
    m.wide = 4
    m = randomized(m)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Pruner(m, 50, example_inputs=x).prune_model()
    assert (m.i.out_features,m.q.out_features,m.o.in_features,m.wide)==(8,4,4,2) and m(x).shape==(2,7,8)

def test_tied_embeddings_make_an_output():
    "A vocabulary is an output of the model, and nobody asks for it"
    m = Net(lambda m,i: m.h((y := m.e(i))+m.g(F.gelu(m.up(y)))), e=nn.Embedding(50,8), up=nn.Linear(8,12), g=nn.Linear(12,8), h=nn.Linear(8,50,bias=False))
    m.h.weight = m.e.weight
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Pruner(m, 50, example_inputs=torch.randint(0, 50, (2,9))).prune_model()
    assert m.h.weight.shape==(50,4)

# several of them have to be equally many

def test_halves_of_attention_keep_as_many_as_what_goes_on():
    "A value is split into heads, and joined again with the width of what came in: two numbers of channels that attributes do not tell"
    def attend(m, x):
        n,width,*size = x.shape
        q,k,v = m.qkv(x).view(n, m.heads, 2*m.key+m.value, -1).split([m.key,m.key,m.value], dim=2)
        v = v@((q*m.scale).transpose(-2, -1)@k).softmax(-1).transpose(-2, -1)
        return x+m.proj(v.view(n, width, *size))
    net = Net(lambda m,x: m.out(attend(m, F.relu(m.a(x)))), a=conv(3,16), qkv=conv(16,32), proj=conv(16,16), out=conv(16,3))
    net.heads,net.key,net.value,net.scale = 2,4,8,.5
    m = randomized(net)
    with pytest.warns(UserWarning, match=r'4 were not removed: .* counts on 16 channels'): Pruner(m, 20, example_inputs=XD).prune_model()
    assert m.a.out_channels==m.proj.out_channels==14 and (m.key,m.value)==(4,7) and m(XD).shape==XD.shape

# what is called is not what is there

class Copying(nn.Module):
    "An object around a network that runs a copy of it"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def __call__(self, x): return copy.deepcopy(self.net)(x)

@pytest.mark.parametrize('prune', [lambda m: Pruner(m, 50, example_inputs=XD).prune_model(), lambda m: Pruner().prune_model(m, XD)], ids=['ratio','zeros'])
def test_an_object_that_runs_a_copy_names_the_network(prune):
    m = Copying(randomized(nn.Sequential(conv(3,8), nn.ReLU(), conv(8,2))))
    with pytest.raises(ValueError, match=r'a Copying computes with none of its parameters .* pass its `\.net`, a Sequential'): prune(m)
    assert m.net[0].out_channels==8

def test_an_object_that_runs_its_own_layers_is_a_model():
    class Calling(Copying):
        def __call__(self, x): return self.net(x)
    m = Calling(randomized(nn.Sequential(conv(3,8), nn.ReLU(), conv(8,2))))
    Pruner(m, 50, example_inputs=XD).prune_model()
    assert m.net[0].out_channels==4
