"""Time to find which channels are the same channel, beside one forward and beside torch-pruning's dependency graph, in turn.

A process for each model and each of us, so that one that does not end is stopped; needs `pip install torch-pruning` for the comparison.

    python benchmarks/graph.py [models …]
"""
import subprocess, sys, time
import torch, torchvision
from fasterai.core.graph import ChannelGraph
from fasterai.core.running import call_with, untouched

MODELS = 'resnet18 resnet50 mobilenet_v2 densenet121 shufflenet_v2_x1_0 convnext_tiny vit_b_16 swin_t'.split()
LIMIT = 120  # seconds that a graph may take

def best(f, n):
    "Shortest of `n` times, in seconds"
    ts = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        ts.append(time.perf_counter()-start)
    return min(ts)

def one(name, who):
    "Seconds for a forward and for a graph of `name`, both at one image of 224 pixels, and for a graph at a size of its own choice"
    torch.manual_seed(0)
    model,x = torchvision.models.get_model(name, weights=None).eval(),torch.randn(1,3,224,224)
    def forward():
        with untouched(model): call_with(model, x)
    forward()
    times = [best(forward, 5)]
    if who=='ours': times += [best(lambda: ChannelGraph(model, x), 3), best(lambda: ChannelGraph(model), 3)]
    else:
        import torch_pruning as tp
        times.append(best(lambda: tp.DependencyGraph().build_dependency(model, x), 3))
    print(*times)

def asked(name, who):
    "What a process for `name` says, or why it says nothing"
    try: r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', name, who], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired: return f'over {LIMIT} s'
    return list(map(float, r.stdout.split())) if not r.returncode else r.stderr.strip().splitlines()[-1][:60]

if __name__=='__main__':
    if sys.argv[1:2]==['--one']: one(*sys.argv[2:])
    else:
        print(f'torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds, best of 3')
        for name in sys.argv[1:] or MODELS:
            ours,theirs = asked(name, 'ours'),asked(name, 'theirs')
            if isinstance(ours, str): sys.exit(f'{name}: {ours}')
            fwd,graph,own = (1e3*o for o in ours)
            them = theirs if isinstance(theirs, str) else f'{1e3*theirs[1]:6.0f} = ×{theirs[1]/ours[1]:.1f} of ours'
            print(f'{name:20} forward {fwd:5.0f}, graph {graph:5.0f} = ×{graph/fwd:4.1f}, at its own size {own:5.0f} = ×{own/fwd:4.1f}; torch-pruning {them}', flush=True)
