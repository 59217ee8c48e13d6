"Time to find which channels of a network are the same, and go together: best of three, one image of 224 pixels"
import time
import torch, torchvision
from rows import attempt, main, tell

SECONDS = 60  # that a network may take

def best(f, n):
    "Shortest of `n` times, in seconds"
    times = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter()-start)
    return min(times)

def measured(find): # Function of a model and its inputs
    def way(case):
        for name in case.split():
            torch.manual_seed(0)
            model,x = torchvision.models.get_model(name, weights=None).eval(),torch.randn(1, 3, 224, 224)
            with torch.no_grad(): forward = best(lambda: model(x), 4)
            with attempt(name, 'ms', seconds=SECONDS): tell(name, 1e3*best(lambda: find(model, x), 3), 'ms', 'low', detail=f'a forward pass: {1e3*forward:.0f}')
    return way

def ours(model, x):
    from fasterai.core.graph import ChannelGraph
    ChannelGraph(model, x)

def torch_pruning(model, x):
    import torch_pruning as tp
    tp.DependencyGraph().build_dependency(model, example_inputs=x)

WAYS = {'ours':measured(ours), 'torch-pruning':measured(torch_pruning)}
LACKS = {'fasterai 0.4.1':'takes the graph of torch-pruning', 'torch-simplify':'follows channels while it removes them', 'torch.nn.utils.prune':'looks at one layer at a time'}

if __name__=='__main__': main(WAYS, LACKS)
