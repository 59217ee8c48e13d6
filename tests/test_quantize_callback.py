"""Networks that compute with the numbers of int8 while they are trained: which numbers, what is left of it, and beside what else"""
import copy, io, pickle, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fastai.callback.core import Callback
from fastai.torch_core import TensorImage
from fasterai.core.pace import Training, attach
from fasterai.misc.all import BN_Folder
from fasterai.prune.all import PruneCallback
from fasterai.quantize.all import *
from fasterai.quantize.int8 import Int8, Int8Conv2d, Int8Linear
from fasterai.quantize.rounding import _Nearest, levels_of, steps_of
from fasterai.sparse.all import KeepSparsity, Sparsifier, SparsifyCallback
from tiny import At, X, Y, fit, learner, net, raises, same, state, Small, warnings_are

def rounded(m): return [n for n,o in m.named_modules() if hasattr(type(o), '_plain')]
def marks(m): return [(type(o),sorted(vars(o))) for o in m.modules()],[*map(id, m.parameters())],[*m.state_dict()],[o for m in m.modules() for o in m._forward_pre_hooks]

def steps(model, technique, n=4, k=0, stop=None, run=None, opt=None):
    "Train by hand; the numbers that come out at the end, in eval mode, before training has ended"
    opt = opt or torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    run = run or model
    with attach(technique, Training(run, opt, sample=lambda: (X[:2],)), n, k):
        for i in range(k, n if stop is None else stop):
            run.train()
            opt.zero_grad()
            F.cross_entropy(run(X[8*i%48:][:8]), Y[8*i%48:][:8]).backward()
            opt.step()
        run.eval()
        with torch.no_grad(): return run(X)

# --- numbers

@pytest.mark.parametrize('lowest,highest', [(-1,2),(0,3),(-2,0),(.5,1),(-1,-.5),(0,0)])
def test_inputs_are_those_of_torch(lowest, highest):
    x = (3*torch.randn(2000)).requires_grad_()
    step,zero = levels_of(torch.tensor(float(lowest)), torch.tensor(float(highest)))
    ours,theirs = _Nearest.apply(x, step, zero),torch.fake_quantize_per_tensor_affine(x, step, zero.int(), 0, 255)
    assert torch.allclose(ours, theirs, atol=1e-6)
    weight = torch.randn(2000)
    assert torch.equal(*(torch.autograd.grad((o*weight).sum(), x)[0] for o in (ours,theirs)))

@pytest.mark.parametrize('layer', [nn.Linear(20, 7), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)])
def test_weights_are_those_that_int8_stores(layer):
    layer.weight.data[0] = 0
    w = layer.weight
    ours,stored = _Nearest.apply(w, steps_of(w)),(Int8Linear if isinstance(layer, nn.Linear) else Int8Conv2d)(layer)
    assert torch.equal(ours, stored.weight)
    n = len(w)
    theirs = torch.fake_quantize_per_channel_affine(w, steps_of(w).flatten(), torch.zeros(n, dtype=torch.int), 0, -127, 127)
    assert torch.allclose(ours, theirs, atol=1e-7)
    g = torch.randn_like(w)
    assert torch.equal(*(torch.autograd.grad((o*g).sum(), w)[0] for o in (ours,theirs)))
    assert not ours[0].any()

def test_ranges_are_means_then_averages():
    "Of the first hundred steps, then with a weight of a hundredth; parts of a step are one"
    m = nn.Sequential(nn.Linear(3, 3))
    with Rounding(m) as r:
        seen = torch.randn(120, 2, 5, 3)
        want = torch.zeros(2)
        for i,parts in enumerate(seen):
            for x in parts: m(x)
            r.update()
            want += (torch.stack(parts.aminmax())-want)/min(i+1, 100)
        assert torch.allclose(torch.tensor(r.ranges['0']), want, atol=1e-5)
        m.eval()
        m(100*seen[0])
        r.update()
        assert torch.allclose(torch.tensor(r.ranges['0']), want, atol=1e-5)

def test_what_is_not_finite_stays_so_and_moves_no_range():
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with Rounding(m) as r:
        m(torch.randn(5, 3))
        r.update()
        before = r.ranges
        for bad in (float('nan'),float('inf')):
            x = torch.randn(5, 3)
            x[0,0] = bad
            out = m(x)
            if bad!=bad: assert out[0].isnan().all()
            r.update()
            assert r.ranges['0']==before['0']

def test_first_step_has_its_own_range():
    torch.manual_seed(0)
    m,x = nn.Linear(8, 8),torch.randn(4, 8)
    want = Int8Linear(m, x.min().item(), x.max().item())
    want = want.run(want._rounded(x), want.weight, want.bias, want.how)
    with Rounding(m):
        for _ in range(2): assert torch.allclose(m(x), want, atol=1e-6)
        m.eval()
        assert torch.allclose(m(x), want, atol=1e-6)

def test_int8_computes_what_was_trained():
    model,technique = net(),Quantize(measure=False)
    sim = steps(model, technique, 6)
    int8 = technique.quantizer.quantize(model)
    assert sum(isinstance(o, Int8) for o in int8.modules())==3
    with torch.no_grad():
        assert torch.allclose(int8(X), sim, atol=2e-3)
        assert not torch.allclose(model(X), sim, atol=1e-6)
    assert [*technique.quantizer.report().error[:3]]<[.1]*3

def test_norms_may_be_folded_afterwards():
    "Each output has a step of its own, so a norm that multiplies it changes no level"
    torch.manual_seed(0)
    model,x = Small(),torch.randn(16, 1, 8, 8)
    with Rounding(model) as r:
        for _ in range(3):
            model(x)
            r.update()
        model.eval()
        with torch.no_grad(): sim = model(x)
        ranges = r.ranges
    int8 = Quantizer(ranges=ranges, measure=False).quantize(BN_Folder().fold(model), x)
    assert sum(isinstance(o, Int8) for o in int8.modules())==4 and not any(isinstance(o, nn.BatchNorm2d) for o in int8.modules())
    with torch.no_grad(): assert torch.allclose(int8(x), sim, atol=2e-2*sim.std().item())

def deep(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))

def followed(model, x):
    "Ranges of a model, and what it gives with them"
    with Rounding(model) as r:
        for _ in range(3):
            model.train()(x)
            r.update()
        with torch.no_grad(): return r.ranges,model.eval()(x)

def test_ranges_follow_names():
    "Folding takes norms out of a Sequential, and layers get other numbers: some are those of another layer before"
    torch.manual_seed(0)
    model,x = deep(),torch.randn(16, 1, 8, 8)
    ranges,sim = followed(model, x)
    assert [*ranges]==['0','3','7','9']
    folded = BN_Folder().fold(model, x)
    quantizer = Quantizer(ranges=ranges, measure=False)
    int8 = quantizer.quantize(folded, x)
    assert [n for n,m in int8.named_modules() if isinstance(m, Int8)]==['0','2','5','7']
    for was,now in zip('0379', '0257'): assert torch.allclose(int8.get_submodule(now).ends, torch.tensor(ranges[was]))
    with torch.no_grad(): assert torch.allclose(int8(x), sim, atol=2e-2*sim.std().item())
    with Rounding(folded, ranges=ranges) as r: assert [*r.ranges]==['0','2','5','7']
    again = Quantizer(ranges=pickle.loads(pickle.dumps(copy.deepcopy(ranges))), measure=False).quantize(folded, x)
    with torch.no_grad(): assert torch.equal(again(x), int8(x))
    assert [*quantizer.quantize(model, x).state_dict()][0]=='0.whole'  # of the model that was trained, as ever

def test_ranges_of_blocks_that_went():
    class Block(nn.Module):
        def __init__(self): super().__init__(), setattr(self, 'lin', nn.Linear(8, 8))
        def forward(self, x): return x+self.lin(x).relu()
    from fasterai.prune.all import drop_blocks
    torch.manual_seed(0)
    model,x = nn.Sequential(nn.Linear(6, 8), Block(), Block(), nn.Linear(8, 3)),torch.randn(16, 6)
    ranges,_ = followed(model, x)
    drop_blocks(model, ['1'], example_inputs=x)
    int8 = Quantizer(ranges=ranges, measure=False).quantize(model, x)
    found = {n:m.ends for n,m in int8.named_modules() if isinstance(m, Int8)}
    assert len(found)==3 and torch.allclose(found['2.lin'], torch.tensor(ranges['2.lin']))

def test_left_in_float_is_told():
    "For whatever reason; what was not asked for is none"
    model,x = deep(),torch.randn(4, 1, 8, 8)
    ranges = followed(model, x)[0]
    for layers,left in ((None,1),(['0'],0)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            Quantizer(ranges=ranges | {'9':(0,0)}, layers=layers, measure=False).quantize(model, x)
        told = [str(o.message) for o in said if 'with a range stay in float' in str(o.message)]
        assert len(told)==left and all('9: all its inputs are zero' in o for o in told)

# --- nothing is left

def test_model_is_its_own():
    model = net()
    before = marks(model)
    with Rounding(model):
        assert marks(model)[1:3]==before[1:3] and rounded(model)==['0','3','8']
        assert isinstance(model[0], nn.Conv2d) and type(model[0]).__name__=='Conv2d' and type(model[0]).__module__==nn.Conv2d.__module__
    assert marks(model)==before

@pytest.mark.parametrize('copied', [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: _saved(m)])
def test_copies_are_plain(copied):
    model = net().eval()
    want = model(X)
    with Rounding(model):
        for m in (copied(model),nn.Sequential(*map(copied, model))):
            if copied is not copy.copy or m[0] is not model[0]:
                assert not rounded(m) and torch.equal(m(X), want) and marks(m)[0]==marks(net())[0]
        assert rounded(model)

def _saved(m):
    torch.save(m, f := io.BytesIO())
    f.seek(0)
    return torch.load(f, weights_only=False)

def test_parametrized_copies_too():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    x = torch.randn(3, 8)
    want = model(x)
    with Rounding(model):
        assert not torch.equal(model(x), want)
        assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(model(x), want)

@pytest.mark.parametrize('own', [False,True])
def test_error_in_the_middle(own):
    "The model computes in float after it, whether the callback was given to the fit or to the learner"
    learn = learner()
    before = marks(learn.model)
    cb,bad = QuantizeCallback(),At('after_step', raises(KeyError), n=3)
    learn.add_cbs([cb] if own else [])
    with pytest.raises(KeyError): fit(learn, 2, [bad]+([] if own else [cb]))
    assert marks(learn.model)==before and len(cb.ranges)==3
    fit(learn, 1, None if own else cb)
    assert marks(learn.model)==before

def test_takes_over_from_a_loop_that_was_broken_off():
    model = net()
    before = marks(model)
    old = Rounding(model)
    with Rounding(model):
        old.remove()
        assert rounded(model)
    assert marks(model)==before

def test_looks_see_the_float_network():
    "What the library runs to look at a model neither rounds nor moves ranges"
    from fasterai.core.running import call_with, untouched
    model = net().eval()
    want = model(X)
    with Rounding(model.train()) as r:
        with untouched(model): call_with(model, 100*X)
        assert not r.ranges
        with untouched(model.eval()): assert torch.equal(call_with(model, X), want)
        assert not torch.equal(model(X), want)

# --- in a fit

def test_fit_and_quantize():
    learn = learner()
    fit(learn, 2, cb := QuantizeCallback(measure=False))
    assert [*cb.ranges]==['0','3','8'] and cb.left=={} and not rounded(learn.model)
    int8 = cb.quantizer.quantize(learn.model)
    assert sum(isinstance(o, Int8) for o in int8.modules())==3

def test_validation_in_the_fit_sees_rounded_numbers():
    seen = []
    class Look(Callback):
        def after_pred(self):
            if not self.training: seen.append(len(rounded(self.model)))
    learn = learner()
    fit(learn, 1, [QuantizeCallback(), Look()])
    assert set(seen)=={3}
    learn.add_cb(Look())
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert seen[-1]==0

def test_in_mid_fit_the_quantizer_knows_the_ranges_of_then():
    cb,found = QuantizeCallback(measure=False),[]
    fit(learner(), 2, [cb, At('after_step', lambda o: found.append(cb.quantizer.quantize(o.model)), n=5)])
    assert sum(isinstance(o, Int8) for o in found[0].modules())==3

def test_masks_stay():
    learn = learner()
    cb = SparsifyCallback(50, 'weight', layer_type=(nn.Conv2d,nn.Linear))
    fit(learn, 2, [q := QuantizeCallback(measure=False), cb])
    zeros = {n:p==0 for n,p in learn.model.named_parameters() if p.dim()>1}
    assert all(int(o.sum())==o.numel()//2 for o in zeros.values())
    int8 = q.quantizer.quantize(learn.model)
    assert all((o.whole==0)[zeros[f'{n}.weight']].all() for n,o in int8.named_modules() if isinstance(o, Int8))

@pytest.mark.parametrize('first', [False,True])
def test_cut_in_the_middle(first):
    "Ranges, and steps of outputs, are those of what is left"
    learn = learner()
    cbs = [q := QuantizeCallback(measure=False), PruneCallback(50, 'lin', n_updates=3)]
    fit(learn, 2, cbs if first else cbs[::-1])
    m = learn.model
    assert m[0].out_channels==4 and [*q.ranges]==['0','3','8'] and not rounded(m)
    int8 = q.quantizer.quantize(m)
    assert [len(o.steps) for o in int8.modules() if isinstance(o, Int8)]==[len(m[i].weight) for i in (0,3,8)]

def test_beside_shared_values():
    learn = learner()
    fit(learn, 2, [QuantizeCallback(), KMeansCallback(2)])
    assert all(len(learn.model[i].weight.unique())<=5 for i in (0,3,8))

def test_resume_has_the_same_bits():
    a,b = net(),net()
    opt = lambda m: torch.optim.SGD(m.parameters(), lr=.05, momentum=.9)
    whole = steps(a, t := Quantize(), 6)
    half,o = Quantize(),opt(b)
    with attach(half, Training(b, o), 6):
        for i in range(3):
            o.zero_grad()
            F.cross_entropy(b(X[8*i:][:8]), Y[8*i:][:8]).backward()
            o.step()
        kept = {k:v.clone() for k,v in half.state_dict().items()}
    again = Quantize()
    again.load_state_dict(kept)
    assert torch.equal(steps(b, again, 6, 3, opt=o), whole) and same(state(a), state(b)) and again.ranges==t.ranges
    with pytest.raises(ValueError, match="did you mean '0'"):
        wrong = Quantize()
        wrong.load_state_dict({'ranges.00':torch.zeros(3)})
        steps(net(), wrong)

def test_goes_on_after_its_end():
    "A checkpoint that is written after training knows what was followed"
    a,b = net(),net()
    opt = lambda m: torch.optim.SGD(m.parameters(), lr=.05, momentum=.9)
    whole = steps(a, t := Quantize(), 6)
    steps(b, first := Quantize(), 3, opt=(o := opt(b)))
    again = Quantize()
    again.load_state_dict(pickle.loads(pickle.dumps(first)).state_dict())
    assert torch.equal(steps(b, again, 6, 3, opt=o), whole) and again.ranges==t.ranges
    steps(b, first, 3, opt=o)
    assert first.ranges!=again.ranges  # another training begins anew

def test_learner_saves_ranges(tmp_path):
    learn = learner(path=tmp_path)
    fit(learn, 2, [cb := QuantizeCallback(), At('after_train', lambda o: o.learn.save('half'), n=1)])
    new = learner(path=tmp_path).load('half')
    fit(new, 2, again := QuantizeCallback(), start_epoch=1)
    assert again.ranges==cb.ranges and same(state(new.model), state(learn.model))

def test_learner_is_exported_with_it(tmp_path):
    learn = learner(path=tmp_path)
    learn.add_cb(cb := QuantizeCallback(measure=False))
    fit(learn, 1)
    back = pickle.loads(pickle.dumps(cb.technique))
    assert back.ranges==cb.ranges and back.quantizer.quantize(learn.model)

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_autocast(dtype):
    model,technique = net(),Quantize(measure=False)
    opt = torch.optim.SGD(model.parameters(), lr=.05)
    with attach(technique, Training(model, opt), 4):
        for i in range(4):
            with torch.autocast('cpu', dtype): loss = F.cross_entropy(model(X[8*i:][:8]), Y[8*i:][:8])
            opt.zero_grad()
            loss.backward()
            opt.step()
        model.eval()
        with torch.no_grad(): sim = model(X)
    assert all(p.dtype==torch.float32 and p.isfinite().all() for p in model.parameters())
    with torch.no_grad(): assert torch.allclose(technique.quantizer.quantize(model)(X), sim, atol=2e-3)

@pytest.mark.parametrize('backend', ['eager','aot_eager'])
def test_compiled(backend):
    torch._dynamo.reset()
    model,other = net(),net()
    run = torch.compile(model, backend=backend)
    sims = [steps(model, a := Quantize(), run=run), steps(other, b := Quantize())]
    assert torch.allclose(*sims, atol=1e-5) and a.ranges.keys()==b.ranges.keys()
    assert all(torch.allclose(torch.tensor(a.ranges[n]), torch.tensor(b.ranges[n]), atol=1e-5) for n in a.ranges)
    with torch.no_grad(): assert torch.allclose(run(X), model(X), atol=1e-6)  # in float again

def test_data_parallel():
    "Parts of a batch on several devices have one range: replicas share it"
    model = net()
    assert steps(nn.DataParallel(model), Quantize()).isfinite().all() and not rounded(model)
    with Rounding(model.train()) as r:
        for x in X.chunk(2):
            for m in model: # as `replicate` does
                twin = m._replicate_for_data_parallel()
                for k,p in m._parameters.items(): setattr(twin, k, p)
                x = twin(x)
        r.update()
        assert r.ranges['0']==(X.min().item(),X.max().item())

def test_checkpointed_activations():
    "What runs again in the backward pass is what ran before"
    from torch.utils.checkpoint import checkpoint
    a,b = net(norm=lambda n: nn.GroupNorm(2, n)),net(norm=lambda n: nn.GroupNorm(2, n))
    with Rounding(a) as ra, Rounding(b) as rb:
        for _ in range(3):
            a(X).square().sum().backward()
            checkpoint(b, X, use_reentrant=False).square().sum().backward()
            assert all(torch.equal(p.grad, q.grad) for p,q in zip(a.parameters(), b.parameters()))
            ra.update()
            rb.update()
        assert ra.ranges==rb.ranges

def test_encoder():
    "In eval mode, too, where PyTorch would run one operation in place of its layers"
    torch.manual_seed(0)
    m = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0., batch_first=True), 1)
    x,mask = torch.randn(3, 5, 16),torch.arange(5)>torch.tensor([[2],[3],[4]])
    before = marks(m)
    with Rounding(m) as r:
        m(x)
        r.update()
        out = m(x)
        m.eval()
        with torch.no_grad():
            assert torch.allclose(m(x), out, atol=1e-5)
            assert m(x, src_key_padding_mask=mask).isfinite().all()
        assert sorted(r.ranges)==['layers.0.linear1','layers.0.linear2']
    assert marks(m)==before

def test_images_of_fastai():
    model = net()
    with Rounding(model) as r:
        assert torch.equal(torch.Tensor(model(TensorImage(X))), model(X))
        model(TensorImage(X)).sum().backward()

def test_tied_and_shared_layers():
    model = Small(tied=True)
    with Rounding(model) as r:
        assert r.left==dict.fromkeys(['b','again'], 'another module has the same weights') and rounded(model)==['a','c','head']
    twice = nn.Linear(8, 8)
    m = nn.Sequential(twice, nn.Tanh(), twice)
    with Rounding(m) as r:
        m(10*X[:4,0,0].repeat(1, 2)[:,:8])
        r.update()
        assert [*r.ranges]==['0'] and r.ranges['0'][1]>1

def test_what_is_chosen():
    m = net()
    with Rounding(m, ignored_layers=['0', m[3]]): assert rounded(m)==['8']
    with Rounding(m, layer_type=nn.Conv2d) as r: assert rounded(m)==['0','3'] and r.left=={'8':'of another type'}
    learn = learner()
    fit(learn, 1, cb := QuantizeCallback('8', measure=False))
    int8 = cb.quantizer.quantize(learn.model)
    assert isinstance(int8[8], nn.Linear) and [*cb.quantizer.report().why[:3]]==['','','there is no range for it']
    class Own(nn.Conv2d):
        def forward(self, x): return super().forward(x)
    with pytest.warns(UserWarning, match='1 of 3 layers are not rounded to int8 .*Own has a forward of its own'): fit(learner(nn.Sequential(Own(3, 8, 1), *net()[1:])), 1, QuantizeCallback())

REFUSED = [
    (lambda: Rounding(net(), '00'), "no layer '00'.*did you mean '0'"),
    (lambda: Rounding(net(), nn.Linear(2, 2)), 'no layer like this Linear'),
    (lambda: Rounding(net(), layer_type='Conv2d'), 'layer_type is nn.Linear'),
    (lambda: Rounding(net(), layer_type=nn.BatchNorm2d), 'layer_type is nn.Linear'),
    (lambda: Rounding(nn.Sequential(nn.ConvTranspose1d(3, 3, 1))), 'no layer of this Sequential can be rounded'),
    (lambda: Rounding(net().half()), "its weights are float16"),
    (lambda: Rounding(nn.LazyLinear(3)), 'no shape yet'),
    (lambda: Rounding(net(), ranges={'1':(0,1)}), "a range for '1', which is not rounded"),
    (lambda: Quantizer(ranges={'0':3}), 'a range must be a lowest and a highest input'),
    (lambda: Quantizer(ranges={'0':(1,0)}), 'a range must be a lowest'),
    (lambda: Quantizer(ranges={'0':(float('nan'),0)}), 'a range must be a lowest'),
    (lambda: Quantizer('dynamic', ranges={}), "ranges are for method='static'"),
    (lambda: Quantizer(ranges={'00':(0,1)}).quantize(net()), "a range for '00'.*did you mean '0'"),
    (lambda: Quantize().quantizer.quantize(net()), 'needs calibration_data'),
    (lambda: Quantize(measure=3), 'measure must be True'),
    (lambda: fit(learner(), 1, [QuantizeCallback(), QuantizeCallback()]), 'two of QuantizeCallback')]

@pytest.mark.parametrize('f,why', REFUSED)
def test_refused(f, why):
    with pytest.raises(ValueError, match=why): f()

def test_refused_leaves_the_model():
    learn = learner()
    before = marks(learn.model)
    for cbs in ([QuantizeCallback(),QuantizeCallback()],[QuantizeCallback('x')]):
        with pytest.raises(ValueError): fit(learn, 1, cbs)
        assert marks(learn.model)==before
    with pytest.raises(TypeError, match="has no argument 'ignored'.*did you mean 'ignored_layers'"): QuantizeCallback(ignored='0')

def test_refused_when_it_is_made():
    "And not at the fit, an hour later"
    for args in (dict(layer_type='Linear'),dict(layer_type=nn.BatchNorm2d),dict(ignored_layers=3),dict(use_per_tensor=True),dict(quantizer=Quantizer()),dict(backend='x87')):
        with pytest.raises(ValueError): QuantizeCallback(**args)
    with pytest.raises(ValueError, match='write cb.quantizer|and cb.quantizer'): QuantizeCallback(Quantizer())
    with pytest.warns(FutureWarning, match=r'write QuantizeCallback\(\), and cb.quantizer.quantize'): cb = QuantizeCallback(backend='onednn')
    fit(learner(), 1, cb)
    assert len(cb.ranges)==3

def test_what_is_ignored_stays_so():
    "In a second fit as well, also where it came once"
    learn,cb = learner(),QuantizeCallback((o for o in ['0','3']), measure=False)
    for _ in range(2): fit(learn, 1, cb)
    assert [*cb.ranges]==['8']

def test_nothing_was_followed():
    learn = learner()
    with pytest.warns(UserWarning, match='has followed no ranges'): fit(learn, 1, [QuantizeCallback(), At('before_batch', lambda o: o.model.eval())])

def test_nothing_waits_for_the_device():
    "A step asks for no number"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Asked(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.n += op.overloadpacket is torch.ops.aten._local_scalar_dense
            return op(*args, **(kwargs or {}))
    model = net()
    with Rounding(model) as r, Asked() as mode:
        for _ in range(3):
            model(X).square().sum().backward()
            r.update()
    assert not mode.n

def test_accuracy_comes_back_where_channels_differ():
    "A channel that is much larger takes the levels of the others: int8 loses what training wins back in part"
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x[:,:4].sum(1)*x[:,4:].sum(1)>0).long()
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 2))
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    def train(n):
        for _ in range(n):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    def right(m):
        with torch.no_grad(): return (m.eval()(x).argmax(1)==y).float().mean().item()
    train(300)
    with torch.no_grad():
        for o in (model[0].weight[0],model[0].bias[:1]): o.mul_(400)
        model[2].weight[:,0].div_(400)
    plain,before = right(model),right(Quantizer(measure=False).quantize(model, x))
    opt,technique = torch.optim.Adam(model.parameters(), 1e-2),Quantize(measure=False)
    model.train()
    with attach(technique, Training(model, opt), 200): train(200)
    after = right(technique.quantizer.quantize(model))
    assert plain>.95 and before<plain-.1 and after>before+.05, (plain,before,after)

@pytest.mark.parametrize('how', [dict(padding='same', dilation=2), dict(padding=1, padding_mode='reflect'), dict(padding='same', padding_mode='circular')])
def test_padding_of_any_kind_is_trained(how):
    "What can be in int8 is rounded in training"
    torch.manual_seed(0)
    model,x = nn.Sequential(nn.Conv1d(3, 8, 3, **how), nn.ReLU(), nn.Conv1d(8, 4, 3, **how)),torch.randn(4, 3, 12)
    with Rounding(model) as rounding:
        for _ in range(3):
            model(x)
            rounding.update()
        ranges,trained = rounding.ranges,model.eval()(x).detach()
    assert set(ranges)=={'0','2'} and not rounding.left
    new = Quantizer('static', measure=False, ranges=ranges).quantize(model, [x])
    assert (new(x)-trained).abs().max()<.02*trained.abs().max()
