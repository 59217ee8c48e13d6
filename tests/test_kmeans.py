"""`kmeans` beside the optimum by an exhaustive dynamic program, and on data of every sort"""
import pytest, torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from fasterai.quantize.kmeans import inits, kmeans
import numpy as np

def inertia(x, c): return (x.double()-c.shared.double()).square().sum().item()

def least(x, k):
    "Inertia of the best clustering, by the textbook recursion"
    v = np.sort(x.double().cpu().numpy())
    n = len(v)
    cost = np.array([[((v[a:b]-v[a:b].mean())**2).sum() if b>a else 0. for b in range(n+1)] for a in range(n+1)])
    best = cost[0]
    for _ in range(k-1): best = np.array([min(best[a]+cost[a,b] for a in range(b+1)) for b in range(n+1)])
    return best[n]

floats = hnp.arrays(np.float32, st.integers(1, 24), elements=st.floats(-100, 100, width=32))

@given(floats, st.integers(1, 6))
def test_optimal(x, k):
    x = torch.from_numpy(x)
    c = kmeans(x, k)
    assert inertia(x, c)<=least(x, k)*(1+1e-4)+1e-5*max(1., x.abs().max().item())  # the values are rounded to float32
    assert c.values.shape==(k,) and (c.values.diff()>=0).all() and c.codes.shape==x.shape

@given(hnp.arrays(np.float32, st.integers(0, 60), elements=st.sampled_from([0., -0., 1., -1., .5, 1e-30, 1e30, -3e38])), st.integers(1, 9), st.sampled_from(list(inits)))
def test_zeros_and_few_values(x, k, init):
    x = torch.from_numpy(x)
    c = kmeans(x, k, init, keep_zeros=True)
    assert torch.equal(c.codes==0, x==0) and (c.shared[x==0]==0).all() and c.values.shape==(k+1,) and c.values.isfinite().all()
    if len(x[x!=0].unique())<=k: assert torch.equal(c.shared, x)
    again = kmeans(c.shared, k, init)
    if len(c.shared.unique())<=k: assert torch.equal(again.shared, c.shared)

DATA = dict(normal=lambda n: torch.randn(n), laplace=lambda n: torch.distributions.Laplace(0, 1).sample((n,)), cauchy=lambda n: torch.distributions.Cauchy(0, 1).sample((n,)),
    scales=lambda n: torch.exp(6*torch.randn(n)), uniform=lambda n: torch.rand(n), pruned=lambda n: torch.where(torch.rand(n)<.5, -1, 1)*(.03+torch.rand(n)**2*.2),
    two=lambda n: torch.cat([1+1e-3*torch.randn(n//2), 1e-4*torch.randn(n-n//2)]))

@pytest.mark.parametrize('k', [2,16,64])
@pytest.mark.parametrize('name', DATA)
def test_never_worse_than_ten_beginnings(name, k):
    torch.manual_seed(0)
    x = DATA[name](5000)
    assert inertia(x, kmeans(x, k))<=min(inertia(x, kmeans(x, k, 'k-means++', seed=s)) for s in range(10))*(1+1e-6)

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float32,torch.float64])
def test_dtypes(dtype):
    "Each goes to the nearest of the values as they are rounded; the result repeats itself"
    torch.manual_seed(0)
    for n in 4000, 200_000:
        x = torch.randn(n).to(dtype)
        c = kmeans(x, 16)
        assert c.values.dtype==dtype and torch.equal(c.shared, kmeans(x, 16).shared)
        far = (x.double()[:4000,None]-c.values.double()).abs()
        assert (far.gather(1, c.codes[:4000,None].long())[:,0]==far.amin(1)).all()

def test_rows():
    "Rows with different numbers of zeros and of values, in one call or one by one"
    torch.manual_seed(0)
    x = torch.randn(9,700)
    x[0],x[1],x[2],x[3,:690] = 0,.5,x[2].round(),0
    for init in inits:
        c = kmeans(x, 8, init, keep_zeros=True)
        for i in (0,1,2): assert torch.equal(c.shared[i], kmeans(x[i], 8, init, keep_zeros=True).shared)
        assert torch.equal(c.shared==0, x==0) and all(len(o[o!=0].unique())<=8 for o in c.shared)
    c = kmeans(x, 8, keep_zeros=True)
    for row,got in zip(x, c.shared): assert (row-got).double().square().sum()<=inertia(row, kmeans(row, 8, keep_zeros=True))*1.001+1e-9

def test_wild_doubles():
    x = torch.tensor([1e-100,1e200,-1e205,3e-100], dtype=torch.double)
    assert torch.equal(kmeans(x, 4).shared, x) and kmeans(x, 2).values[0]==-1e205
    near = torch.tensor([1., np.nextafter(1, 2), np.nextafter(np.nextafter(1, 2), 2)], dtype=torch.double)
    assert torch.equal(kmeans(near, 3).shared, near)

@pytest.mark.parametrize('bad', [float('nan'),float('inf'),-float('inf')])
@pytest.mark.parametrize('keep_zeros', [False,True])
@pytest.mark.parametrize('x', [[1.,None,2.], [0.,1.,None,0.,2.,0.], [[0.,0.],[None,0.]]])
def test_not_numbers(bad, keep_zeros, x):
    x = torch.tensor([[bad if o is None else o for o in r] if isinstance(r, list) else bad if r is None else r for r in x])
    with pytest.raises(ValueError, match='1 of'): kmeans(x, 2, keep_zeros=keep_zeros)

@pytest.mark.parametrize('args,says', [((torch.ones(3), 0), 'at least 1'), ((torch.ones(3), 2.), 'whole number'), ((torch.ones(3, dtype=torch.long), 2), 'int64'), ((torch.ones(2,2,2), 2), 'shape'), ((torch.ones(3), 2, 'lineer'), "'linear'")])
def test_wrong_arguments(args, says):
    with pytest.raises(ValueError, match=says): kmeans(*args)
