"What the nine tables share: a recipe, data and a network, training, and results from which a stopped run goes on"
import argparse, hashlib, inspect, json, multiprocessing, os, sys, warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Callable
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT/'tools'))
import torch
from torch import nn, Tensor
import torch.nn.functional as F
from fastai.callback.schedule import fit_one_cycle
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from fastprogress import progress_bar
from data import FASHION, digits, fashion_mnist
from fasterai.sparse.all import Schedule, SparsifyCallback, one_cycle

SPARSITIES = 30,50,70,90  # percent, of tables 1 to 5
STARTS = 'scratch','finetune'
N_SEEDS = 5

# --- Recipe
SMALL = {'fashion-mnist': fashion_mnist, 'digits': digits}  # gray images, on the machine

@dataclass(frozen=True)
class Recipe:
    "What all runs of a page have in common. A result belongs to its recipe"
    data:str='fashion-mnist' # One of `SMALL`, or 'caltech-101'
    path:str='' # Folder of caltech-101, with a folder of images for each class
    device:str='cpu'
    images:int=2000 # To learn from; of caltech-101 all but a fifth
    pretraining:int=20_000 # Other images of the data, for pretrained weights; caltech-101 has those of ImageNet
    pixels:int=224 # Side of an image of caltech-101
    epochs:int=10
    bs:int=64
    lr:float=1e-3
    @property
    def name(self):
        "Of the file with its results: the data, and a digest of all but the path"
        facts = {k:v for k,v in asdict(self).items() if k!='path'}
        return f'{self.data}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]}'

def recipe_of(data='fashion-mnist', path='', device=None): # 'cpu' or 'cuda'; by default a GPU if there is one
    "The recipe for `data`: the paper's settings for caltech-101, shorter ones for small images, with larger batches on a GPU"
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if data=='caltech-101':
        if not Path(path).is_dir() or not path: raise ValueError(f'--path is the folder of caltech-101, with a folder for each class, not {path!r}')
        return Recipe(data, path, device, epochs=30)
    if data not in SMALL: raise ValueError(f'--data is one of {", ".join([*SMALL, "caltech-101"])}, not {data!r}')
    if data=='fashion-mnist' and not FASHION.exists(): raise ValueError(f"there is no {FASHION}: install Debian's package dataset-fashion-mnist, or take --data digits")
    recipe = Recipe(data, device=device)
    if data=='digits': recipe = replace(recipe, images=600, pretraining=700)
    return recipe if device=='cpu' else replace(recipe, bs=256, lr=2e-3)

# --- Network
class Block(nn.Module):
    "Two convolutions beside a shortcut (He et al., arXiv 1512.03385)"
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False),nn.BatchNorm2d(o)
        self.conv2,self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False),nn.BatchNorm2d(o)
        same = i==o and stride==1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
    def forward(self, x): return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))+self.shortcut(x)).relu()

class SmallResNet(nn.Module):
    "A ResNet for small gray images: three stages of `depth` blocks, of 8, 16 and 32 channels"
    stages = 'layer1','layer2','layer3'
    def __init__(self, n_out:int, depth:int=1, widths=(8,16,32)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        for name,i,o in zip(self.stages, (widths[0],*widths), widths):
            blocks = [Block(i, o, 1 if name=='layer1' else 2), *(Block(o, o, 1) for _ in range(depth-1))]
            setattr(self, name, nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[-1], n_out)
    def forward(self, x):
        x = self.stem(x)
        for name in self.stages: x = getattr(self, name)(x)
        return self.fc(x.mean((2,3)))

# --- Data
class Batches(DataLoader):
    "Batches of images, as bytes, and labels: images come with mean 0 and variance 1"
    n_inp = 1
    def __init__(self, x, y, norm, **kwargs):
        super().__init__(range(len(x)), **kwargs)
        self.x,self.y,self.norm = x,y,norm
    def create_batches(self, samps):
        for i in torch.tensor(list(samps), device=self.x.device).split(self.bs): yield self.norm(self.x[i]),self.y[i]

@dataclass
class Normalize:
    "Bytes as floats, less the mean, by the standard deviation"
    mean:Tensor # [channels, 1, 1]
    std:Tensor
    def __call__(self, x): return (x.float()/255-self.mean)/self.std

def read_small(recipe):
    "Bytes [n, 1, h, w] and labels: to learn from, for validation and for pretraining"
    (x,y),(vx,vy),_ = SMALL[recipe.data]()
    n,end = recipe.images,recipe.images+recipe.pretraining
    as_bytes = lambda x: torch.from_numpy((255*x).round().astype('uint8'))[:,None]
    parts = (x[:n],y[:n]),(vx,vy),(x[n:end],y[n:end])
    return [(as_bytes(a), torch.from_numpy(b.copy())) for a,b in parts]

def read_folders(recipe, valid=.2):
    "Bytes [n, 3, h, w] and labels of a folder of images for each class: to learn from, and a fifth of them for validation"
    from PIL import Image
    from torchvision.transforms import v2
    size = v2.Compose([v2.Resize(recipe.pixels), v2.CenterCrop(recipe.pixels), v2.PILToTensor()])
    folders = sorted(o for o in Path(recipe.path).iterdir() if o.is_dir())
    files = [(f,i) for i,o in enumerate(folders) for f in sorted(o.iterdir()) if f.suffix.lower() in ('.jpg','.png')]
    if not files: raise ValueError(f'{recipe.path} has no folders with images')
    x,y = torch.stack([size(Image.open(f).convert('RGB')) for f,_ in files]),torch.tensor([i for _,i in files])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    n = int(len(x)*valid)
    return [(x[i],y[i]) for i in (order[n:],order[:n])]

class Bench:
    "Data, networks and training of a recipe"
    def __init__(self, recipe):
        if recipe.device=='cpu': torch.set_num_threads(1)
        self.recipe,self.large = recipe,recipe.data=='caltech-101'
        parts = (read_folders if self.large else read_small)(recipe)
        self.train,self.valid,*self.other = [(x.to(recipe.device), y.to(recipe.device)) for x,y in parts]
        self.n_out = int(self.train[1].max())+1
        if self.large: mean,std = torch.tensor([.485,.456,.406]),torch.tensor([.229,.224,.225])  # of ImageNet, as its weights expect
        else: std,mean = torch.std_mean(parts[0][0].float()/255)
        self.norm = Normalize(*(o.view(-1,1,1).to(recipe.device) for o in (mean,std)))
        self.pretrained = lru_cache(self.pretrained)

    def new(self, deep=False):
        "A network with random weights"
        if not self.large: return SmallResNet(self.n_out, 2 if deep else 1).to(self.recipe.device)
        from torchvision.models import resnet18, resnet34
        model = (resnet34 if deep else resnet18)(num_classes=self.n_out).to(self.recipe.device)
        model.stages = 'layer1','layer2','layer3','layer4'
        return model

    def pretrained(self, deep=False):
        "State of a network that has learned from other images, without its last layer"
        if self.large: state = torch.load(weights_file(deep), weights_only=True)
        else:
            set_seed(len(self.train[0]))  # of no run
            model = self.new(deep)
            self.fit(model, 2, lr=5e-3, data=self.other[0], one_cycle=True)
            state = model.state_dict()
        return {k:v for k,v in state.items() if not k.startswith('fc.')}

    def network(self, seed, start='scratch', deep=False):
        "A network before a run, which draws its numbers from `seed`"
        if start not in STARTS: raise ValueError(f'start {start!r} is not one of {", ".join(STARTS)}')
        state = self.pretrained(deep) if start=='finetune' else {}
        set_seed(seed)
        model = self.new(deep)
        if state: model.load_state_dict(state, strict=False)  # the last layer is new
        return model

    def fit(self, model, epochs=None, cbs=None, lr=None, data=None, one_cycle=False):
        "Train with Adam at a constant rate; nothing is validated on the way"
        x,y = self.train if data is None else data
        bs = min(self.recipe.bs, len(x))
        dls = DataLoaders(Batches(x, y, self.norm, bs=bs, shuffle=True, drop_last=True), Batches(x[:1], y[:1], self.norm, bs=bs))
        learn = Learner(dls, model, loss_func=F.cross_entropy, opt_func=Adam)
        with learn.no_bar(), learn.no_logging():
            (learn.fit_one_cycle if one_cycle else learn.fit)(epochs or self.recipe.epochs, lr or self.recipe.lr, cbs=cbs)

    @torch.no_grad()
    def classes(self, model):
        "What the network takes the validation images for"
        model.eval()
        return torch.cat([model(self.norm(x)).argmax(1) for x in self.valid[0].split(500)])

    def measured(self, model):
        "Accuracy on the validation images, and zeros in the weights of convolutions, in percent"
        ws = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
        zeros = sum(int((w==0).sum()) for w in ws)/sum(w.numel() for w in ws)
        return dict(accuracy=self.right(self.classes(model)), zeros=100*zeros)

    def right(self, classes): "Percent of the validation images"; return 100*int((classes==self.valid[1]).sum())/len(classes)

bench_of = lru_cache(Bench)

def weights_file(deep=False):
    "Where torchvision keeps ImageNet's weights on this machine"
    from torchvision.models import ResNet18_Weights, ResNet34_Weights
    url = (ResNet34_Weights if deep else ResNet18_Weights).DEFAULT.url
    return Path(torch.hub.get_dir())/'checkpoints'/url.rpartition('/')[2]

# --- Runs
@dataclass(frozen=True)
class Run:
    "A training: `f(bench, seed, **args)` gives numbers by name"
    f:Callable
    args:tuple
    def __call__(self, bench, seed): return self.f(bench, seed, **dict(self.args))
    @property
    def key(self): return f'{self.f.__name__}({", ".join(f"{k}={v!r}" for k,v in self.args)})'
    @property
    def starts_trained(self): "Does it need pretrained weights?"; return 'finetune' in dict(self.args).values()

def run(f, **args): # What trains; its arguments
    "A `Run` with all arguments of `f`, so that two tables that ask for the same share it"
    bound = inspect.signature(f).bind(None, None, **args)
    bound.apply_defaults()
    return Run(f, tuple(sorted(list(bound.arguments.items())[2:])))

def dense(bench, seed, start='scratch', rounds=1): # Trainings of the recipe's length, one after the other
    model = bench.network(seed, start)
    bench.fit(model, rounds*bench.recipe.epochs)
    return bench.measured(model)

def sparsified(bench, seed, start, sparsity, granularity='weight', context='local', criteria='large_final', schedule=one_cycle):
    model = bench.network(seed, start)
    bench.fit(model, cbs=SparsifyCallback(sparsity, granularity, context, criteria, schedule))
    return bench.measured(model)

def one(recipe, run, seed): "The numbers of a run, also in a process of its own"; return run(bench_of(recipe), seed)

class Results:
    "Finished runs of a recipe: lines of a file, each a run, a seed and numbers"
    def __init__(self, recipe, folder):
        self.path,self.found = Path(folder)/f'{recipe.name}.jsonl',defaultdict(dict)
        if not self.path.exists(): return
        *lines,rest = self.path.read_text(encoding='utf-8').split('\n')
        if rest:  # a process was killed while it wrote
            warnings.warn(f'the last line of {self.path} is not whole: its run is done again')
            self.path.write_text(''.join(f'{o}\n' for o in lines), encoding='utf-8')
        for o in map(json.loads, lines): self.found[o['run']][o['seed']] = o['result']
    def add(self, run, seed, result):
        self.found[run.key][seed] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'a', encoding='utf-8') as f: f.write(json.dumps(dict(run=run.key, seed=seed, result=result))+'\n')
    def of(self, run): "Numbers by seed"; return self.found.get(run.key, {})

def left_out(recipe, runs):
    "Those of `runs` that need pretrained weights that are not on this machine"
    if recipe.data!='caltech-101' or weights_file().exists() and weights_file(True).exists(): return []
    return [o for o in runs if o.starts_trained]

def work(runs, recipe, results, n_seeds=N_SEEDS, processes=1): # Runs in the order in which they are wanted
    "Do those of `runs` that have no result yet: with two seeds first, which tell something of the spread, then with the others"
    missing = left_out(recipe, runs)
    if missing:
        files = ' or '.join(weights_file(deep).name for deep in (False,True))
        warnings.warn(f"{len(missing)} of {len(runs)} runs start from ImageNet's weights, and {weights_file().parent} lacks {files}: they are left out")
    first = min(2, n_seeds)
    todo = [(o,s) for seeds in (range(first),range(first, n_seeds)) for o in runs for s in seeds if o not in missing and s not in results.of(o)]
    if processes==1:
        for o,s in progress_bar(todo): results.add(o, s, one(recipe, o, s))
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context('spawn'))
    try:
        jobs = {pool.submit(one, recipe, o, s):(o,s) for o,s in todo}
        for job in progress_bar(as_completed(jobs), total=len(jobs)): results.add(*jobs[job], job.result())
    finally: pool.shutdown(cancel_futures=True)

def arguments(description):
    "What the command line says"
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--data', default='fashion-mnist', help=f'{", ".join(SMALL)} or caltech-101')
    p.add_argument('--path', default='', help='folder of caltech-101, with a folder for each class')
    p.add_argument('--device', help='cpu or cuda; by default a GPU if there is one')
    p.add_argument('--seeds', type=int, default=N_SEEDS, help='how many, from 0')
    p.add_argument('--processes', type=int, default=min(os.cpu_count(), 8), help='with one thread each')
    p.add_argument('--folder', default=str(ROOT/'build/paper'), help='where results are kept, and found again')
    return p
