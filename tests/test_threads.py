"Threads do not notice each other: what the library does in one is what it does alone, and what others set, draw and catch stays theirs"
import random, threading, time, warnings
from contextlib import contextmanager, nullcontext
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fasterai.core.evidence import evidence, weight_of
from fasterai.core.graph import ChannelGraph
from fasterai.analyze.counts import _draws as draws_in_a_call
from fasterai.core.running import OwnNumbers, call_with, restored, untouched
from fasterai.distill.all import Distiller
from fasterai.misc.all import BN_Folder, Conv_Decomposer, FC_Decomposer
from fasterai.prune.all import Pruner
from fasterai.report.all import report, summary
from fasterai.sparse.all import Sparsifier
from tiny import Net

THREADS,TIMES = 8,50
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0,1])

def residual(s, x):
    y = s.a(x).relu()
    return s.head((y+s.b(y)).mean((2,3)))

def attended(s, x):
    y = s.inner(x)
    return s.head(y+s.attention(y, y, y, need_weights=False)[0])

def convs(): return nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Conv2d(8,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4))
def normed(): return nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,6,3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,4))
def dropped(): return nn.Sequential(nn.Flatten(), nn.Linear(192,16), nn.Dropout(.5), nn.ReLU(), nn.Linear(16,4))
def added(): return Net(residual, a=nn.Conv2d(3,8,3), b=nn.Conv2d(8,8,3,padding=1), head=nn.Linear(8,4))
def attention(): return Net(attended, inner=nn.Linear(8,8), attention=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8,4))
def encoder(): return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
def noisy(): return Net(lambda s, x: s.b(s.a(x).relu())*torch.rand(1), a=nn.Conv2d(3,8,3), b=nn.Conv2d(8,4,1))
def always_dropped(): return Net(lambda s, x: F.dropout(s.b(s.a(x).relu()), .3, training=True), a=nn.Conv2d(3,8,3), b=nn.Conv2d(8,4,1))

MODELS = dict(map(lambda f: (f.__name__,(f,IMAGES)), (convs,normed,dropped,added,noisy,always_dropped))) | dict(attention=(attention,TOKENS), encoder=(encoder,TOKENS))

def model_of(name, dead=False):
    "A model of `MODELS` in training mode, with the same weights each time; in its first layer there are `dead` rows"
    with OwnNumbers(): model = MODELS[name][0]()
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d,nn.Linear)) and type(m) in (nn.Conv2d,nn.Linear))
    if dead:
        with torch.no_grad(): first.weight[:2],first.bias[:2] = 0,0
    return model

def state_of(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def by_ratio(name):
    model = model_of(name)
    Pruner(model, 50, example_inputs=MODELS[name][1]).prune_model()
    return state_of(model)
def lossless(name): return state_of(Pruner().prune_model(model_of(name, True).eval(), MODELS[name][1]))

class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

SEED = 5

class Others:
    "What other threads do meanwhile, and whether they got what is theirs"
    def __init__(self): self.over,self.wrong,self.drawn,self.rounds = False,[],[],{}
    def draw(self): self.drawn += [torch.rand(3) for _ in range(20)]
    def ask(self):
        if not torch.backends.mha.get_fastpath_enabled(): self.wrong.append('the fast path is off')
        hooks = nn.modules.module
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks: self.wrong.append('a hook on every module')
        if not torch.is_grad_enabled() or torch.get_default_dtype()!=torch.float32: self.wrong.append('modes')
    def infer(self):
        with torch.no_grad(), Seen() as seen: self.layer(TOKENS)
        if seen.names!=['_transformer_encoder_layer_fwd']: self.wrong.append(f'not fused: {seen.names}')
    def caught(self):
        with warnings.catch_warnings(record=True) as got:
            warnings.simplefilter('always')
            warnings.warn('of this thread')
        if 'of this thread' not in [str(o.message) for o in got]: self.wrong.append('a warning was lost')
    def repeat(self, f):
        try:
            while not self.over:
                f()
                time.sleep(.001)  # the others shall get on as well
                self.rounds[f.__name__] = self.rounds.get(f.__name__, 0)+1
        except Exception as e: self.wrong.append(repr(e))

    @contextmanager
    def around(self):
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        filters = list(warnings.filters)
        torch.manual_seed(SEED)
        threads = [threading.Thread(target=self.repeat, args=(f,)) for f in (self.draw,self.ask,self.infer,self.caught)]
        for o in threads: o.start()
        try: yield self
        finally:
            self.over = True
            for o in threads: o.join()
        assert not self.wrong and len(self.rounds)==len(threads)
        lone = torch.Generator(device='cpu').manual_seed(SEED)
        assert all(torch.equal(o, torch.rand(3, generator=lone, device='cpu')) for o in self.drawn)
        assert warnings.filters==filters

def in_threads(works):
    "What each of `works`, functions, gives in a thread of its own"
    results,errors = [None]*len(works),[]
    gate = threading.Barrier(len(works))
    def go(i):
        gate.wait()
        try:
            with torch.device(IMAGES.device) if IMAGES.device.type!='cpu' else nullcontext(): results[i] = works[i]()  # a thread has a default of its own
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=go, args=(i,)) for i in range(len(works))]
    for o in threads: o.start()
    for o in threads: o.join()
    if errors: raise errors[0]
    return results

PRUNINGS = [(f,name) for f in (by_ratio,lossless) for name in MODELS if (f,name)!=(lossless,'always_dropped')]

@pytest.mark.filterwarnings('ignore')
def test_eight_threads_that_prune():
    alone = [f(name) for f,name in PRUNINGS]
    def some(k):
        chosen = [(k+i)%len(PRUNINGS) for i in range(TIMES)]
        return lambda: [(i,PRUNINGS[i][0](PRUNINGS[i][1])) for i in chosen]
    with Others().around(): found = in_threads([some(k) for k in range(THREADS)])
    assert len(found)==THREADS and all(len(o)==TIMES for o in found)
    for i,state in sum(found, []): assert same(state, alone[i]), PRUNINGS[i]

def plain():
    model = model_of('normed')
    Sparsifier(model, 'weight', 'global').sparsify_model(50)
    return state_of(model)
def coupled():
    model = model_of('added')
    Sparsifier(model, 'filter', coupled=True, example_inputs=IMAGES).sparsify_model(50)
    return state_of(model)
def folded(): return state_of(BN_Folder().fold(model_of('normed').eval(), IMAGES))
def told():
    model = model_of('normed')
    found = evidence(('grad','act'), [(IMAGES,LABELS)], model, [weight_of(model, '3.weight')])
    return {k:v['3.weight'] for k,v in found.items()}
def taught():
    with torch.enable_grad():
        student,teacher = model_of('convs'),model_of('normed').eval()
        distiller = Distiller(teacher, 'SoftTarget').prepare(student, IMAGES)
        return dict(logits=distiller.teach(IMAGES)[0])
def thin(): return state_of(FC_Decomposer().decompose(model_of('dropped'), .5, data=[(IMAGES,LABELS)], example_inputs=IMAGES))
def spatial(): return state_of(Conv_Decomposer().decompose(model_of('added'), .5, 'svd', example_inputs=IMAGES))
def rows(): return dict(text=torch.tensor([*str(summary(model_of('encoder'), TOKENS)).encode()]))
def measured(): return dict(params=torch.tensor(report(model_of('convs').eval(), example_inputs=IMAGES, repeats=6, progress=False).params.tolist()))

WORKS = [plain,coupled,folded,told,taught,thin,spatial,rows,measured]

@pytest.mark.filterwarnings('ignore')
def test_everything_else_in_threads():
    alone = [f() for f in WORKS]
    def turn(k): return lambda: [(i,WORKS[i]()) for i in ((k+j)%len(WORKS) for j in range(len(WORKS)))]
    with Others().around(): found = in_threads([turn(k) for k in range(4)])
    for i,state in sum(found, []): assert same(state, alone[i]), WORKS[i].__name__

@pytest.mark.filterwarnings('ignore')
def test_one_model_in_several_threads():
    "They wait for each other: the model is left as it was, and so are copies of it"
    model = model_of('normed')
    was,expected = state_of(model),[len(ChannelGraph(model, IMAGES).slices)]*20
    def graphs(): return [len(ChannelGraph(model, IMAGES).slices) for _ in range(20)]
    def copies():
        for _ in range(20): assert not any(m._forward_hooks for m in Pruner().prune_model(model, IMAGES).modules())
        return expected
    assert in_threads([graphs,graphs,copies,graphs])==[expected]*4
    assert same(state_of(model), was) and all(m.training for m in model.modules()) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

# --- numbers that a model draws
def gamma(x): return torch.distributions.Gamma(x.abs()+1, 1.).sample()
DRAWS = dict(rand=lambda x: torch.rand(4), randn=lambda x: torch.randn(2,2), like=torch.rand_like, randint=lambda x: torch.randint(9, (4,)), low=lambda x: torch.randint(3, 9, (4,)),
    randint_like=lambda x: torch.randint_like(x, 9), perm=lambda x: torch.randperm(9), bernoulli=lambda x: torch.bernoulli(x.sigmoid()), multinomial=lambda x: x.flatten(1).softmax(1).multinomial(3),
    normal=lambda x: torch.normal(x, 1.), normal_=lambda x: x.normal_(), uniform_=lambda x: x.uniform_(), exponential_=lambda x: x.exponential_(), cauchy_=lambda x: x.cauchy_(),
    geometric_=lambda x: x.geometric_(.5), log_normal_=lambda x: x.log_normal_(), random_=lambda x: x.random_(9), poisson=lambda x: torch.poisson(x.exp()), gamma=gamma,
    dropout=lambda x: F.dropout(x, .5, True), native=lambda x: torch.native_dropout(x, .5, True)[0], dropout2d=lambda x: F.dropout2d(x, .5, True), alpha=lambda x: F.alpha_dropout(x, .5, True),
    rrelu=lambda x: F.rrelu(x, training=True), gumbel=lambda x: F.gumbel_softmax(x), fractional=lambda x: F.fractional_max_pool2d(x, 2, output_size=5),
    attention=lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=.5), init=lambda x: nn.init.kaiming_normal_(x), linear=lambda x: nn.Linear(3,3).weight, lowrank=lambda x: torch.svd_lowrank(x[0,0], 2)[0],
    lstm=lambda x: nn.LSTM(8, 4, 2, dropout=.5).train()(x[:,0])[0])

@pytest.mark.parametrize('name', DRAWS)
@pytest.mark.parametrize('context', (restored,untouched))
def test_draws_of_a_model(name, context):
    "Nothing that draws moves the generator of PyTorch, and each run of ours draws the same"
    model,was = Net(lambda s, x: DRAWS[name](x)),random_states()
    outs = []
    for _ in range(2):
        with context(model): outs.append(call_with(model, IMAGES))
        assert all(map(torch.equal, random_states(), was))
    if not (name=='lstm' and IMAGES.is_cuda): assert torch.equal(*outs)  # cuDNN has numbers of its own
    assert not torch.equal(*[DRAWS[name](IMAGES.clone()) for _ in range(2)])  # it does draw

QUIET = dict(attention=lambda x: F.scaled_dot_product_attention(x, x, x), rate=lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.), eval=lambda x: F.rrelu(x), p=lambda x: F.dropout(x, .5, False))

@pytest.mark.parametrize('name', QUIET)
def test_what_could_draw_and_does_not(name):
    "A network with attention without dropout is timed as it is, with no mode of ours around it"
    assert not draws_in_a_call(Net(lambda s, x: QUIET[name](x)).eval(), IMAGES)

def random_states(): return [torch.get_rng_state(), *([] if IMAGES.device.type=='cpu' else [torch.get_device_module(IMAGES.device).get_rng_state()])]

class Draws(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, x): return x*float(self.f())

def helper(): return np.random.rand()
SEEDING = dict(python=lambda: random.random(), numpy=helper, torch=lambda: torch.manual_seed(3).initial_seed())

@pytest.mark.parametrize('name', SEEDING)
def test_generators_that_cannot_be_given(name):
    "Python's and NumPy's, and a seed that a model sets, come back if code of the model names them; what others drew is not drawn again"
    states = lambda: (random.getstate(),np.random.get_state()[1].tolist(),np.random.get_state()[2],torch.get_rng_state().tolist())
    model,was = Draws(SEEDING[name]),states()
    with untouched(model): call_with(model, IMAGES)
    assert states()==was
    quiet = nn.Identity()
    with untouched(quiet):
        call_with(quiet, IMAGES)
        first = random.random(),np.random.rand(),torch.default_generator.get_state()
    assert states()!=was and random.random()!=first[0] and np.random.rand()!=first[1]
