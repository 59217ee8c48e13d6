"""What half of the channels is worth in time: MACs and latency before and after `Pruner(model, 50, round_to=8)`, in turn, in both layouts.

    OMP_NUM_THREADS=2 python benchmarks/speed.py [names]      default: resnet18 resnet50 mobilenet_v2 vgg16_bn; one image of 224 px, medians of 15
"""
import sys
from copy import deepcopy
import torch, torchvision
from fasterai.prune.all import Pruner
from fasterai.report.all import report

def measure(name, x, threads=2, repeats=15):
    torch.manual_seed(0)
    before = torchvision.models.get_model(name, num_classes=1000).eval()
    after = Pruner(deepcopy(before), 50, round_to=8, example_inputs=x).prune_model()
    return report(before, after, example_inputs=x, channels_last=True, threads=threads, repeats=repeats, progress=False)

if __name__=='__main__':
    x = torch.randn(1, 3, 224, 224)
    print('| | MACs | eager | both channels-last |\n|---|---|---|---|')
    for name in sys.argv[1:] or ('resnet18','resnet50','mobilenet_v2','vgg16_bn'):
        rep = measure(name, x)
        a,b = rep.iloc[0],rep.iloc[1]
        def times(k): return f'{a[f"{k}ms"]:.1f} → {b[f"{k}ms"]:.1f} ms, ×{b[f"{k}speedup"]:.2f} ({b[f"{k}speedup_low"]:.2f} to {b[f"{k}speedup_high"]:.2f})'
        print(f'| {name} | ×{b.macs_ratio:.2f} | {times("")} | {times("cl_")} |', flush=True)
