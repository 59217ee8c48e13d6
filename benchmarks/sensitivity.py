"""What a sensitivity scan of resnet18 costs beside its evaluations: compressing and putting back, for each measurement, against evaluating 1,000 images of 224 pixels;
and a whole scan of 21 layers at 9 levels, in which every measurement evaluates 1,000 images of 28 pixels, beside the time of its evaluations

    OMP_NUM_THREADS=1 python benchmarks/sensitivity.py [images to time, 64]"""
import sys
from time import perf_counter
import torch
from torchvision.models import resnet18
from fasterai.analyze.all import sensitivity

def seconds(f):
    start = perf_counter()
    res = f()
    return perf_counter()-start,res

if __name__=='__main__':
    n = int(sys.argv[1]) if len(sys.argv)>1 else 64
    torch.manual_seed(0)
    m,x = resnet18().eval(),torch.randn(32, 3, 224, 224)
    with torch.no_grad():
        m(x)
        own = seconds(lambda: [m(x) for _ in range(n//32)])[0]*1000/n
    print(f'an evaluation of 1,000 images, from {n}: {own:.1f} s')
    for kind in ('sparsity','pruning','bits'):
        cost,s = seconds(lambda: sensitivity(m, lambda m: 0., kind=kind))
        k = len(s.to_df())
        print(f'{kind}: {len(s.metrics)} layers, {k} measurements, {cost:.1f} s without evaluating: {1000*cost/k:.0f} ms each, {cost/k/own:.2%} of an evaluation')
    x,spent = torch.randn(1000, 3, 28, 28),[]
    def evaluate(m):
        t,res = seconds(lambda: sum(float(m(o).sum()) for o in x.split(250)))
        spent.append(t)
        return res
    for kind in ('sparsity','pruning','bits'):
        spent.clear()
        cost,s = seconds(lambda: sensitivity(m, evaluate, kind=kind))
        print(f'{kind}: {len(s.metrics)} layers, {len(s.to_df())} measurements of 1,000 images of 28 pixels: {cost:.1f} s, {sum(spent):.1f} s of it in {len(spent)} evaluations: ×{cost/sum(spent):.4f}', flush=True)
