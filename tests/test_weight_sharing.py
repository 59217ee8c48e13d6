"""Shared weights in training: clusters and zeros stay as they are, to the last bit, beside all that a fit may have"""
import copy, functools, pickle
import pytest, torch
from fastai.callback.core import *
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import load_learner
from fastai.optimizer import *
from functools import partial
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from fasterai.quantize.all import *
from fasterai.quantize.weight_sharing import SharedWeight, SharedWeights, _ByPairs, _Together
from fasterai.distill.all import Attention, KnowledgeDistillationCallback
from fasterai.prune.all import PruneCallback
from fasterai.regularize.all import RegularizationCallback
from fasterai.sparse.all import KeepSparsity, Sparsifier, SparsifyCallback
from tiny import At, Count, FAKE_GPU, fit, learner, net, raises, same, state, told

def partition(w): "Number of the cluster of each element"; return w.detach().unique(return_inverse=True)[1]
def weights(model): return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

class Watch(Callback):
    "After every step, the clusters are those of the first, as a whole"
    order = 90
    def __init__(self): self.first,self.seen = None,0
    def after_step(self):
        codes = [o.codes for o in self.learn.k_means.shared]
        if self.first is None: self.first = [c.clone() for c in codes]
        self.seen += 1
        for o,c in zip(self.learn.k_means.shared, self.first):
            v = o.p.detach().flatten()
            assert torch.equal(o.codes, c) and torch.equal(v, v[o.first][c]) and not v[torch.isin(c, o.zero)].any()

class OnCPU(MixedPrecision):
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

def half_zero():
    model = net()
    Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(50)
    return model

opts = dict(adam=Adam, sgd=partial(SGD, mom=.9), l2=partial(Adam, decouple_wd=False), rms=RMSProp, ranger=ranger, lamb=partial(Lamb), torch=partial(OptimWrapper, opt=torch.optim.AdamW))

@pytest.mark.parametrize('opt', opts)
@pytest.mark.parametrize('per_channel', [False,True])
def test_optimizers(opt, per_channel):
    model = half_zero()
    zeros,before = [w==0 for w in weights(model)],state(model)
    learn = learner(model, opt_func=opts[opt])
    fit(learn, 3, [KMeansCallback(2, per_channel=per_channel), w := Watch()], wd=.1)
    assert w.seen==12 and all(torch.equal(w==0, z) for w,z in zip(weights(model), zeros))
    if not per_channel: assert all(len(w.unique())<=5 for w in weights(model))
    assert all(not torch.equal(before[k], v) for k,v in state(model).items() if k.endswith('weight'))

@pytest.mark.parametrize('cbs', [[], [KeepSparsity], [GradientClip], [partial(GradientAccumulation, 16)], [partial(OnCPU, amp_mode='bf16')], [partial(OnCPU, amp_mode='fp16')], [lambda: KnowledgeDistillationCallback(net(1))],
    [KeepSparsity, lambda: KnowledgeDistillationCallback(net(1), activations_student='3', activations_teacher='3', loss=Attention)], [lambda: RegularizationCallback('filter', 1e-2)]], ids=told)
def test_beside_other_callbacks(cbs):
    learn = learner(half_zero())
    fit(learn, 2, [KMeansCallback(3), w := Watch(), *(o() for o in cbs)])
    assert w.seen and all(len(w.unique())<=9 for w in weights(learn.model))

class Leaving(Callback):
    "Before a step, those that share are those of the first step that are not zero; after it, they have moved by the sum of their gradients"
    order = 56
    def __init__(self, lr): self.lr,self.first,self.gone = lr,None,[]
    def before_batch(self):
        self.shared = self.learn.k_means.shared
        if self.first is None: self.first = [o.codes.clone() for o in self.shared]
    def after_backward(self): self.grads,self.was = [o.p.grad.flatten().double() for o in self.shared],[o.p.detach().flatten().clone() for o in self.shared]
    def after_step(self):
        for o,c,g,w in zip(self.shared, self.first, self.grads, self.was):
            stay = w!=0
            assert torch.equal(o.codes[stay], c[stay]) and torch.isin(o.codes[~stay], o.zero).all()
            v,now = w.double()-self.lr*torch.zeros(o.n, dtype=torch.double).index_add_(0, c[stay], g[stay])[c],o.p.detach().flatten()
            kept = stay & (now!=0)
            assert torch.allclose(now[kept].double(), v[kept], rtol=1e-4, atol=1e-6) and not now[~stay].any()
            for k in c[kept].unique(): assert len(now[kept & (c==k)].unique())==1
        self.gone.append(sum(int((o.p==0).sum()) for o in self.shared))

@pytest.mark.parametrize('granularity', ['weight','kernel','filter'])
@pytest.mark.parametrize('per_channel', [False,True])
def test_weights_that_go_while_others_share(granularity, per_channel):
    learn = learner(opt_func=SGD)
    fit(learn, 4, [KMeansCallback(3, per_channel=per_channel), SparsifyCallback(75, granularity, 'local', schedule='lin'), w := Leaving(1e-2)], lr=1e-2)
    assert w.gone==sorted(w.gone) and w.gone[-1]>2*w.gone[0]
    for m in learn.model:
        if isinstance(m, nn.Conv2d): assert int((m.weight==0).sum())==(m.weight.numel()*3//4)

def test_tickets_of_shared_weights():
    learn,seen = learner(),[]
    look = At('after_step', lambda cb: seen.append([w.detach().clone() for w in weights(cb.model)]), order=80)
    fit(learn, 3, [KMeansCallback(2), SparsifyCallback(60, schedule='iterative', lth=True), At('before_batch', lambda cb: seen.append([w.detach().clone() for w in weights(cb.model)]), 1), look])
    rewound = [o for o in seen[1:] if all(torch.equal(a[a!=0], b[a!=0]) for a,b in zip(o, seen[0]))]
    assert len(rewound)>=2 and all(len(w.unique())<=5 for o in seen for w in o)

@pytest.mark.parametrize('axis', [None,0])
def test_no_waiting_for_the_device(axis):
    "On (fake) CUDA weights, where asking for a value raises, gradients are summed and values written beside the weight"
    real = SharedWeight(nn.Parameter(torch.randn(4, 6)), 4, axis)
    with FakeTensorMode():
        fake = copy.copy(real)
        for k,v in vars(real).items():
            if isinstance(v, torch.Tensor): setattr(fake, k, nn.Parameter(torch.empty(v.shape, device='cuda')) if k=='p' else torch.empty(v.shape, dtype=v.dtype, device='cuda'))
        fake.p.grad = torch.empty(4, 6, device='cuda')
        fake.sum_grad()
        fake.drop_zeros()
        fake.snap()
        assert {v.device.type for v in vars(fake).values() if isinstance(v, torch.Tensor)}=={'cuda'}

SIZES = (16,3,3,3),(32,16,3,3),(9,7,1,1),(5,129,1,1),(6,41),(161,129),(64,32,3,3),(7,),(2,)
WAYS = dict(one_by_one=lambda ws: ws, by_pairs=lambda ws: [_ByPairs(o) for o in ws], together=lambda ws: [_Together(ws)], chosen=lambda ws: [SharedWeights(ws)])

@functools.cache
def made(dtype, axis, bits, layout):
    torch.manual_seed(0)
    ws = []
    for i,size in enumerate(SIZES):
        x = torch.randn(size, dtype=dtype)
        x[x.abs()<.3] = 0
        p = nn.Parameter(x.to(memory_format=layout) if len(size)==4 and i%3 else x)
        ws.append(SharedWeight(p, 2**bits, axis if len(size)>1 else None, init='linear'))
    return ws

def many(*args):
    "Shared weights of all sizes, with zeros, some with a gradient of another layout, one without any"
    ws = copy.deepcopy(made(*args))
    torch.manual_seed(0)
    for i,o in enumerate(ws):
        if i!=4: o.p.grad = torch.randn_like(o.p)
        if i in (1,6): o.p.grad = o.p.grad.contiguous()
    return ws

def a_step(ws, way):
    way = WAYS[way](ws)
    for o in way: o.sum_grads() if isinstance(o, SharedWeights) else o.sum_grad()
    grads = [None if o.p.grad is None else o.p.grad.clone() for o in ws]
    with torch.no_grad():
        for o in ws: o.p += 1e-4*torch.arange(o.p.numel(), dtype=torch.double).view(o.p.shape)  # no two elements are equal
    for o in way: o.snap()
    return grads,[o.p.detach() for o in ws]

@pytest.mark.parametrize('way', ['by_pairs','together','chosen'])
@pytest.mark.parametrize('layout', [torch.contiguous_format,torch.channels_last])
@pytest.mark.parametrize('dtype,bits,axis', [(torch.float32,1,None), (torch.float32,4,None), (torch.float32,8,None), (torch.float64,2,0), (torch.bfloat16,2,None), (torch.float32,1,0), (torch.float32,2,1), (torch.float16,4,1)])
def test_all_ways_are_one_by_one(way, layout, dtype, bits, axis):
    "The same sums, and after a step those that share are equal to the last bit and zeros are zero"
    ws,again = many(dtype, axis, bits, layout),many(dtype, axis, bits, layout)
    (grads,ps),(wanted,want) = a_step(ws, way),a_step(again, 'one_by_one')
    rtol = {torch.float64:1e-12, torch.float32:1e-4, torch.float16:2e-3, torch.bfloat16:1e-2}[dtype]
    for g,w,p in zip(grads, wanted, ps):
        assert (g is None)==(w is None)
        if g is not None: assert g.any() and g.dtype==dtype and torch.allclose(g, w, rtol=rtol, atol=rtol)
    for p,w,o in zip(ps, want, ws):
        assert torch.equal(p, w) and p.stride()==w.stride() and not p.flatten()[torch.isin(o.codes, o.zero)].any()

@pytest.mark.parametrize('way', ['by_pairs','together'])
def test_all_ways_after_zeros_are_dropped(way):
    ws,again = many(torch.float32, None, 2, torch.channels_last),many(torch.float32, None, 2, torch.channels_last)
    for os in ws,again:
        for o in os:
            with torch.no_grad(): o.p[o.p==o.p.max()] = 0
        if os is ws:
            shared = SharedWeights(os)
            shared.snap()
            before = shared._by_device()[0]
            for o in os:
                with torch.no_grad(): o.p[o.p==o.p.max()] = 0
            shared.drop_zeros()
            assert shared._by_device()[0] is not before  # found again
            assert shared._by_device()[0] is shared._by_device()[0]
        else:
            for o in os: o.snap()
            for o in os:
                with torch.no_grad(): o.p[o.p==o.p.max()] = 0
                o.drop_zeros()
    (grads,ps),(wanted,want) = a_step(ws, way),a_step(again, 'one_by_one')
    for a,b in zip(ps, want): assert torch.equal(a, b)
    for a,b in zip(grads, wanted): assert a is None and b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)

def test_views_of_another_tensor():
    "A weight that begins at an odd place of its storage, as one of flattened parameters does, or whose elements have gaps"
    for place in 1,2:
        store = torch.randn(2**14+2)
        p = nn.Parameter(store[place:place+2**14].view(128,128))
        q = nn.Parameter(torch.randn(128,256)[:,::2])
        for o in (SharedWeight(p, 4),SharedWeight(q, 4)):
            o.p.grad = torch.randn(2**15+1)[1:][::2].view(128,128) if place==1 else torch.randn(128,128)
            want = torch.zeros(o.n).index_add_(0, o.codes, o.p.grad.flatten()).index_fill(0, o.zero, 0)[o.codes].view(128,128)
            way = _ByPairs(o)
            way.sum_grad()
            assert way.paired and torch.allclose(o.p.grad, want, atol=1e-3)
            o.p.data += torch.arange(2**14).view(128,128)
            way.snap()
            v = o.p.detach().flatten()
            assert torch.equal(v, v[o.first][o.codes])

@pytest.mark.parametrize('layout', [torch.contiguous_format,torch.channels_last])
def test_operations_do_not_grow_with_layers(layout):
    def operations(n, event):
        ws = [SharedWeight(nn.Parameter(torch.randn(8,4,3,3).to(memory_format=layout)), 4) for _ in range(n)]
        for o in ws: o.p.grad = torch.randn_like(o.p)
        together = _Together(ws)
        with Count() as c: getattr(together, event)()
        return c.n
    for event,most in (('sum_grad',8),('snap',6)): assert operations(2, event)==operations(40, event)<=most

def on_gpu(o):
    "A copy with fake tensors that say that they are on a GPU"
    fake = copy.copy(o)
    for k,v in vars(o).items():
        if isinstance(v, torch.Tensor): setattr(fake, k, torch.empty(v.shape, dtype=v.dtype, device=FAKE_GPU))
    fake.p = nn.Parameter(fake.p)
    fake.p.grad = torch.empty_like(fake.p)
    return fake

def test_together_waits_for_no_value():
    "On a (fake) GPU, weights of one dtype are together, and asking for a value raises"
    real = [SharedWeight(nn.Parameter(torch.randn(4, 6, dtype=dtype)), 4, axis) for dtype in (torch.float32,torch.float64) for axis in (None,0)]
    with FakeTensorMode():
        shared = SharedWeights(map(on_gpu, real))
        ways = [_Together(shared[:2]),_Together(shared[2:])]
        for o in ways:
            o.sum_grad()
            o.snap()
        if FAKE_GPU=='cuda':
            shared.sum_grads(), shared.drop_zeros(), shared.snap()
            assert [[o.p.dtype for o in w.weights] for w in shared._by_device()]==[[torch.float32]*2,[torch.float64]*2]

def test_parts_of_sums_do_not_depend_on_threads():
    n,sums = torch.get_num_threads(),[]
    try:
        for threads in 1,2:
            torch.set_num_threads(threads)
            ws = many(torch.float32, None, 4, torch.contiguous_format)
            SharedWeights(ws).sum_grads()
            sums.append([o.p.grad for o in ws if o.p.grad is not None])
    finally: torch.set_num_threads(n)
    assert all(torch.equal(a, b) for a,b in zip(*sums))

@pytest.mark.parametrize('cb,says', [(lambda: PruneCallback(50), 'whose shapes PruneCallback changes'), (lambda: SparsifyCallback(50, schedule='dsd'), 'falls')])
def test_what_cannot_be_with_clusters_is_refused(cb, says):
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ValueError, match=says): fit(learn, 1, [KMeansCallback(2), cb()])
    assert same(before, state(learn.model))

def test_centroids_follow_their_gradients():
    "A step of SGD moves a value by the sum of its weights' gradients, also when these were accumulated"
    learn = learner(half_zero(), opt_func=SGD)
    got = []
    def look(o): got.append([(s.p.detach().clone(), s.p.grad.clone(), s) for s in o.learn.k_means.shared])
    fit(learn, 1, [KMeansCallback(2), GradientAccumulation(16), At('before_step', look, order=53)], lr=.1, wd=0.)
    after = [[s.p.detach() for *_,s in got[-1]]]
    for i,now in enumerate(got):
        for j,(w,g,s) in enumerate(now):
            new = (got[i+1][j][0] if i+1<len(got) else after[0][j]).flatten()
            for c in s.codes.unique():
                m = s.codes==c
                want = w.flatten()[m]-.1*g.flatten()[m].sum() if c%5 else torch.zeros(int(m.sum()))
                assert torch.allclose(new[m], want, atol=1e-6)

def test_momentum_of_an_earlier_fit():
    learn = learner(half_zero(), opt_func=partial(SGD, mom=.9))
    fit(learn, 1, KeepSparsity())
    fit(learn, 1, [KMeansCallback(2), w := Watch()])
    assert w.seen==4

def test_second_fit_goes_on():
    "A second fit finds the clusters of the first; without the callback they part"
    learn = learner(half_zero())
    learn.add_cb(KMeansCallback(2))
    fit(learn)
    first = [partition(w) for w in weights(learn.model)]
    fit(learn)
    assert all(torch.equal(partition(w), c) for w,c in zip(weights(learn.model), first)) and learn.k_means.shared is None
    learn.remove_cb(learn.k_means)
    fit(learn)
    assert len(weights(learn.model)[0].unique())>9

@pytest.mark.parametrize('ex', [KeyboardInterrupt,CancelFitException,CancelEpochException,CancelBatchException])
@pytest.mark.parametrize('event', ['after_pred','before_step','after_step','after_batch'])
def test_interrupted(ex, event):
    learn = learner(half_zero())
    learn.add_cb(KMeansCallback(2))
    try: fit(learn, 1, At(event, raises(ex), n=2))
    except ex: pass
    assert all(len(w.unique())<=5 for w in weights(learn.model))
    fit(learn)
    assert all(len(w.unique())<=5 for w in weights(learn.model)) and learn.k_means.shared is None

def test_lr_find_and_validate_change_nothing(tmp_path):
    learn = learner(path=tmp_path)
    learn.add_cb(KMeansCallback(2))
    before = state(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False, num_it=6)
        learn.validate(), learn.get_preds()
    assert same(before, state(learn.model))
    fit(learn)
    assert len(weights(learn.model)[0].unique())<=4

def test_export(tmp_path):
    learn = learner(half_zero(), path=tmp_path)
    learn.add_cb(KMeansCallback(2))
    fit(learn)
    learn.export('a.pkl')
    loaded = load_learner(tmp_path/'a.pkl')
    assert same(state(loaded.model), state(learn.model))
    loaded.dls = learn.dls
    assert len(weights(fit(loaded).model)[0].unique())<=5

def test_frozen_layers_share_and_stay():
    learn = learner(half_zero(), splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.freeze()
    fit(learn, 1, [KMeansCallback(2), Watch()])
    assert [len(w.unique()) for w in weights(learn.model)]==[5]*3

@pytest.mark.parametrize('backend', ['eager'])
def test_compiled(backend):
    model = half_zero()
    fit(learner(torch.compile(model, backend=backend)), 1, KMeansCallback({'0':2}))
    assert len(model[0].weight.unique())==5 and len(model[8].weight.unique())>5

# --- the quantizer

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.head = nn.Embedding(20, 8),nn.Linear(8, 20)
        self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.emb(x))

def test_tied_weights_once():
    for bits in 2, {'head':2}, {'head.weight':2}, {'emb':2}:
        q,m = KMeansQuantizer(bits),Tied()
        q.quantize(m)
        assert len(q.report())==1 and m.head.weight is m.emb.weight and len(m.emb.weight.unique())==4

def test_default_leaves_biases_norms_and_tables():
    m = nn.ModuleDict(dict(c=nn.Conv2d(3,8,3), n=nn.LayerNorm([8,4,4]), a=nn.MultiheadAttention(8,2), t=nn.ConvTranspose2d(8,3,3), r=nn.LSTM(4,4), g=nn.BatchNorm2d(8)))
    m.pos = nn.Parameter(torch.randn(1,5,8))
    for p in m.parameters(): nn.init.normal_(p)
    before = state(m)
    q = KMeansQuantizer(1)
    q.quantize(m)
    changed = {k for k,v in state(m).items() if not torch.equal(v, before[k])}
    assert changed=={'c.weight','a.in_proj_weight','a.out_proj.weight','t.weight','r.weight_ih_l0','r.weight_hh_l0'} and len(q.report())==6

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
@pytest.mark.parametrize('per_channel', [False,True])
def test_dtypes_layouts_and_repetition(dtype, per_channel):
    m = nn.Sequential(nn.Conv2d(8,16,3), nn.ConvTranspose2d(16,4,3)).to(dtype).to(memory_format=torch.channels_last)
    KMeansQuantizer(3, per_channel=per_channel).quantize(m)
    slices = [*m[0].weight, *m[1].weight.transpose(0,1)] if per_channel else [m[0].weight, m[1].weight]
    assert all(len(o.unique())<=8 for o in slices) and m[0].weight.is_contiguous(memory_format=torch.channels_last)
    before = state(m)
    for b in (3,5): KMeansQuantizer(b, per_channel=per_channel).quantize(m)
    assert same(before, state(m))

def test_per_channel_is_nearer():
    torch.manual_seed(0)
    a = nn.Linear(64,32)
    a.weight.data *= torch.arange(1,33)[:,None]
    b,q,r = copy.deepcopy(a),KMeansQuantizer(2),KMeansQuantizer(2, per_channel=True)
    q.quantize(a), r.quantize(b)
    assert r.report().error[0]<.8*q.report().error[0]

@pytest.mark.parametrize('bits,says', [(0,'from 1 to 8'), (9,'from 1 to 8'), (2.,'from 1 to 8'), (True,'from 1 to 8'), ({'0':0},'from 1 to 8'), ({'00':2},"did you mean '0'"), ({'0.weigth':2},"did you mean '0.weight'"),
    ({'2':2},'no layer'), ({},'none was named'), (lambda n,p: 9,'0.weight'), (lambda n,p: None,'none was named')])
def test_refused_before_anything_changes(bits, says):
    m = net()
    before = state(m)
    with pytest.raises(ValueError, match=says): KMeansQuantizer(bits).quantize(m)
    assert same(before, state(m))

def test_nan_is_refused_before_anything_changes():
    m = net()
    m[8].weight.data[0,0] = float('nan')
    before = {k:v.nan_to_num(7.) for k,v in state(m).items()}
    with pytest.raises(ValueError, match='8.weight'): KMeansQuantizer(2).quantize(m)
    assert same(before, {k:v.nan_to_num(7.) for k,v in state(m).items()})

def test_names_of_the_callback_are_refused_before_training():
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ValueError, match="did you mean '0'"): fit(learn, 1, KMeansCallback({'00':2}))
    assert same(before, state(learn.model))

def test_report():
    m = half_zero()
    q = KMeansQuantizer({'0':2, '8.bias':1})
    df = (q.quantize(m), q.report())[1]
    assert list(df.layer)==['0','8.bias'] and list(df.weights)==[216,4] and list(df.zeros)==[108,0] and list(df['values'])==[4,2] and (df.error>0).all()
    assert pickle.loads(pickle.dumps(q)).report().equals(df)
