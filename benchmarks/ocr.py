"""A page of words, read by a trained network as it is, with half of its channels gone, and repaired; then the whole road to a small file.

Nothing is trained, and no label is used: 40 rendered words are all that repair looks at. The page is in a picture (`nbs/images/ocr.png`); the table counts words in
fonts and in cases that repair has not seen, milliseconds a word, and bytes of a file. See `trained.py` for where the network comes from.

    python benchmarks/ocr.py [--words 500] [--picture FILE]
    python benchmarks/ocr.py --photos      the same question to an ImageNet classifier: how often it agrees with what it was
"""
import argparse, statistics, tempfile, time, warnings
from copy import deepcopy
from pathlib import Path
import matplotlib.pyplot as plt
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import nn
from fasterai.analyze.all import n_macs, n_params
from fasterai.misc.all import BN_Folder
from fasterai.prune.all import Pruner
from fasterai.quantize.all import KMeansQuantizer, save_compressed
from fasterai.repair.all import repair
from trained import classifier, crops, read, reader, words

RATIO,BITS = 50,6

def clock(f):
    "Seconds that `f` takes, and what it gives"
    start = time.perf_counter()
    res = f()
    return time.perf_counter()-start, res

def cut(model, example_inputs, **kwargs):
    "A copy of `model` without half of its channels"
    new = deepcopy(model)
    Pruner(new, RATIO, example_inputs=example_inputs, **kwargs).prune_model()
    return new

# the page

def show_page(models, page, path):
    "Write a picture of `page`, a list of words and images, as each of `models` reads it: by name"
    fig,axs = plt.subplots(1, len(models), figsize=(4*len(models), .42*len(page)+.8))
    for ax,(name,model) in zip(axs, models.items()):
        found = [read(model, x) for _,x in page]
        ax.set(xlim=(0, 500), ylim=(len(page), 0))
        ax.axis('off')
        right = sum(o==word for o,(word,_) in zip(found, page))
        ax.set_title(f'{name}\n{n_params(model)/1e6:.1f} M parameters, {right} of {len(page)} words', fontsize=10)
        for i,((word,x),text) in enumerate(zip(page, found)):
            ax.imshow(x[0,0], cmap='gray', extent=(0, min(x.shape[-1], 240), i+.9, i+.1), aspect='auto')
            ax.text(260, i+.5, text[:16] or '(nothing)', va='center', family='monospace', color='tab:green' if text==word else 'tab:red')
    fig.tight_layout()
    fig.savefig(path, dpi=110)

# the road

def plain_bytes(model, folder):
    save_file({k:v.contiguous() for k,v in model.state_dict().items()}, folder/'plain')
    return (folder/'plain').stat().st_size

def small_bytes(model, folder):
    save_compressed(model, folder/'small')
    return (folder/'small').stat().st_size

@torch.no_grad()
def times(models, inputs, rounds=5):
    "Milliseconds of each model for an input, in turn: medians"
    found = {name:[] for name in models}
    for _ in range(rounds):
        for name,model in models.items(): found[name].append(clock(lambda: [model(x) for x in inputs])[0]/len(inputs)*1e3)
    return {name:statistics.median(ts) for name,ts in found.items()}

def road(n, picture):
    dense,seen = reader(),[x for _,x in words(40, 1, slice(0, None, 2))]
    unseen = words(n, 2, slice(1, None, 2), (str.lower,str.upper,str.title))
    models = {'as it was trained': dense, 'half of the channels gone': cut(dense, seen[0])}
    seconds,models['gone, and repaired without training'] = clock(lambda: cut(dense, seen[0], criteria='obs', data=seen, repair=True))
    print(f'cut by half and repaired in {seconds:.0f} s, with {torch.get_num_threads()} threads')
    show_page(models, words(14, 5, slice(1, None, 2), (str.lower,str.title)), picture)
    models['and folded'] = BN_Folder(example_inputs=seen[0]).fold(models['gone, and repaired without training'])
    shared = models[f'and shared, {BITS} bits'] = KMeansQuantizer(BITS).quantize(deepcopy(models['and folded']))
    repair(shared, models['and folded'], seen)
    ms = times(models, seen[:10])
    right = {name: sum(read(m, x)==word for word,x in unseen) for name,m in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        rows = [dict(model=name, parameters=n_params(m), macs=n_macs(m, seen[0]), ms=round(ms[name], 2), plain=plain_bytes(m, Path(folder)), file=small_bytes(m, Path(folder)),
            words=f'{right[name]} of {len(unseen)}') for name,m in models.items()]
    print(pd.DataFrame(rows).to_string(index=False))

# the classifier

def agreement(dense, model, x):
    with torch.no_grad(): return 100*torch.cat([model(o).argmax(1)==dense(o).argmax(1) for o in x.split(50)]).float().mean().item()

def photos_of(dense, ratio, per_photo, n, criteria):
    "Agreement with `dense` of it without `ratio` percent of its channels, as cut and repaired: on other crops of the photos that repair has seen, and on crops of others"
    half = slice(0, None, 2)
    seen,same,others = crops(per_photo, 1, half)[0],crops(n, 2, half)[0],crops(n, 3, slice(1, None, 2))[0]
    data = list(seen.split(20))
    def made(**kwargs):
        m = deepcopy(dense)
        Pruner(m, ratio, criteria=criteria, example_inputs=seen[:1], data=data, **kwargs).prune_model()
        return m
    rows = []
    for how,kwargs in dict(cut={}, repaired=dict(repair=True)).items():
        seconds,m = clock(lambda: made(**kwargs))
        rows.append(dict(criteria=criteria, model=how, macs=100*n_macs(m, seen[:1])/n_macs(dense, seen[:1]), seen=agreement(dense, m, same), unseen=agreement(dense, m, others), seconds=seconds))
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--words', type=int, default=500)
    p.add_argument('--picture', type=Path, default=Path(__file__).parents[1]/'nbs'/'images'/'ocr.png')
    p.add_argument('--photos', action='store_true')
    o = p.parse_args()
    warnings.simplefilter('ignore')
    if not o.photos: return road(o.words, o.picture)
    dense = classifier()
    print(pd.DataFrame([row for c in ('large_final','obs') for row in photos_of(dense, 18, 32, 50, c)]).round(1).to_string(index=False))

if __name__=='__main__': main()
