"""k-means of a million weights, beside scikit-learn's: time and inertia, in turn.

Weights are normal, as at the start of training, or heavy-tailed; 64 clusters. scikit-learn runs k-means++ once (n_init=1); its best of ten beginnings is for inertia alone.

    python benchmarks/kmeans.py [repeats]      default: 3
"""
import sys, time
import torch
from sklearn.cluster import KMeans
from fasterai.quantize.kmeans import kmeans

def timed(f):
    start = time.perf_counter()
    res = f()
    return time.perf_counter()-start,res

def inertia(x, values, codes): return (x.double()-values.double()[codes]).square().sum().item()
def ours(x): return timed(lambda: kmeans(x, 64))
def theirs(x, seed, n_init=1): return timed(lambda: KMeans(64, n_init=n_init, random_state=seed).fit(x.numpy()[:,None]))
def of(x, m): return inertia(x, torch.from_numpy(m.cluster_centers_[:,0]), torch.from_numpy(m.labels_).long())

if __name__=='__main__':
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads', flush=True)
    torch.manual_seed(0)
    data = dict(normal=torch.randn(1_000_000), laplace=torch.distributions.Laplace(0, 1).sample((1_000_000,)))
    ours(data['normal'][:1000])
    for name,x in data.items():
        for i in range(int(sys.argv[1]) if sys.argv[1:] else 3):
            (a,c),(b,m) = ours(x),theirs(x, i)
            print(f'{name}: fasterai {1e3*a:.0f} ms, inertia {inertia(x, *c):.2f}; scikit-learn {1e3*b:.0f} ms, inertia {of(x, m):.2f} (×{of(x, m)/inertia(x, *c):.4f}); ×{b/a:.0f} faster', flush=True)
    x = data['normal'][:100_000]
    print(f'100,000 weights: inertia {inertia(x, *kmeans(x, 64)):.4f}, best of ten by scikit-learn {of(x, theirs(x, 0, 10)[1]):.4f}')
