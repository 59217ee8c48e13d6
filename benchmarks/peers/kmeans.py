"k-means of weights: time, and inertia, the sum of squared distances to the nearest centre. Weights are normal, as at the start of training, or heavy-tailed"
import time
import torch
from rows import attempt, main, tell

CLUSTERS = 64
DATA = { # distribution, how many weights, how often scikit-learn begins: it keeps the best
    'normal, a million': (torch.distributions.Normal, 1_000_000, 1), 'heavy-tailed (Laplace), a million': (torch.distributions.Laplace, 1_000_000, 1),
    'normal, 100,000, the best of ten': (torch.distributions.Normal, 100_000, 10)}

def measured(cluster): # Function of weights and a number of beginnings that gives centres, and for each weight the number of its centre
    def way(case):
        for name,(kind,n,beginnings) in DATA.items():
            torch.manual_seed(0)
            x = kind(0., 1.).sample((n,))
            with attempt(name, 's', 'inertia'):
                cluster(x[:1000], 1)
                start = time.perf_counter()
                values,codes = cluster(x, beginnings)
                took = time.perf_counter()-start
                tell(name, took, 's', 'low')
                tell(name, (x.double()-values.double()[codes]).square().sum().item(), 'inertia', 'low')
    return way

def ours(x, beginnings): # One is enough
    from fasterai.quantize.kmeans import kmeans
    return kmeans(x, CLUSTERS)

def scikit(x, beginnings):
    from sklearn.cluster import KMeans
    m = KMeans(CLUSTERS, n_init=beginnings, random_state=0).fit(x.numpy()[:,None])
    return torch.from_numpy(m.cluster_centers_[:,0]),torch.from_numpy(m.labels_).long()

WAYS = {'ours':measured(ours), 'scikit-learn':measured(scikit)}
LACKS = dict.fromkeys(('fasterai 0.4.1','torch-pruning','torch-simplify','torch.nn.utils.prune'), 'shares no weights')

if __name__=='__main__': main(WAYS, LACKS)
