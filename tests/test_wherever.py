"""Right wherever it is used: tensors of other classes, wrappers, hooks, modes and memory formats change nothing, what cannot be followed
is refused with the reason, and whoever gets less than was asked for is told."""
import copy, tempfile, warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from fastai.callback.core import Callback
from fastai.callback.hook import ActivationStats, hook_outputs
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.torch_core import TensorBase, TensorCategory, TensorImage
from fastai.vision.models.unet import DynamicUnet
from fasterai.analyze.counts import n_macs
from fasterai.callback import two_of
from fasterai.core.brought import check_values
from fasterai.core.flow import Flow
from fasterai.core.graph import ChannelGraph
from fasterai.core.running import (Bystanders, at_home, call_with, map_parts, plain, plain_model, readers_of,
    tensors_of, untouched, without_readers)
from fasterai.prune.all import PruneCallback, Pruner, load_pruned, save_pruned
from fasterai.prune.pruner import pruned_plan
from fasterai.sparse.all import Sparsifier, SparsifyCallback
from tiny import At, Items, Net, fit, learner, raises, same, state

DDP,Averaged = nn.parallel.DistributedDataParallel,torch.optim.swa_utils.AveragedModel

# --- three networks, each with two dead channels of six

def conv(i, o, n=2, **kw): return getattr(nn, f'Conv{n}d')(i, o, 3, padding=1, **kw)

class Images(nn.Module):
    "A residual connection, a norm and a depthwise convolution"
    def __init__(self):
        super().__init__()
        self.stem,self.norm,self.deep,self.out,self.head = conv(3,6),nn.BatchNorm2d(6),conv(6,6,groups=6),conv(6,8),nn.Linear(8,3)
    def dead(self): return self.stem.weight,self.stem.bias,self.norm.weight,self.norm.bias,self.deep.weight,self.deep.bias
    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(self.out(x+self.deep(x))).mean((2,3)))
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))

class Sound(nn.Module):
    "One dimension, a gate, group norm"
    def __init__(self):
        super().__init__()
        self.a,self.norm,self.b,self.head = conv(2,6,1),nn.GroupNorm(6,6),conv(6,8,1),nn.Linear(4,3)
    def dead(self): return self.a.weight,self.a.bias,self.norm.weight,self.norm.bias
    def forward(self, x): return self.head(F.glu(self.b(F.silu(self.norm(self.a(x)))), 1).amax(-1))
    x = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0))

class Tokens(nn.Module):
    "Embedded tokens and an MLP"
    def __init__(self):
        super().__init__()
        self.emb,self.up,self.down,self.head = nn.Embedding(11,5),nn.Linear(5,6),nn.Linear(6,5),nn.Linear(5,3)
    def dead(self): return self.up.weight,self.up.bias
    def forward(self, ids): return self.head((self.emb(ids)+self.down(F.gelu(self.up(self.emb(ids))))).mean(1))
    x = torch.randint(0, 11, (2,7), generator=torch.Generator().manual_seed(0))

KINDS = [Images,Sound,Tokens]
def n_params(m): return sum(p.numel() for p in m.parameters())
def fresh(kind): torch.manual_seed(1); return kind().eval()
def zeroed(m):
    with torch.no_grad():
        for p in m.dead(): p[[1,4]] = 0
    return m
def n_hooks(m):
    kinds = '_forward_hooks','_forward_pre_hooks','_backward_hooks','_backward_pre_hooks'
    return sum(len(getattr(o, k)) for o in m.modules() for k in kinds)

SMALL = {k:n_params(Pruner().prune_model(zeroed(fresh(k)), k.x)) for k in KINDS}
HALF = {k:n_params(Pruner(fresh(k), 50, example_inputs=k.x).prune_model()) for k in KINDS}

def both_ways(kind, inputs, around=nullcontext, wrap=lambda m: m, given=lambda m: m):
    "Lossless and by ratio, silently and as far as with plain inputs; the two models"
    a,b = wrap(zeroed(fresh(kind))),wrap(fresh(kind))
    with warnings.catch_warnings(), around():
        warnings.simplefilter('error', UserWarning)
        small,half = Pruner().prune_model(given(a), inputs),Pruner(given(b), 50, example_inputs=inputs).prune_model()
    assert (n_params(small),n_params(half))==(SMALL[kind],HALF[kind])<(n_params(fresh(kind)),)*2
    return small,half

# --- tensors

class Traced(torch.Tensor):
    "A class with a protocol of its own, which counts how often it is asked"
    asked = 0
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked += 1
        return super().__torch_function__(func, types, args, kwargs or {})

WAYS = dict(image=TensorImage, own=lambda x: x.as_subclass(Traced), tuple=lambda x: (TensorImage(x),), list=lambda x: [TensorBase(x)],
    numpy=lambda x: x.cpu().numpy(), arrays=lambda x: (x.cpu().numpy(),), double=lambda x: x.double() if x.is_floating_point() else x.int(),
    expanded=lambda x: x[:1].expand(2, *x.shape[1:]), gradient=lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    strided=lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('way', WAYS)
def test_inputs_of_all_kinds(kind, way): both_ways(kind, WAYS[way](kind.x))

@pytest.mark.parametrize('kind', KINDS)
def test_inputs_made_in_inference_mode(kind):
    with torch.inference_mode(): x = kind.x*1
    both_ways(kind, x)

@dataclass
class Sample:
    image:object
    scale:float = 1.

class Bag:
    def __init__(self, **kw): vars(self).update(kw)

HOLDERS = dict(dataclass=Sample, object=lambda x: Bag(image=x, scale=1.), itself=lambda x: Bag(image=x, scale=torch.ones(()), me=None))

@pytest.mark.parametrize('hold', HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize('cls', [TensorImage,lambda x: x.cpu().numpy(),lambda x: x.double()], ids=['image','numpy','double'])
def test_whatever_holds_them(hold, cls):
    def wrap(m): return Net(lambda m,o: dict(out=m.m(o.image*o.scale)), m=m)
    o = hold(cls(Images.x))
    if hasattr(o, 'me'): o.me = o
    both_ways(Images, (o,), wrap=wrap)
    assert isinstance(o.image, type(cls(Images.x)))

def test_layers_that_return_a_class_of_their_own():
    class Says(nn.Module):
        def __init__(self, m): super().__init__(); self.m = m
        def forward(self, x): return TensorImage(self.m(x.as_subclass(Traced)))
    def wrap(m):
        m.stem,m.out = Says(m.stem),Says(m.out)
        return Says(m)
    def dead(m): return wrap(zeroed(m))
    a,b = dead(fresh(Images)),wrap(fresh(Images))
    small,half = Pruner().prune_model(a, Images.x),Pruner(b, 50, example_inputs=Images.x).prune_model()
    assert (n_params(small),n_params(half))==(SMALL[Images],HALF[Images]) and type(small(Images.x)) is TensorImage

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('cls', [TensorBase,lambda t: t.as_subclass(Traced)], ids=['fastai','own'])
def test_parameters_of_other_classes(kind, cls):
    def wrap(m):
        for o in m.modules():
            for k,p in o._parameters.items(): o._parameters[k] = None if p is None else nn.Parameter(cls(p.detach().clone()))
            for k,p in o._buffers.items(): o._buffers[k] = None if p is None else cls(p.clone()) if p.dim() else p
        return m
    both_ways(kind, kind.x, wrap=wrap)

def test_data_of_other_classes():
    "Batches as fastai makes them give the same gradients and norms of activations as plain ones"
    x,y = torch.randn(8, 3, 9, 9),torch.randint(0, 3, (8,))
    for criteria in ('taylor','wanda'):
        plans = []
        for data in ((x,y), (TensorImage(x),TensorCategory(y)), (x.cpu().numpy(),y), [(TensorImage(x),TensorCategory(y))]):
            Pruner(m := fresh(Images), 50, criteria=criteria, example_inputs=x[:2], data=data).prune_model()
            plans.append(pruned_plan(m)['kept'])
        with torch.inference_mode(): data = x*1,y*1
        Pruner(m := fresh(Images), 50, criteria=criteria, example_inputs=x[:2], data=data).prune_model()
        assert all(o==plans[0] for o in [*plans,pruned_plan(m)['kept']])

def test_parts():
    "`map_parts` copies what changes alone, and bears what holds itself"
    bag,x = Bag(a=[torch.ones(2)], n=3),torch.zeros(2)
    bag.me = bag
    new = map_parts(lambda o: o+1 if isinstance(o, torch.Tensor) else o, bag)
    assert new is not bag and new.n==3 and new.a[0].tolist()==[2,2] and bag.a[0].tolist()==[1,1] and len(tensors_of(bag))==1
    assert plain(x) is x and plain(3)==3 and type(plain(TensorImage(x))) is torch.Tensor

WRONG = [((1,3,16,16), r'pass a tensor, torch.randn\(1, 3, 16, 16\)'), ([2,3,9,9], 'pass a tensor'), (torch.Size([2,3,9,9]), 'pass a tensor'),
    (((3,9,9),(2,)), 'pass a tensor'), (torch.randn(1,1,9,9), 'stem, a Conv2d, takes 3 channels'), (dict(y=torch.zeros(1,3,9,9)), 'y: float32'),
    (np.zeros((1,4,9,9)), r'float32 \[1, 4, 9, 9\].*takes 3 channels'), ('cat.jpg', "'cat.jpg'.*[Pp]ass a tensor"), (np.array(['a']), 'pass a tensor'),
    (torch.zeros(2,3,9,9,device='meta'), 'meta device'), (torch.zeros(2,3,9,9,dtype=torch.long), 'int64')]

@pytest.mark.parametrize('inputs,said', WRONG, ids=map(str, range(len(WRONG))))
def test_inputs_that_do_not_fit(inputs, said):
    for f in (lambda m: Pruner().prune_model(m, inputs), lambda m: Pruner(m, 50, example_inputs=inputs).prune_model()):
        m = zeroed(fresh(Images))
        was = state(m)
        with pytest.raises(ValueError, match=f'(?s){said}'): f(m)
        assert same(was, state(m))

# --- what is set around the call

@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try: yield
    finally: torch.set_default_dtype(torch.float32)

@contextmanager
def default_device():
    was = torch.empty(0).device
    torch.set_default_device('meta')
    try: yield
    finally: torch.set_default_device(None if was.type=='cpu' else was)

@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try: yield
    finally: torch.use_deterministic_algorithms(False)

def autocast(): return torch.autocast('cpu', torch.bfloat16)
def meta(): return torch.device('meta')
AROUND = dict(inference=torch.inference_mode, no_grad=torch.no_grad, autocast=autocast, meta=meta, default_meta=default_device, double=default_dtype,
    deterministic=deterministic)

@pytest.mark.parametrize('around', AROUND)
@pytest.mark.parametrize('kind', KINDS)
def test_modes(kind, around):
    for o in both_ways(kind, kind.x, AROUND[around]):
        assert not any(p.is_inference() or p.is_meta or p.dtype!=torch.float32 for p in o.parameters())
        o(kind.x).sum().backward()
    m = zeroed(fresh(kind))
    with AROUND[around](): small = Pruner().prune_model(m)  # inputs are found there as well
    assert n_params(small)==SMALL[kind]

@pytest.mark.parametrize('around', [torch.inference_mode,meta,autocast])
@pytest.mark.parametrize('criteria', ['taylor','wanda','movement'])
def test_data_in_a_mode(around, criteria):
    data,models = (torch.randn(8, 3, 9, 9),torch.randint(0, 3, (8,))),[fresh(Images),fresh(Images)]
    for m,a in zip(models, (nullcontext,around)):
        with a(): Pruner(m, 50, criteria=criteria, example_inputs=Images.x, data=data).prune_model()
    assert pruned_plan(models[0])['kept']==pruned_plan(models[1])['kept']

def test_a_model_made_in_inference_mode():
    with torch.inference_mode(): a,b = zeroed(fresh(Images)),fresh(Images)
    small,half = Pruner().prune_model(a, Images.x),Pruner(b, 50, example_inputs=Images.x).prune_model()
    assert (n_params(small),n_params(half))==(SMALL[Images],HALF[Images])
    small(Images.x).sum().backward()

def test_all_digits_of_a_float():
    "What is compared is computed with all digits; what the user has set comes back, also after an error"
    cudnn,was = torch.backends.cudnn,(torch.backends.cudnn.allow_tf32,torch.get_float32_matmul_precision())
    told = lambda: (cudnn.allow_tf32,torch.get_float32_matmul_precision())
    try:
        for tf32,products in ((True,'medium'),(True,'highest'),(False,'high')):
            cudnn.allow_tf32 = tf32
            torch.set_float32_matmul_precision(products)
            with pytest.raises(KeyError), untouched(m := nn.Linear(2,2)):
                assert told()[1]=='highest' and not (told()[0] and (m.weight.is_cuda or products!='highest'))
                raise KeyError
            assert told()==(tf32,products)
    finally:
        cudnn.allow_tf32 = was[0]
        torch.set_float32_matmul_precision(was[1])

def test_a_device_that_is_set_inside_of_a_call_of_ours():
    "It is the one that the model sees, as where a shell of it is tried on the meta device"
    seen = []
    m = Net(lambda m,x: (seen.append(torch.empty(1).device.type), m.m(x))[1], m=nn.Linear(4,4).to('meta'))
    with at_home(), torch.device('meta'), untouched(m):
        assert torch.empty(1).device.type=='cpu'
        call_with(m, torch.empty(2,4,device='meta'))
    assert seen==['meta']

def test_the_model_sees_the_default_device():
    "Code of the model may count on the default device; ours does not"
    seen = []
    m = Net(lambda m,x: (seen.append(torch.empty(1).device.type), m.m(x))[1], m=nn.Linear(4,4).to('meta'))
    with torch.device('meta'), at_home():
        assert torch.empty(1).device.type=='cpu'
        with untouched(m): call_with(m, torch.zeros(2,4,device='meta'))
    with torch.device('meta'), untouched(n := Net(m.f, m=nn.Linear(4,4,device='cpu'))): call_with(n, torch.zeros(2,4,device='cpu'))
    assert seen==['meta','cpu']

def test_training_mode_comes_back():
    m = zeroed(fresh(Images)).train()
    m.norm.eval()
    was = [o.training for o in m.modules()]
    small = Pruner().prune_model(m, Images.x)
    Pruner(m, 50, example_inputs=Images.x).prune_model()
    assert [o.training for o in m.modules()]==[o.training for o in small.modules()]==was

def test_meta_models():
    m = fresh(Images).to('meta')
    graph = ChannelGraph(m, Images.x.to('meta'))
    assert [(s.name,s.dim,s.role) for s in graph.slices]==[(s.name,s.dim,s.role) for s in ChannelGraph(fresh(Images), Images.x).slices]
    with pytest.raises(ValueError, match='stem.weight is on the meta device'): Pruner().prune_model(m, Images.x)
    with pytest.raises(ValueError, match='stem.weight is on the meta device'): Pruner(m, 50, example_inputs=Images.x).prune_model()

# --- wrappers

@pytest.fixture(scope='module')
def group():
    "A process group of one"
    import torch.distributed as dist
    with tempfile.TemporaryDirectory() as d:
        dist.init_process_group('gloo', init_method=f'file://{d}/store', rank=0, world_size=1)
        yield
        dist.destroy_process_group()

compiled = partial(torch.compile, backend='eager')

class Holder(nn.Module):
    "Holds a model, and cannot run by itself"
    def __init__(self, m): super().__init__(); self.module = m

WRAPPERS = dict(compiled=compiled, parallel=nn.DataParallel, averaged=Averaged, holder=Holder,
    averaged_parallel=lambda m: Averaged(nn.DataParallel(m)), compiled_parallel=lambda m: compiled(nn.DataParallel(m)))

@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('kind', KINDS)
def test_wrappers(kind, wrapper):
    for o in both_ways(kind, kind.x, given=WRAPPERS[wrapper]): assert type(o) is kind

@pytest.mark.parametrize('wrapper', [DDP, lambda m: compiled(DDP(m)), lambda m: DDP(compiled(m)), lambda m: DDP(DDP(m))])
def test_distributed(wrapper, group):
    "A reducer counts on the old sizes: lossless is a copy, by ratio is refused"
    small = Pruner().prune_model(wrapper(zeroed(fresh(Images))), Images.x)
    assert type(small) is Images and n_params(small)==SMALL[Images]
    m = fresh(Images)
    with pytest.raises(ValueError, match='DistributedDataParallel.*prune its `.module` first'): Pruner(w := wrapper(m), 50, example_inputs=Images.x)
    assert n_params(m)==n_params(fresh(Images))
    w(Images.x).sum().backward()
    Pruner(m, 50, example_inputs=Images.x).prune_model()
    DDP(m)(Images.x).sum().backward()  # wrapped again, after it
    with pytest.raises(ValueError, match='a is a DistributedDataParallel inside'): Pruner().prune_model(Net(lambda m,x: m.a(x), a=DDP(fresh(Images))), Images.x)

def test_distributed_tensors(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module
    mesh = init_device_mesh('cpu', (1,))
    for f in (lambda m: distribute_module(m, mesh), lambda m: fully_shard(m, mesh=mesh)):
        for use in (lambda m: Pruner().prune_model(m, Images.x), lambda m: Pruner(m, 50, example_inputs=Images.x)):
            with pytest.raises(ValueError, match='stem.weight is a DTensor'): use(f(fresh(Images).cpu()))

def test_compiled_inside():
    "Parts of a model may be compiled: one in a wrapper, one in place"
    def wrap(m):
        m.stem = compiled(m.stem)
        m.out.compile(backend='eager')
        return m
    m = wrap(zeroed(fresh(Images)))
    m(Images.x)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small = Pruner().prune_model(m, Images.x)
    assert n_params(small)==SMALL[Images] and torch.allclose(small(Images.x), m(Images.x), atol=1e-5)

def test_scripted(recwarn):
    for f in (torch.jit.script, lambda m: torch.jit.trace(m, Images.x)):
        for use in (lambda m: Pruner().prune_model(m, Images.x), lambda m: Pruner(m, 50)):
            with pytest.raises(ValueError, match='TorchScript.*pass the model that it was made from'): use(f(fresh(Images)))
            with pytest.raises(ValueError, match='0 is a .*Module of TorchScript'): use(nn.Sequential(f(fresh(Images))))
    Pruner().prune_model(nn.Sequential(nn.Linear(3,3), torch.jit.script(nn.ReLU())), torch.randn(2,3))  # one without parameters stands in nobody's way

NO_MODELS = [(lambda: 'resnet18', "not 'resnet18'"), (lambda: Images.x, 'not a Tensor'),
    (lambda: fresh(Sound).state_dict(), 'a state dict is no model'), (lambda: Images, r'make one, Images\(…\)'), (lambda: [fresh(Sound)], 'not a list'),
    (lambda: {'model':1}, 'not a dict')]

@pytest.mark.parametrize('given,said', NO_MODELS)
def test_what_is_no_model(given, said):
    for use in (lambda o: Pruner().prune_model(o), lambda o: Pruner(o, 50), Pruner, plain_model, lambda o: Pruner(fresh(Sound), 50, example_inputs=Sound.x).prune_model(o)):
        with pytest.raises(TypeError, match=said): use(given())

def test_the_right_spelling():
    for args in ((50,), (50,20), (.5,)):
        with pytest.raises(ValueError, match=rf'Pruner\(model, {args[0]}\)'): Pruner(*args)
    with pytest.raises(ValueError, match=r'Pruner\(\).prune_model\(model\)'): Pruner().prune_model()
    with pytest.raises(ValueError, match='needs a model'): Pruner(None, 50)
    m = nn.Sequential(nn.Linear(3,8), nn.ReLU(), nn.Linear(8,8), nn.ReLU(), nn.Linear(8,2))
    for name in ('O',0,'o'):
        with pytest.raises(ValueError, match=r"no layer .*did you mean '0'\? Allowed: 0, 2, 4, heads, neurons, hidden$"): Pruner(m, {name:30})
    with pytest.raises(ValueError, match='no layer like this Linear'): Pruner(m, 30, ignored_layers=nn.Linear(2,2))
    with pytest.raises(ValueError, match='did you mean .stem'): Pruner(fresh(Images), {'steem':30})
    for t,said in (('Linear','nn.Linear'), ((nn.Linear,'Conv2d'),'nn.Conv2d'), ('Lin','for example nn.Conv2d'), (nn.Linear(2,2),'its type, Linear'), (3,'for example nn.Conv2d')):
        for use in (lambda **kw: Pruner(m, 30, **kw), lambda **kw: PruneCallback(30, **kw)):
            with pytest.raises(ValueError, match=f'(?s)layer_type must be a type.*{said}'): use(layer_type=t)
    Pruner(m, 50, ignored_layers=None, example_inputs=torch.randn(2,3)).prune_model()
    assert m[0].out_features==4

def test_files_of_wrapped_models(tmp_path):
    half = Pruner(fresh(Images), 50, example_inputs=Images.x).prune_model()
    save_pruned(compiled(half), tmp_path/'a.safetensors')
    m = compiled(fresh(Images))
    assert load_pruned(tmp_path/'a.safetensors', m) is m and same(state(half), state(m._orig_mod)) and pruned_plan(nn.DataParallel(half))==pruned_plan(half)

# --- hooks

class Records:
    "An observer with a method for a hook"
    def __init__(self): self.last,self.all = None,[]
    def hook(self, m, args, out): self.last = out; self.all.append(out)

def on_module(m):
    def keep(layer, args, out): m.kept,layer.kept = out,[out]
    m.register_forward_pre_hook(lambda m,args: setattr(m, 'arg', args[0]))
    return [o.register_forward_hook(keep) for o in m.children()]

def on_gradients(m):
    first,*rest = m.children()  # torch wants hooks of one kind on a module
    return hook_outputs(rest, grad=True),first.register_full_backward_hook(lambda *a: None),first.register_full_backward_pre_hook(lambda *a: None)

def statistics(m):
    stats,kept = ActivationStats(with_hist=True),[]
    def hook(m, args, out): kept.append(stats.hook(m, args, out))
    return hook_outputs(list(m.children())),[o.register_forward_hook(hook) for o in m.children()]

def passing(m):
    "Hooks that give back what they get"
    seen = []
    def after(m, args, out):
        seen.append(out)
        return out
    def before(m, args, kw): return args,kw
    return [(o.register_forward_hook(after),o.register_forward_pre_hook(before, with_kwargs=True)) for o in m.children()]

def before(m):
    seen = []
    def hook(m, args): seen.append(float(args[0].mean()))
    return m.head.register_forward_pre_hook(hook)

READERS = dict(outputs=lambda m: hook_outputs(list(m.children()), detach=False), on_module=on_module, on_gradients=on_gradients,
    records=lambda m: [o.register_forward_hook(Records().hook) for o in m.children()], statistics=statistics, passing=passing, before=before,
    kwargs=lambda m: m.head.register_forward_hook(lambda m,args,kw,out: None, with_kwargs=True),
    always=lambda m: m.head.register_forward_hook(lambda *a: None, always_call=True),
    first=lambda m: m.head.register_forward_hook(Records().hook, prepend=True))

@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('after', [False,True], ids=['before a forward','after one'])
def test_hooks_that_only_read(kind, reader, after):
    held = []
    def wrap(m):
        held.append(READERS[reader](m))
        if after: m(kind.x)  # what they keep has a history
        held.append((m,n_hooks(m),[list(o._forward_hooks) for o in m.modules()]))
        return m
    small,half = both_ways(kind, kind.x, wrap=wrap)
    for m,n,keys in held[1::2]: assert n_hooks(m)==n>0 and [list(o._forward_hooks) for o in m.modules()]==keys

def test_hooks_of_every_module():
    seen = []
    handles = [nn.modules.module.register_module_forward_hook(lambda m,i,o: seen.append(o)),
        nn.modules.module.register_module_forward_pre_hook(lambda m,i: seen.append(i))]
    try:
        for kind in KINDS: both_ways(kind, kind.x)
        seen.clear()
        fresh(Images)(Images.x)
        assert len(seen)==12  # both are back
    finally:
        for h in handles: h.remove()

def test_an_observer_stays_with_its_model():
    "The copy has hooks that are functions or methods of its own; what an observer remembers comes back as it was"
    m,rec,seen = zeroed(fresh(Images)),Records(),[]
    m.stem.register_forward_hook(rec.hook)
    m.out.register_forward_hook(lambda m,i,o: seen.append(1))
    m.note = lambda *a: None
    m(Images.x)
    last,n = rec.last,len(rec.all)
    small = Pruner().prune_model(m, Images.x)
    assert rec.last is last and len(rec.all)==n and not small.stem._forward_hooks
    seen.clear()
    small(Images.x)
    assert seen==[1]
    class Counts(Images):
        def __init__(self): super().__init__(); self.n = torch.zeros(()); self.stem.register_forward_hook(self.count)
        def count(self, m, args, out): self.seen = out
    small = Pruner().prune_model(m := zeroed(fresh(Counts)), Images.x)
    small(Images.x)
    assert small.seen.shape[1]==4 and not hasattr(m, 'seen') or m.seen is not small.seen

class Bridge(Images):
    "The hook of one layer feeds another"
    def __init__(self): super().__init__(); self.stem.register_forward_hook(self.take)
    def take(self, m, args, out): self.taken = out
    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(self.out(self.deep(x)+self.taken)).mean((2,3)))

class BridgeOfIds(Tokens):
    "The same, where no input is a float"
    def __init__(self): super().__init__(); self.held = {}; self.up.register_forward_hook(lambda m,i,o,held=self.held: held.update(up=o))
    def forward(self, ids):
        self.up(self.emb(ids))
        return self.head((self.emb(ids)+self.down(F.gelu(self.held['up']))).mean(1))

@pytest.mark.parametrize('kind', [Bridge,BridgeOfIds])
def test_hooks_that_the_model_needs(kind):
    "They stay, and so does what they tie; a reader beside them goes"
    m = zeroed(fresh(kind))
    m(kind.x)
    readers = hook_outputs(list(m.children()))
    found,acting,untold = readers_of(m, kind.x)
    assert len(acting)==1 and not untold and len(found)==len(list(m.children()))
    was = m(kind.x)
    small = Pruner().prune_model(m, kind.x) if kind is Bridge else m
    assert torch.allclose(small(kind.x), was, atol=1e-5)
    if kind is BridgeOfIds:  # a copy of it reads what the hook of the first one holds
        with pytest.raises(ValueError, match='a copy of this BridgeOfIds does not run like the model'): Pruner(m, 50, example_inputs=kind.x).prune_model()
        assert torch.equal(m(kind.x), was)
        return
    half = Pruner(m, 50, example_inputs=kind.x).prune_model()
    assert half(kind.x).shape==was.shape and n_params(half)<n_params(fresh(kind)) and len(readers)

def doubled(m, args, out): return 2*out
def in_place(m, args, out): out.mul_(2)
def counted(m, args, out): m.times = getattr(m, 'times', 0)+1

@pytest.mark.parametrize('hook', [doubled,in_place,counted])
def test_hooks_that_act(hook):
    m = zeroed(fresh(Images))
    m.out.register_forward_hook(hook)
    found,acting,untold = readers_of(m, Images.x)
    assert not found and not untold and [str(o) for o in acting]==[f'{hook.__qualname__} on out']
    small = Pruner().prune_model(m, Images.x)
    assert n_params(small)==SMALL[Images] and torch.allclose(small(Images.x), m(Images.x), atol=1e-5) and len(small.out._forward_hooks)==1

class First(prune.BasePruningMethod):
    "A pruning method of a user's own"
    PRUNING_TYPE = 'structured'
    def compute_mask(self, t, default_mask): return default_mask.index_fill(0, torch.tensor([1,4]), 0)

NORMS = nn.utils.weight_norm,nn.utils.spectral_norm,nn.utils.parametrizations.weight_norm,nn.utils.parametrizations.spectral_norm

@pytest.mark.parametrize('norm', [None,*NORMS], ids=lambda o: o and f'{o.__module__}.{o.__name__}')
@pytest.mark.filterwarnings('ignore')
def test_hooks_of_torch_stay(norm):
    if norm: norm((m := zeroed(fresh(Sound))).head)
    else: First.apply((m := fresh(Sound)).a, 'weight')
    with torch.no_grad():
        for p in (m.a.bias,m.norm.weight,m.norm.bias): p[[1,4]] = 0
    was = m(Sound.x)
    assert not readers_of(m, Sound.x)[0]
    small = Pruner().prune_model(m, Sound.x)
    assert small.a.out_channels==4 and torch.allclose(small(Sound.x), was, atol=1e-5) and n_hooks(small)==n_hooks(m)

def test_a_weight_that_a_hook_makes():
    "It does not depend on the inputs, and the model needs it"
    m = zeroed(fresh(Images))
    w = m.out.weight
    del m.out.weight
    m.out.w = w
    m.out.register_forward_pre_hook(lambda o,args: setattr(o, 'weight', o.w*2))
    m(Images.x)
    assert len(readers_of(m, Images.x)[1])==1
    small = Pruner().prune_model(m, Images.x)
    assert n_params(small)==SMALL[Images] and torch.allclose(small(Images.x), m(Images.x), atol=1e-5)

def test_hooks_that_cannot_be_told_are_named():
    "A model that takes no other inputs: its hooks are taken for a part of it"
    m = Net(lambda m,x: m.m(x) if bool((x==1).all()) else 1/0, m=zeroed(fresh(Images)))
    seen = []
    def keeps_sums(m, args, out): seen.append(out.cumsum(1))
    m.m.stem.register_forward_hook(keeps_sums)
    with pytest.warns(UserWarning, match=r'(?s)were not removed.*not known whether.*keeps_sums on m.stem'): Pruner().prune_model(m, torch.ones(2,3,9,9))

def test_hooks_are_run_only_if_there_are_some():
    m,runs = fresh(Images),[]
    with without_readers(Net(lambda m,x: runs.append(1), m=m), Images.x): pass
    assert not runs
    by = Bystanders(m, Images.x)
    m.stem.register_forward_hook(lambda *a: runs.append(1))
    for _ in range(3):
        with by.aside(): n = len(runs)
    assert n==len(runs)<5  # found out once
    m.out.register_forward_hook(lambda *a: runs.append(1))
    with by.aside(): assert not m.out._forward_hooks and len(runs)>n

def test_hooks_come_back_after_an_error():
    m = fresh(Images)
    h = m.stem.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match='here'):
        with without_readers(m, Images.x):
            m.out.register_forward_hook(lambda *a: None)
            raise ValueError('here')
    assert len(m.stem._forward_hooks)==len(m.out._forward_hooks)==1
    h.remove()
    assert not m.stem._forward_hooks

@pytest.mark.filterwarnings('ignore')
def test_a_unet_and_what_watches_it():
    "fastai's U-Net hands over activations by hooks; statistics of activations are none of its business"
    def unet():
        torch.manual_seed(0)
        body = nn.Sequential(conv(3,8), nn.ReLU(), nn.MaxPool2d(2), conv(8,16), nn.ReLU(), nn.MaxPool2d(2), conv(16,16), nn.ReLU())
        return DynamicUnet(body, 2, (16,16)).eval()
    x = torch.randn(2, 3, 16, 16)
    half = n_params(Pruner(unet(), 50, example_inputs=x).prune_model())
    m = unet()
    watched = hook_outputs([o for o in m.modules() if isinstance(o, nn.Conv2d)])
    assert n_params(Pruner(m, 50, example_inputs=x).prune_model())==half<n_params(unet()) and m(x).shape==(2,2,16,16) and len(watched)

# --- memory formats

@pytest.mark.parametrize('n,order', [(2,torch.channels_last),(3,torch.channels_last_3d)])
@pytest.mark.parametrize('inputs', ['last','usual'])
def test_memory_format(n, order, inputs):
    def make():
        torch.manual_seed(0)
        C,B = getattr(nn, f'Conv{n}d'),getattr(nn, f'BatchNorm{n}d')
        m = nn.Sequential(C(3,6,3,padding=1), B(6), nn.ReLU(), C(6,6,3,padding=1,groups=6), C(6,8,1), nn.ReLU(), C(8,8,3,groups=2), nn.ReLU(), C(8,2,3))
        m = m.to(memory_format=order).eval()
        m[8].weight.grad = torch.randn_like(m[8].weight)
        with torch.no_grad():
            for p in (m[0].weight,m[0].bias,m[1].weight,m[1].bias,m[3].weight,m[3].bias): p[[1,4]] = 0
        return m
    x = torch.randn(2, 3, *[6]*n)
    x = x.to(memory_format=order) if inputs=='last' else x
    m = make()
    opt = torch.optim.SGD(m.parameters(), .0, momentum=.9)
    opt.step()
    for o in (Pruner().prune_model(make(), x), Pruner(m, 50, example_inputs=x).prune_model(optimizer=opt)):
        assert o[0].out_channels<6
        for w in [c.weight for c in o.modules() if isinstance(c, nn.modules.conv._ConvNd)]:
            for p in filter(lambda o: o is not None, (w, w.grad, opt.state.get(w, {}).get('momentum_buffer'))):
                assert p.stride()==torch.empty(p.shape).to(memory_format=order).stride()
        assert o(x.to(memory_format=order)).is_contiguous(memory_format=order)
    usual = Pruner().prune_model(make().to(memory_format=torch.contiguous_format), x)
    assert all(p.is_contiguous() for p in usual.parameters())

# --- values

@pytest.mark.parametrize('value', [torch.nan,torch.inf,-torch.inf])
@pytest.mark.parametrize('name', ['stem.weight','norm.bias','norm.running_var','head.weight'])
def test_values_that_are_no_numbers(name, value):
    m = zeroed(fresh(Images))
    with torch.no_grad(): (t := m.state_dict()[name]).view(-1)[:2] = value
    for use in (lambda: Pruner().prune_model(m, Images.x), lambda: Pruner(m, 50, example_inputs=Images.x).prune_model(), lambda: check_values(m)):
        with pytest.raises(ValueError, match=f'2 of {t.numel()} numbers of {name}.* are nan or infinite'): use()

def test_large_values_are_numbers():
    "Their sum overflows"
    for dtype in (torch.float16,torch.bfloat16,torch.float32,torch.float64):
        m = nn.Linear(64, 64).to(dtype)
        with torch.no_grad(): m.weight.fill_(torch.finfo(dtype).max)
        check_values(m)

def test_values_that_break_in_a_fit():
    learn = learner()
    def spoil(o): o.model[3].weight.data[0,0,0,0] = torch.nan
    with pytest.raises(ValueError, match=r'1 of \d+ numbers of 3.weight'): fit(learn, 2, [PruneCallback(50, 'lin'), At('after_step', spoil, n=3, order=54)])
    assert not n_hooks(learn.model)

@pytest.mark.filterwarnings('ignore:Sparse CSR')
def test_sparse_storage():
    m = fresh(Sound)
    m.head.weight = nn.Parameter(m.head.weight.detach().to_sparse_csr())
    for use in (lambda: Pruner().prune_model(m, Sound.x), lambda: Pruner(m, 50)):
        with pytest.raises(ValueError, match='head.weight is stored as torch.sparse_csr.*dense'): use()

def test_expanded_weights():
    def make():
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,16), nn.ReLU(), nn.Linear(16,3))
        m[2].weight = nn.Parameter(torch.randn(1,8).expand(16,8))
        with torch.no_grad(): m[0].weight[:3] = m[0].bias[:3] = 0
        return m
    x = torch.randn(4,6)
    small,half = Pruner().prune_model(make(), x),Pruner(make(), 50, example_inputs=x).prune_model()
    assert torch.allclose(small(x), make()(x), atol=1e-5) and small[0].out_features==5 and (half[0].out_features,half[2].out_features)==(4,8)

@pytest.mark.filterwarnings('ignore:Initializing zero')
def test_layers_of_no_size():
    m = nn.Sequential(nn.Linear(3,0), nn.Linear(0,4))
    with pytest.warns(UserWarning, match='nothing to remove'): Pruner().prune_model(m, torch.randn(2,3))
    with pytest.raises(ValueError, match='1: output of the model'): Pruner(m, 50, example_inputs=torch.randn(2,3)).prune_model()

# --- never silent

@torch.library.custom_op('wherever::pass_on', mutates_args=())
def pass_on(x:torch.Tensor) -> torch.Tensor: return x+0
pass_on.register_fake(torch.empty_like)
pass_on.register_autograd(lambda ctx, g: g)

class Unknown(nn.Module):
    "An operation that nobody knows"
    def forward(self, x): return pass_on(x)

def chain(*at):
    "Four layers of 8, with an unknown operation after some"
    torch.manual_seed(0)
    layers = [o for i in range(4) for o in (nn.Linear(8,8), Unknown() if i in at else nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8,2))
V = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

def said(f):
    "The one warning of `f`, or ''; what it gives"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        res = f()
    ws = [str(o.message) for o in ws if o.category is UserWarning]
    assert len(ws)<2, ws
    return ''.join(ws),res

def test_nothing_is_zero():
    for use in (lambda: Pruner().prune_model(chain(), V), lambda: Pruner(chain()).prune_model(example_inputs=V)):
        text,small = said(use)
        assert 'nothing to remove: no channel of this Sequential is zero, unread or constant' in text and 'Pruner(model, 50)' in text
        assert n_params(small)==n_params(chain())
    m = chain()
    with torch.no_grad(): m[8].weight[0] = m[8].bias[0] = 0  # the output stays
    assert 'nothing to remove' in said(lambda: Pruner().prune_model(m, V))[0]

def test_zeros_that_stay():
    "None removed, some removed, all removed"
    m = chain(0)
    with torch.no_grad(): m[0].weight[:3] = m[0].bias[:3] = 0
    text,small = said(lambda: (p := Pruner()).prune_model(m, V) and p)
    assert small.left==[dict(layer='0', channels=8, dead=3, removed=0, why=small.left[0]['why'])] and 'pass_on' in small.left[0]['why']
    assert '3 were not removed: 3 in 0: ' in text and 'pass_on' in text and ' 1' in text
    with torch.no_grad(): m[4].weight[:2] = m[4].bias[:2] = 0
    text,p = said(lambda: (p := Pruner()).prune_model(m, V) and p)
    assert [o['layer'] for o in p.left]==['0'] and '3 were not removed' in text
    m[1] = nn.ReLU()
    text,p = said(lambda: (p := Pruner()).prune_model(m, V) and p)
    assert not text and not p.left

def test_why_zeros_are_alive():
    m = fresh(Images)
    with torch.no_grad(): m.stem.weight[1] = m.stem.bias[1] = 0
    text,p = said(lambda: (p := Pruner()).prune_model(m, Images.x) and p)
    assert 'tied to channels of deep that are not zero' in text and p.left==[dict(layer='stem', channels=6, dead=1, removed=0, why=p.left[0]['why'])]
    m = nn.Sequential(conv(3,6), conv(6,6))
    with torch.no_grad(): m[0].weight[2] = 0
    assert '0.bias turns them into constants' in said(lambda: Pruner().prune_model(m, Images.x))[0]
    m = nn.Sequential(nn.Linear(8,6), nn.LayerNorm(6), nn.Linear(6,3))
    with torch.no_grad(): m[0].weight[2] = m[0].bias[2] = 0
    assert 'takes all channels together' in said(lambda: Pruner().prune_model(m, V))[0]
    m = Net(lambda m,x: m.b(m.a(x).view(-1, 2, 4).flatten(1)), a=nn.Linear(8,8), b=nn.Linear(8,3))
    with torch.no_grad(): m.a.weight[[1,2]] = 0; m.a.bias[[1,2]] = 0
    text,small = said(lambda: Pruner().prune_model(m, V))
    assert text and small.a.out_features==8

def test_unread_channels_that_stay():
    m = Net(lambda m,x: m.b(torch.roll(m.a(x).relu(), 1, 1)), a=nn.Linear(8,8), b=nn.Linear(8,3))
    with torch.no_grad(): m.b.weight[:,:3] = 0
    text,p = said(lambda: (p := Pruner()).prune_model(m, V) and p)
    assert [(o['layer'],o['dead'],o['removed']) for o in p.left]==[('a',3,0)] and 'roll' in text

@pytest.mark.parametrize('rows', [False,True])
def test_pruned_recurrent_layers(rows):
    m = Net(lambda m,x: m.h(m.l(x)[0]), l=nn.LSTM(6,5,batch_first=True), h=nn.Linear(5,3))
    (partial(prune.ln_structured, n=2, dim=0) if rows else prune.l1_unstructured)(m.l, 'weight_ih_l0', amount=.6)
    assert said(lambda: Pruner().prune_model(m, torch.randn(2,4,6)))[0]
    assert not said(lambda: Pruner(m, 50, example_inputs=torch.randn(2,4,6)).prune_model())[0] and m.l.hidden_size==m.h.in_features==3

def test_less_than_asked():
    text,p = said(lambda: (p := Pruner(chain(0, 2), 50, example_inputs=V)).prune_model() and p)
    assert [(o['layer'],o['channels'],o['dead'],o['removed']) for o in p.left]==[('0',8,4,0),('4',8,4,0)]
    assert 'of the 16 channels that pruning_ratio 50 asks for, 8 were not removed' in text and text.count('pass_on')==2
    assert '0 kept all channels: ' in text and '4 kept all channels: ' in text
    assert 'output' not in text and 'layer_type' not in text
    assert [o.out_features for o in p.model if isinstance(o, nn.Linear)]==[8,4,8,4,2]

def test_all_that_was_asked_for():
    "Rounded down is not less"
    for ratio in (10,30,50,100):
        text,p = said(lambda: (p := Pruner(chain(), ratio, example_inputs=V)).prune_model() and p)
        assert not p.left and bool(text)==(ratio==10)  # of eight, nothing
    assert 'less than one channel' in said(lambda: Pruner(chain(), 10, example_inputs=V).prune_model())[0]
    assert not said(lambda: Pruner(chain(), 0, example_inputs=V).prune_model())[0]
    assert not said(lambda: Pruner(chain(0), 50, example_inputs=V, ignored_layers='0').prune_model())[0]
    assert not said(lambda: Pruner(chain(0), {'2':50}, example_inputs=V).prune_model())[0]
    m = nn.Sequential(conv(3,8), nn.ReLU(), Unknown(), nn.Flatten(), nn.Linear(8*81,8), nn.ReLU(), nn.Linear(8,2))
    assert not said(lambda: Pruner(m, 50, example_inputs=Images.x, layer_type=nn.Linear).prune_model())[0] and m[4].out_features==4

def test_the_most_frequent_reason_first():
    sizes = dict(a=(8,8), b=(8,20), c=(8,8), d=(8,2), e=(20,2))
    m = Net(lambda m,x: m.d(m.u(m.c(x)))+m.e(m.v(m.b(m.u(m.a(x))))), **{k:nn.Linear(*s) for k,s in sizes.items()}, u=Unknown(), v=Unknown())
    with pytest.raises(ValueError, match='no channel of this Net can be removed: b: .*; c, a: .*; d, e: output of the model'): Pruner(m, 50, example_inputs=V).prune_model()

def test_true_reasons_where_nothing_can_go():
    for kw,text in ((dict(ignored_layers=['0','2','4','6']), '0, 2, 4 and 1 more: ignored; 8: output of the model'),
                    (dict(layer_type=nn.Conv2d), 'not of layer_type Conv2d'), (dict(layer_type=(nn.Conv2d,nn.GRU)), 'not of layer_type Conv2d, GRU')):
        with pytest.raises(ValueError, match=f'no channel of this Sequential can be removed: .*{text}'): Pruner(chain(), 50, example_inputs=V, **kw).prune_model()
    with pytest.raises(ValueError, match='pass_on'): Pruner(chain(0,1,2,3), 50, example_inputs=V).prune_model()

def test_tied_to_what_is_spared():
    text,p = said(lambda: (p := Pruner(fresh(Images), 50, example_inputs=Images.x, ignored_layers='stem')).prune_model() and p)
    assert 'deep kept all channels: tied to stem, which is ignored' in text and [o['layer'] for o in p.left]==['deep']

def test_what_the_code_counts_on():
    def f(m, x):
        y = F.relu(m.a(x))
        if y.shape[1]!=8: raise ValueError('eight')
        return m.b(y)+m.d(m.c(x))
    m = Net(f, a=nn.Linear(8,8), b=nn.Linear(8,3), c=nn.Linear(8,8), d=nn.Linear(8,3))
    text,p = said(lambda: (p := Pruner(m, 50, example_inputs=V)).prune_model() and p)
    assert m.c.out_features==4 and 'a kept all channels: the code of the model depends on' in text
    assert [(o['layer'],o['channels'],o['dead'],o['removed']) for o in p.left]==[('a',8,4,0)]

def test_in_steps():
    "Told once, for what is asked for in the end"
    p = Pruner(chain(1), 50, example_inputs=V)
    texts = [said(lambda: p.update(o))[0] for o in (5,25,50)]
    assert [bool(o) for o in texts]==[True,False,False] and '2 kept all channels' in texts[0] and p.left[0]['dead']==4

def test_layers_that_did_not_run_are_told_with_the_rest():
    def f(m, x): return m.aux(m.nothing) if m.training else m.head(m.u(m.b(F.relu(m.a(x)))))
    m = Net(f, a=nn.Linear(8,8), b=nn.Linear(8,8), u=Unknown(), head=nn.Linear(8,4), aux=nn.Linear(8,2))
    with torch.no_grad(): m.a.weight[0] = m.a.bias[0] = 0; m.b.weight[0] = m.b.bias[0] = 0
    text,_ = said(lambda: Pruner().prune_model(m.eval(), V))
    assert 'aux did not run' in text and '1 in b: ' in text

# --- fits

IMAGES = Items((TensorImage(x),TensorCategory(y)) for x,y in zip(torch.randn(48,3,6,6), torch.randint(0,4,(48,))))

def widths(m): return [o.out_channels for o in m.modules() if isinstance(o, nn.Conv2d)]

@pytest.mark.parametrize('criteria', ['large_final','taylor','wanda'])
def test_fit_on_batches_of_their_own_class(criteria):
    learn = learner(data=IMAGES)
    text,_ = said(lambda: fit(learn, 2, cb := PruneCallback(50, criteria=criteria)))
    assert widths(learn.model)==[4,4] and not text

@pytest.mark.filterwarnings('ignore:You are shadowing')
@pytest.mark.parametrize('kw', [dict(), dict(with_hist=True), dict(every=1), dict(every=3), dict(first=True)], ids=str)
@pytest.mark.parametrize('criteria', ['large_final','wanda'])
def test_statistics_of_activations_beside_it(kw, criteria):
    "Neither disturbs the other: the statistics of a batch are those of that batch"
    learn = learner()
    kw = dict(modules=[learn.model[0]]) if kw.get('first') else kw
    stats,alone = ActivationStats(**kw),ActivationStats(**kw)
    other = learner()
    if 'modules' in kw: alone.modules = [other.model[0]]
    fit(learn, 1, [PruneCallback(50, 'one_shot', criteria=criteria, n_updates=1), stats])
    fit(other, 1, [alone])
    assert widths(learn.model)==[4,4] and not n_hooks(learn.model) and len(stats.stats)==len(alone.stats)>0
    for a,b in zip(stats.stats, alone.stats):
        for x,y in zip(a, b): assert x is None and y is None or x['mean']==pytest.approx(y['mean'], abs=1e-6)

def test_summary():
    "`summary` neither follows channels nor changes them, before and after a fit"
    learn = learner()
    learn.add_cb(PruneCallback(50))
    with learn.no_bar(): assert '1,000' not in learn.summary()
    assert widths(learn.model)==[8,8]
    fit(learn)
    with learn.no_bar(): learn.summary(), learn.validate()
    assert widths(learn.model)==[4,4] and hasattr(learn, 'prune') and not n_hooks(learn.model)

def test_a_hook_on_during_the_whole_fit():
    learn = learner()
    with hook_outputs(list(learn.model), detach=False) as hooks:
        fit(learn, 2, PruneCallback(50))
        assert widths(learn.model)==[4,4] and hooks.stored[0].shape[1]==4

class Wrapping(Callback):
    "As fastai's DistributedTrainer and ParallelTrainer do"
    order,run_valid = 11,True
    def __init__(self, wrap): self.wrap = wrap
    def before_fit(self): self.learn.model = self.wrap(self.learn.model)
    def after_fit(self): self.learn.model = self.learn.model.module

def test_wrapped_for_a_fit(group):
    learn = learner()
    fit(learn, 2, [PruneCallback(50), Wrapping(nn.DataParallel)])
    assert widths(learn.model)==[4,4]
    learn = learner()
    was = state(learn.model)
    model = learn.model
    with pytest.raises(ValueError, match='DistributedDataParallel'): fit(learn, 1, [PruneCallback(50), Wrapping(DDP)])
    assert same(was, state(model)) and not n_hooks(model)
    learn = learner()
    fit(learn, 2, [SparsifyCallback(50, 'filter'), Wrapping(DDP)])
    assert int((learn.model[0].weight.flatten(1)==0).all(1).sum())==4

def test_told_once_a_fit():
    m = learner().model
    m[2] = Unknown()
    learn = learner(m)
    cb = PruneCallback(50, 'lin', n_updates=8)
    text,_ = said(lambda: fit(learn, 2, cb))
    assert widths(learn.model)==[8,4] and '0 kept all channels' in text and 'pass_on' in text
    assert [(o['layer'],o['channels'],o['dead'],o['removed']) for o in cb.left]==[('0',8,4,0)]
    text,_ = said(lambda: fit(learn, 1, cb))  # the next fit
    assert '0 kept all channels' in text
    import pickle
    assert pickle.loads(pickle.dumps(cb)).left==cb.left

def test_two_samples():
    x = torch.arange(8.)[:,None]
    @dataclass
    class Pair: a:object; b:int=1
    image,both,pair,many,name,other = two_of((TensorImage(x), dict(m=x, n=torch.ones(())), Pair(TensorBase(x)), [torch.ones(3,5),torch.ones(3,4)],
                                              'name', torch.ones(2,8)))
    for o in (image,both['m'],pair.a): assert type(o) is torch.Tensor and o.tolist()==[[0],[1]]
    assert both['n'].dim()==0 and [o.shape for o in many]==[(3,5),(3,4)] and name=='name' and other.shape==(2,8)

def test_inputs_in_a_dict_of_a_batch():
    class Takes(nn.Module):
        def __init__(self): super().__init__(); self.m = learner().model
        def forward(self, d): return self.m(d['image'])
    data = Items((dict(image=x),y) for x,y in zip(torch.randn(48,3,6,6), torch.randint(0,4,(48,))))
    learn = learner(Takes(), data=data)
    fit(learn, 2, PruneCallback(50))
    assert widths(learn.model)==[4,4]

@pytest.mark.parametrize('event', ['before_train','before_batch','after_pred','after_step','after_train'])
@pytest.mark.filterwarnings('ignore:You are shadowing')
def test_interrupted_with_readers(event):
    "Hooks of others are where they were, whatever stops the fit"
    learn = learner()
    seen = []
    h = learn.model[0].register_forward_hook(lambda m,i,o: seen.append(1))
    cb = PruneCallback(50, 'lin')
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [cb, At(event, raises(KeyboardInterrupt), n=1 if 'train' in event else 3)])
    assert list(learn.model[0]._forward_hooks)==[h.id] and n_hooks(learn.model)==1
    fit(learn, 1, cb)
    assert widths(learn.model)==[4,4]

# --- what a look leaves behind

class Lazily(nn.Module):
    "Installs hooks at its first run, as transformers does to capture outputs, and says so in an attribute"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Linear(5,8),nn.Linear(8,6),nn.Linear(6,2)
        self.seen = []
    def forward(self, x):
        if not getattr(self, '_installed', False):
            self._installed = True
            for o in (self.a,self.b):
                o.register_forward_hook(lambda m,args,out: self.seen.append(out))
                o.register_forward_pre_hook(lambda m,args,kwargs: None, with_kwargs=True, prepend=True)
        self.seen.clear()
        out = self.c(self.b(self.a(x).relu()).relu())
        return out,len(self.seen)

def hooks_of(m): return {n:{k:list(v) for k,v in vars(o).items() if '_hooks' in k} for n,o in m.named_modules()}

@pytest.mark.parametrize('ran', [False,True])
def test_hooks_of_a_first_run(ran):
    "What a run registers comes back together with what it keeps in attributes"
    m,x = Lazily().eval(),torch.randn(3, 5)
    if ran: m(x)
    was = hooks_of(m)
    for look in (lambda: ChannelGraph(m, x),lambda: Sparsifier(m, 'filter', coupled=True, layer_type=nn.Linear, example_inputs=x),lambda: Flow(m, x),lambda: n_macs(m, x)):
        look()
        assert hooks_of(m)==was and hasattr(m, '_installed')==ran
    assert m(x)[1]==2

def test_a_hook_that_removes_itself():
    m,x = nn.Sequential(nn.Linear(5,8), nn.ReLU(), nn.Linear(8,2)).eval(),torch.randn(3, 5)
    once = m[0].register_forward_hook(lambda *_: once.remove())
    ChannelGraph(m, x)
    assert len(m[0]._forward_hooks)==1
    m(x)
    assert not m[0]._forward_hooks

class Cached(nn.Module):
    "Gives what it may need for the next call, if its config says so"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.config = nn.Linear(5,8),nn.Linear(8,2),SimpleNamespace(use_cache=True)
    def forward(self, x, use_cache=None):
        y = self.a(x)
        if use_cache is None: use_cache = self.config.use_cache
        return (self.b(y.relu()),y) if use_cache else self.b(y.relu())

def test_a_cache_holds_no_channels_back():
    "But where the caller asks for it, it is an output"
    x = torch.randn(3, 5)
    for inputs,left in ((x,4),(dict(x=x, use_cache=True),8)):
        m = Cached().eval()
        if left==4: Pruner(m, 50, example_inputs=inputs).prune_model()
        else:
            with pytest.raises(ValueError, match='output of the model'): Pruner(m, 50, example_inputs=inputs).prune_model()
        assert m.a.out_features==left and m.config.use_cache is True and len(m(x))==2
