"""The kernels give what the plain selection gives, on Triton's interpreter where there is no GPU"""
import pickle
from itertools import product
import numpy as np
import pytest
import torch
from torch import nn
from fasterai.core import kernels, pool
from fasterai.core.criteria import large_final, movement
from fasterai.core.pool import select_each
from fasterai.core.selection import Scores, rank
from fasterai.core.all import *
from fasterai.sparse.all import *
from fasterai.sparse.sparsifier import hold_zeros
from test_exact import VALUES
from tiny import recording

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

@pytest.fixture
def repeated(monkeypatch):
    "Updates are recorded as on a GPU; what was repeated"
    return recording(monkeypatch, 'fasterai.sparse.sparsifier')

@pytest.fixture
def counted(monkeypatch, repeated):
    "Kernels are used wherever they could be on a GPU; how often"
    seen = []
    real = kernels.rank
    def spy(*args, **kwargs):
        seen.append(real(*args, **kwargs))
        return seen[-1]
    monkeypatch.setattr(kernels, 'rank', spy)
    monkeypatch.setattr(pool, '_has_kernels', lambda device: True)
    monkeypatch.setattr(kernels, 'SIZE', 1024)  # several chunks of what is small, so that the interpreter is done with it soon
    monkeypatch.setattr(kernels, 'STEP', 512)
    kernels._plan.cache_clear()
    return seen

def sources(name, sizes, r, gone=.3):
    "Scores of some sources, of which some blocks are gone"
    res = []
    for n in sizes:
        o = Scores(torch.tensor(np.array(VALUES[name](n, r)), dtype=torch.float32, device=DEVICE))
        o.keep[torch.tensor(r.permutation(n)[:int(gone*n)])] = 0
        res.append(o)
    return res

@pytest.mark.parametrize('name', sorted(VALUES))
def test_counting_is_ranking(name, counted):
    "Several groups in one go, one group of several sources, blocks that go and that return, with and without protection"
    r = np.random.default_rng(0)
    every = list(product([(1300,), (700,1,90), (40,700)], [False,True]))
    for sizes,protect in (every[i] for i in r.permutation(len(every))[:1]):
        ours = sources(name, sizes, r)
        for together,share in zip([True,False,True], [.9,.999,.2]):
            groups = [ours] if together else [[o] for o in ours]
            theirs = [[Scores(o.values, o.keep.clone()) for o in g] for g in groups]
            asked = []
            for g in groups:
                gone = sum(o.gone for o in g)
                k = min(int(share*sum(o.n for o in g)), sum(o.n for o in g)-len(g)*protect)
                asked.append((g, gone, k))
            assert select_each(asked, protect)==[k for *_,k in asked]
            for (g,gone,k),t in zip(asked, theirs):
                if k!=gone: rank(t, k, k>gone, protect)
                assert [a.keep.tolist() for a in g]==[b.keep.tolist() for b in t], (sizes, protect, together, share)
                assert all(o.left in (None, o.n-o.gone) for o in g)
    assert counted and all(counted)

def test_in_pieces(counted, monkeypatch):
    "Scores that are never all there at a time"
    monkeypatch.setattr(kernels, 'WHOLE', 1000)
    monkeypatch.setattr(kernels, 'PIECE', 1024)
    r = np.random.default_rng(0)
    for name in ('normal','nine','same','mixed'):
        ours = sources(name, (3000,10,2500), r)
        theirs = [Scores(o.values, o.keep.clone()) for o in ours]
        select_each([(ours, sum(o.gone for o in ours), 3456)], True)
        rank(theirs, 3456, True, True)
        assert [a.keep.tolist() for a in ours]==[b.keep.tolist() for b in theirs]
    assert counted

def test_wide_scores_are_ranked(counted):
    "Scores of 64 bits, which are not counted"
    values = torch.randn(900, dtype=torch.float64, device=DEVICE)
    o = Scores(values)
    select_each([([o], 0, 400)])
    assert not any(counted) and torch.equal(o.keep==0, values<=values.sort().values[399])

def net(dtype=torch.float32, channels_last=False):
    torch.manual_seed(0)
    res = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3, bias=False), nn.BatchNorm2d(16), nn.ConvTranspose2d(16,4,2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,12)).to(DEVICE, dtype)
    return res.to(memory_format=torch.channels_last) if channels_last else res

def walk(kind, monkeypatch, plain, layer_type=(nn.Conv2d, nn.ConvTranspose2d), **kwargs):
    "State of a network after each update of a fit with noise for gradients"
    with monkeypatch.context() as m:
        if plain: m.setattr(pool, '_has_kernels', lambda device: False)
        model = net(**kind)
        sp,states = Sparsifier(model, layer_type=layer_type, **kwargs),[]
        noise = torch.Generator().manual_seed(1)
        for level in (10,25,25,40,30,35,45,50):
            with torch.no_grad():
                for p in model.parameters(): p += .1*torch.randn(p.shape, generator=noise).to(p)
            sp.update(level)
            sp.apply_masks()
            states.append({k:v.detach().clone() for k,v in model.state_dict().items()} | {f'mask {k}':v for k,v in sp.masks.items()})
        return states

@pytest.mark.parametrize('context', ['local','global'])
@pytest.mark.parametrize('granularity', ['weight','filter','kernel','2:4','block(2,3)','shared_kernel'])
@pytest.mark.parametrize('kind', [dict(), dict(channels_last=True), dict(dtype=torch.bfloat16), dict(dtype=torch.float64)], ids=str)
def test_sparsifier_is_the_same(kind, granularity, context, counted, monkeypatch):
    "Weights, side parameters and masks are bit for bit what they are without kernels, through updates that rise and fall"
    for criteria in (large_final, movement) if granularity in ('weight','filter') else (large_final,):
        ours,theirs = (walk(kind, monkeypatch, plain, granularity=granularity, context=context, criteria=criteria) for plain in (False,True))
        for a,b in zip(ours, theirs): assert all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('reducer', ['mean','sum','max','l2'])
def test_coupled_filters_are_the_same(reducer, counted, monkeypatch):
    "Tied filters, scored in one go"
    monkeypatch.setattr(kernels, 'SIZE', 2**15)
    monkeypatch.setattr(kernels, 'STEP', 2**15)
    from torchvision.models.resnet import BasicBlock, ResNet
    masks = []
    for plain in (False,True):
        with monkeypatch.context() as m:
            if plain: m.setattr(pool, '_has_kernels', lambda device: False)
            torch.manual_seed(0)
            model = ResNet(BasicBlock, [1,1,0,0], num_classes=4)
            model.layer3,model.layer4,model.fc = nn.Identity(),nn.Identity(),nn.Linear(128,4)
            model = model.to(DEVICE)
            sp = Sparsifier(model, 'filter', criteria=Criteria(large_final, reducer), coupled=True, example_inputs=torch.randn(2,3,32,32, device=DEVICE))
            sp.update(30)
            nn.init.ones_(model.bn1.bias)
            sp.update(40)
            masks.append(sp.masks | dict(model.state_dict()))
    assert all(torch.equal(masks[0][k], masks[1][k]) for k in masks[1])

def watched(sp, levels):
    "Masks and weights after updates to `levels` with noise between"
    noise = torch.Generator().manual_seed(1)
    for level in levels:
        with torch.no_grad():
            for p in sp.model.parameters(): p += .1*torch.randn(p.shape, generator=noise).to(p)
        sp.update(level)
        yield sp.masks | {k:v.detach().clone() for k,v in sp.model.state_dict().items()}

@pytest.mark.parametrize('how', [dict(), dict(context='global'), dict(granularity='filter'), dict(granularity='filter', context='global', coupled=True), dict(criteria='updating_movement')], ids=str)
def test_repeated(how, counted, repeated, monkeypatch):
    "From the third update on, all is one launch, and what comes out is the same bits"
    levels,x = (10,25,40,55,70,85),torch.randn(2,3,9,9, device=DEVICE)
    ours = list(watched(Sparsifier(net(), example_inputs=x, **how), levels))
    assert len(repeated)==len(levels)-2
    monkeypatch.setattr(pool, '_has_kernels', lambda device: False)
    for a,b in zip(ours, watched(Sparsifier(net(), example_inputs=x, **how), levels), strict=True): assert all(torch.equal(a[k], b[k]) for k in b)

def test_not_repeated(counted, repeated):
    "What changes between updates is seen: other layers compete, blocks return, weights are elsewhere, a criteria of one's own"
    def run(sp, *steps):
        repeated.clear()
        for o in steps:
            if callable(o): o(sp)
            else:
                sp.update(o)
                zeros = sum(int((m==0).sum()) for m in sp.masks.values())
                assert zeros==sum(int(o/100*m.numel()) for m in sp.masks.values())
        return len(repeated)
    assert run(Sparsifier(net()), 10, 20, 30, 40)==2
    assert run(Sparsifier(net()), 10, 20, 30, 20, 30)==2
    assert run(Sparsifier(net()), 10, 20, lambda sp: sp.model.to(memory_format=torch.channels_last), 30, 40)==0
    def anew(sp): sp.model[0].weight = nn.Parameter(sp.model[0].weight.detach().clone())
    assert run(Sparsifier(net()), 10, 20, 30, anew, 40, 50, 60)==2
    assert run(Sparsifier(net()), 10, 20, 30, lambda sp: sp.sparsify_layer('0', 35), 40, 50, 60)==2
    assert run(Sparsifier(net()), 10, 20, 30, lambda sp: sp.load_state_dict({k:v.clone() for k,v in sp.state_dict().items()}), 40)==2
    def mine(w): return w.abs()
    mine.pointwise = True
    assert run(Sparsifier(net(), criteria=mine), 10, 20, 30, 40)==0
    assert run(Sparsifier(net()), 10, 20, 30, lambda sp: sp.rest(), 40, 50, 60)==2

def test_what_cannot_be_recorded(counted, repeated, monkeypatch):
    "Updates go on as before"
    monkeypatch.setattr('fasterai.sparse.sparsifier.record', lambda *args: None)
    sp = Sparsifier(net())
    for level in (10,20,30,40): sp.update(level)
    assert int((sp.masks['0.weight']==0).sum())==int(.4*sp.masks['0.weight'].numel())

def test_zeros_of_any_origin_are_held(counted, monkeypatch):
    "`hold_zeros`, with free entries beside"
    held = []
    for plain in (False,True):
        with monkeypatch.context() as m:
            if plain: m.setattr(pool, '_has_kernels', lambda device: False)
            model = net()
            with torch.no_grad():
                model[0].weight[::2] = 0
                model[1].weight[:3] = 0
                model[1].bias[1:] = 0
            sp = hold_zeros(model, torch.randn(2,3,8,8, device=DEVICE))
            for p in model.parameters(): nn.init.ones_(p)
            sp.apply_masks()
            held.append({k:v.clone() for k,v in model.state_dict().items()})
    assert all(torch.equal(held[0][k], held[1][k]) for k in held[1]) and (held[0]['0.weight']==0).any()

def test_writes_are_seen_by_autograd():
    "A weight that is needed for a gradient and is zeroed meanwhile raises, as after any other write in place"
    w = nn.Parameter(torch.ones(8, device=DEVICE))
    y = w.square().sum()
    kernels.Zeros([(w, 1, None, torch.zeros(8, dtype=torch.int8, device=DEVICE))])()
    assert (w==0).all()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.backward()

@pytest.mark.parametrize('shape,low', [((50,4),2), ((7,3),1), ((300,8),6), ((0,4),2), ((5,16),15)])
def test_lowest_of_rows(shape, low):
    s = torch.randn(shape, device=DEVICE).round(decimals=1)
    assert torch.equal(kernels.lowest_of_rows(s, torch.zeros(len(s), dtype=torch.int8, device=DEVICE), low)==0, s.argsort(dim=1, stable=True).argsort(dim=1)<low)

@pytest.mark.parametrize('granularity', ['weight','filter','kernel','row','2:4','block(2,3)'])
def test_memory_that_is_laid_out_anew(granularity, counted):
    "Masks follow weights into another memory format, another type and another parameter"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4,8,3), nn.ReLU(), nn.Conv2d(8,16,3)).to(DEVICE)
    sp = Sparsifier(model, granularity, example_inputs=torch.randn(2,4,9,9, device=DEVICE))
    def anew(m): m[2].weight = nn.Parameter(torch.randn(16,8,3,3, device=DEVICE))
    for level,change in enumerate((lambda m: m.to(memory_format=torch.channels_last), lambda m: m.to(torch.bfloat16), lambda m: m.float(), anew), 1):
        sp.update(10*level)
        change(model)
        for m in (model[0],model[2]): nn.init.ones_(m.weight)
        sp.apply_masks()
        for n in (0,2): assert torch.equal(model[n].weight!=0, sp.masks[f'{n}.weight'])

def test_a_copy_has_no_addresses(counted):
    "A pickled Sparsifier looks for its weights where they are"
    sp = Sparsifier(net(), 'filter')
    sp.update(30)
    again = pickle.loads(pickle.dumps(sp))
    assert again._zeros is None and again._last is None and again._repeats is None
    for p in again.model.parameters(): nn.init.ones_(p)
    again.apply_masks()
    assert all(torch.equal(again.model.get_parameter(n)!=0, m) for n,m in again.masks.items())

def test_weights_of_two_widths(counted, monkeypatch):
    "Layers of 32 and 64 bits, ranked together, are not counted"
    monkeypatch.setattr(kernels, 'WHOLE', 100)
    monkeypatch.setattr(kernels, 'PIECE', 1024)
    zeros = []
    for plain in (False,True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40,30), nn.Linear(30,50)).to(DEVICE)
        model[1].double()
        with monkeypatch.context() as m:
            if plain: m.setattr(pool, '_has_kernels', lambda device: False)
            Sparsifier(model, 'weight', 'global', layer_type=nn.Linear).sparsify_model(50)
        zeros.append([m.weight==0 for m in model])
    assert all(torch.equal(a, b) for a,b in zip(*zeros)) and not any(counted)

@pytest.mark.parametrize('granularity', ['weight','filter'])
def test_what_is_remembered_in_another_layout(granularity, counted, monkeypatch):
    "Weights that are laid out anew are compared with those that they were, in each update"
    seen = []
    for plain in (False,True):
        with monkeypatch.context() as m:
            if plain: m.setattr(pool, '_has_kernels', lambda device: False)
            model = net()
            sp = Sparsifier(model, granularity, criteria='updating_movement')
            noise = torch.Generator().manual_seed(1)
            for level in (10,20,30,40,50):
                with torch.no_grad():
                    for p in model.parameters(): p += .1*torch.randn(p.shape, generator=noise).to(p)
                sp.update(level)
                if level==20: model.to(memory_format=torch.channels_last)
            seen.append(sp.masks)
    assert all(torch.equal(seen[0][k], seen[1][k]) for k in seen[1])
