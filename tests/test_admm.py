"Zeros that other weights make up for: how many, where, and what is lost"
from copy import deepcopy
import pytest, torch
from torch import nn
from fasterai.core.admm import Alternating, alternate
from fasterai.core.obs import damped
from fasterai.sparse.sparsifier import Sparsifier

LAYERS = dict(linear=lambda: (nn.Linear(24, 16), (24,)), no_bias=lambda: (nn.Linear(24, 16, bias=False), (24,)), conv=lambda: (nn.Conv2d(8, 12, 3, stride=2, padding=1), (8,9,9)),
    dilated=lambda: (nn.Conv2d(8, 8, (1,3), dilation=2), (8,9,9)), grouped=lambda: (nn.Conv2d(16, 16, 3, groups=2, padding=1), (16,6,6)), depthwise=lambda: (nn.Conv2d(8, 8, 3, groups=8), (8,9,9)), signal=lambda: (nn.Conv1d(8, 12, 3), (8,20)))

def inputs(shape, n=64):
    "Inputs that tell of each other, as channels and neighbours do, with means"
    c,*places = shape
    x = torch.einsum('nc...,dc->nd...', torch.randn(n, c, *places), torch.randn(c, c)/c**.5)+torch.rand(c, *[1]*len(places))
    for d in range(2, x.dim()): x = x+x.roll(1, d)+x.roll(-1, d)
    return x

def case(kind):
    torch.manual_seed(0)
    layer,shape = LAYERS[kind]()
    return layer,inputs(shape)

@torch.no_grad()
def error(dense, sparse, x):
    y = dense(x)
    return ((sparse(x)-y).square().sum()/(y-y.mean()).square().sum()).item()

def zeroed(layer, x, criteria, granularity, percent, context='local'):
    m = nn.Sequential(deepcopy(layer))
    sp = Sparsifier(m, granularity, context, criteria, layer_type=type(layer), data=x)
    sp.sparsify_model(percent)
    return m,sp

PATTERNS = ('2:4',50), ('2:4',30), ('1:4',75)
SPLITS = ('weight',50), ('weight',80), ('block(2,4)',50), ('column',40)

@pytest.mark.parametrize('kind,granularity,percent', [(k,*o) for k in LAYERS for o in SPLITS+PATTERNS if k!='depthwise' or o not in PATTERNS])
def test_as_many_zeros_and_a_fraction_of_the_error(kind, granularity, percent):
    layer,x = case(kind)
    theirs,_ = zeroed(layer, x, 'large_final', granularity, percent)
    ours,sp = zeroed(layer, x, 'obs', granularity, percent)
    zeros = [int((m[0].weight==0).sum()) for m in (ours,theirs)]
    assert zeros[0]==zeros[1]>0
    assert torch.equal(ours[0].weight!=0, sp.masks['0.weight'])
    assert error(layer, ours, x)<.6*error(layer, theirs, x)

@pytest.mark.parametrize('context', ['global','lamp','erk','uniform_plus','isomorphic'])
@pytest.mark.parametrize('granularity', ['weight','block(2,4)','filter'])
def test_contexts(context, granularity):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    x,errors,zeros = inputs((4,8,8), 16),[],[]
    for criteria in ('obs','large_final'):
        m = deepcopy(net)
        Sparsifier(m, granularity, context, criteria, data=x).sparsify_model(60)
        errors.append(error(net, m, x))
        zeros.append(sum(int((o.weight==0).sum()) for o in m if isinstance(o, nn.Conv2d)))
    if context not in ('lamp','isomorphic') and granularity=='weight': assert zeros[0]==zeros[1]
    if granularity!='filter': assert errors[0]<errors[1]

def test_all_layers_of_a_budget_find_their_zeros_together():
    "A layer with inputs that say the same gives more than one with inputs that do not"
    torch.manual_seed(0)
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.easy,self.hard = nn.Linear(16, 8),nn.Linear(16, 8)
        def forward(self, x): return self.easy(x[:,:1].expand(-1, 16)+.01*x), self.hard(x)
    m = Two()
    sp = Sparsifier(m, 'weight', 'global', 'obs', layer_type=nn.Linear, data=torch.randn(256, 16))
    sp.sparsify_model(50)
    easy,hard = ((o.weight==0).sum() for o in (m.easy,m.hard))
    assert easy+hard==128 and easy>2*hard

def test_a_bias_makes_up_for_means():
    layer,x = case('conv')
    m,_ = zeroed(layer, x, 'obs', 'weight', 70)
    with torch.no_grad(): was,now = (o(x).transpose(0, 1).flatten(1).mean(1) for o in (layer,m))
    torch.testing.assert_close(was, now, atol=1e-4, rtol=1e-3)

def test_what_is_gone_or_zero_stays_so():
    layer,x = case('linear')
    with torch.no_grad(): layer.weight[3] = layer.weight[:,5] = 0
    zero = layer.weight==0
    m,sp = zeroed(layer, x, 'obs', 'weight', 50)
    first = m[0].weight==0
    sp.sparsify_model(75)
    second = m[0].weight==0
    assert first.sum()==192 and second.sum()==288
    assert second[first].all() and first[zero].all()
    sp.sparsify_model(75)
    assert torch.equal(m[0].weight==0, second)

def test_fewer_zeros_come_back_as_ever():
    layer,x = case('linear')
    m,sp = zeroed(layer, x, 'obs', 'weight', 75)
    sp.sparsify_model(50)
    assert sp.reached()==50

@pytest.mark.parametrize('dtype', [torch.float64,torch.bfloat16])
def test_dtypes(dtype):
    layer,x = case('linear')
    layer,x = layer.to(dtype),x.to(dtype)
    theirs,_ = zeroed(layer, x, 'large_final', '2:4', 50)
    ours,_ = zeroed(layer, x, 'obs', '2:4', 50)
    assert (ours[0].weight==0).sum()==(theirs[0].weight==0).sum()
    assert error(layer, ours, x)<.6*error(layer, theirs, x)

def test_one_layer_or_some():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    x = inputs((16,))
    m = deepcopy(net)
    Sparsifier(m, 'weight', 'local', 'obs', layer_type=nn.Linear, data=x).sparsify_layer('2', 50)
    assert torch.equal(m[0].weight, net[0].weight) and (m[2].weight==0).sum()==128
    m = deepcopy(net)
    Sparsifier(m, 'weight', 'local', 'obs', layer_type=nn.Linear, data=x).sparsify_model({'0':50})
    assert torch.equal(m[2].weight, net[2].weight) and torch.equal(m[2].bias, net[2].bias) and (m[0].weight==0).sum()==128

def test_an_update_in_training_only_chooses():
    layer,x = case('linear')
    m = nn.Sequential(deepcopy(layer))
    sp = Sparsifier(m, 'weight', 'local', 'obs', layer_type=nn.Linear, data=x)
    sp.sparsify_model(0)
    sp.update(50)
    kept = m[0].weight!=0
    assert kept.sum()==192 and torch.equal(m[0].weight[kept], layer.weight[kept])

def test_repair_goes_on_from_there():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    x,errors = inputs((16,), 512),[]
    for repair in (False,True):
        m = deepcopy(net)
        sp = Sparsifier(m, 'weight', 'local', 'obs', layer_type=nn.Linear, data=x, repair=repair)
        sp.sparsify_model(70)
        assert sp.reached()==pytest.approx(70, abs=.3)
        errors.append(error(net, m, x))
    assert errors[1]<errors[0]

def test_too_wide():
    m = nn.Sequential(nn.Linear(9000, 4))
    with pytest.warns(UserWarning, match='too wide'): Sparsifier(m, 'weight', 'local', 'obs', layer_type=nn.Linear, data=torch.randn(8, 9000)).sparsify_model(50)
    assert (m[0].weight==0).sum()==18000

def test_a_layer_that_sees_nothing_and_one_that_is_zero():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad(): net[0].weight.zero_(); net[0].bias.fill_(-1)
    Sparsifier(net, 'weight', 'local', 'obs', layer_type=nn.Linear, data=torch.randn(32, 8)).sparsify_model(50)
    assert (net[2].weight==0).sum()==32 and net[2].weight.isfinite().all()

def test_data_with_nan_change_nothing():
    layer,x = case('linear')
    m = nn.Sequential(deepcopy(layer))
    x[0,0] = float('nan')
    with pytest.raises(ValueError): Sparsifier(m, 'weight', 'local', 'obs', layer_type=nn.Linear, data=x).sparsify_model(50)
    assert torch.equal(m[0].weight, layer.weight) and torch.equal(m[0].bias, layer.bias)

@pytest.mark.parametrize('seed', range(5))
def test_the_last_fit_is_least_squares(seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 12, 12).double()@torch.randn(2, 12, 400).double()
    w,hess = torch.randn(2, 5, 12).double(),x@x.mT
    search = Alternating(w, hess)
    alternate([search], lambda scores: [s>=s.flatten().median() for s in scores])
    found,h = search.fitted(),damped(hess)
    for g in range(2):
        for i,k in enumerate(search.kept[g]): torch.testing.assert_close(found[g,i,k], torch.linalg.solve(h[g][k][:,k], (w[g,i]@h[g])[k]), rtol=2e-2, atol=2e-2)
