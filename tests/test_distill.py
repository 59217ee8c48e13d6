"""Distillation beside all that a fit may have, and with what it must refuse.

The claims are everywhere the same: the pairs are the user's, the teacher is untouched, validation tells the task's loss, and nothing is left behind."""
import copy, pickle, types
import pytest, torch
from fastai.callback.core import *
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper, Adam
from functools import partial
from torch import nn
from torch.nn import functional as F
import fasterai.distill.distillation_callback as module
from fasterai.core.schedule import Schedule, cos, lin, sched_cos
from fasterai.distill.all import *
from fasterai.distill.losses import loss_needs
from fasterai.sparse.all import SparsifyCallback
from tiny import WRAPPERS, At, X, Y, fit, learner, net, raises, same, state

def wide(seed=7):
    "A teacher of twice the width"
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3,16,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16,16,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,4))

def hooks(*models): return [n for model in models for n,m in model.named_modules() for o in ('_forward_hooks','_forward_pre_hooks','_backward_hooks') if getattr(m, o)]

BOTH = dict(loss=[SoftTarget,Attention,FitNet], activations_student=['2','5'], activations_teacher=['2','5'])

class Twins(Callback):
    "Keep weights after each step"
    order = 90
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append(state(self.model))

# --- the bars

def test_pairs_are_honoured():
    "Maps come in the order of the pairs, not of the layers, and a layer may come twice"
    seen = []
    def mine(fm_s, fm_t):
        seen.append(([tuple(o.shape[1:]) for o in fm_s], [tuple(o.shape[1:]) for o in fm_t]))
        return sum(o.square().mean() for o in fm_s)
    mine.any_shape = True
    t = wide()
    fit(learner(), 1, KnowledgeDistillationCallback(t, mine, ['8','0','5','0'], ['0','8','8','3']))
    assert seen==[([(4,),(8,6,6),(8,6,6),(8,6,6)], [(16,6,6),(4,),(4,),(16,6,6)])]*4

def test_pairs_are_these_values():
    "What a loss sees is what the layers gave, in their order, also where they are overwritten in place afterwards"
    def inplace(m):
        for o in m.modules():
            if isinstance(o, nn.ReLU): o.inplace = True
        return m
    s,t = inplace(net()),inplace(wide()).eval()
    kd = Distiller(t, lambda fm_s, fm_t: fm_s[0].sum(), ['4','1'], ['1','4']).prepare(s, X[:2])
    with kd.watch(s): s(X[:8])
    got = kd.kept['4'],kd.kept['1'],*kd.teach(X[:8])[1]
    s,t = inplace(net()),inplace(wide()).eval()
    want = s[:5](X[:8]),s[:2](X[:8]),t[:2](X[:8]),t[:5](X[:8])
    assert all(torch.allclose(a, b, atol=1e-6) and (b<0).any() for a,b in zip(got, want))

@pytest.mark.parametrize('how', [dict(), BOTH, dict(loss=['DIST','RKD'], activations_student=['7'], activations_teacher=['7'], alpha=.3)], ids=['logits','both','relations'])
@pytest.mark.parametrize('training', [True,False])
def test_teacher_untouched(how, training):
    "Parameters, statistics, flags and gradients of the teacher, bit for bit"
    t = wide().train(training)
    t[1].eval()
    t[3].weight.requires_grad_(False)
    before,flags,grads = state(t),[m.training for m in t.modules()],[p.requires_grad for p in t.parameters()]
    fit(learner(), 2, KnowledgeDistillationCallback(t, **how))
    assert same(before, state(t)) and flags==[m.training for m in t.modules()] and grads==[p.requires_grad for p in t.parameters()]
    assert all(p.grad is None for p in t.parameters()) and not hooks(t)

def test_validation_loss_equal():
    "With the callback, in the fit and beside it, validation tells what it tells without"
    learn = learner()
    cb = KnowledgeDistillationCallback(wide(), **BOTH)
    fit(learn, 2, cb)
    told = learn.recorder.values[-1][1]
    with learn.no_bar(), learn.no_logging():
        plain = learn.validate()
        learn.add_cb(cb)
        assert list(learn.validate())==list(plain) and told==pytest.approx(plain[0], abs=1e-6)

INTERRUPTS = 'before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_train before_validate'.split()

@pytest.mark.parametrize('event', INTERRUPTS)
@pytest.mark.parametrize('kept', [False,True], ids=['given to fit','kept'])
def test_hooks_gone(event, kept):
    "After an interrupt neither network has a hook, the optimizer none of our parameters, and the next fit works"
    learn,t = learner(),wide()
    cb = KnowledgeDistillationCallback(t, **BOTH)
    if kept: learn.add_cb(cb)
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [*([] if kept else [cb]), At(event, raises(KeyboardInterrupt), n=None if event.endswith('validate') else 2 if 'train' not in event else 1)])
    assert not hooks(learn.model, t)
    if not kept:
        assert '_do_one_batch' not in vars(learn) and sum(len(o) for o in learn.opt.param_lists)==len(list(learn.model.parameters()))
        learn.add_cb(cb)
    fit(learn, 1)
    assert '_do_one_batch' not in vars(learn) and sum(len(o) for o in learn.opt.param_lists)==len(list(learn.model.parameters()))

@pytest.mark.parametrize('which', ['student','teacher'])
@pytest.mark.parametrize('kept', [False,True], ids=['given to fit','kept'])
@pytest.mark.parametrize('ex', [KeyboardInterrupt,RuntimeError])
def test_hooks_gone_from_the_middle_of_a_network(which, kept, ex):
    "Also where a network is stopped half way, and the teacher's flags are back"
    class Stop(nn.Module):
        n = 0
        def forward(self, x):
            self.n += 1
            if self.n==5: raise ex('stop')
            return x
    s,t = net(),wide()
    (s if which=='student' else t)[6] = nn.Sequential(nn.AdaptiveAvgPool2d(1), Stop())
    learn,cb = learner(s),KnowledgeDistillationCallback(t, **BOTH)
    if kept: learn.add_cb(cb)
    with pytest.raises(ex): fit(learn, 2, None if kept else cb)
    assert not hooks(s, t) and all(m.training for m in t.modules())

@pytest.mark.parametrize('ex,event', [(CancelBatchException,'before_batch'), (CancelBatchException,'after_pred'), (CancelBatchException,'after_loss'), (CancelStepException,'before_step'), (CancelTrainException,'after_loss'), (CancelEpochException,'after_pred'), (CancelFitException,'after_backward'), (CancelFitException,'before_train')], ids=str)
def test_cancelled(ex, event):
    learn,t = learner(),wide()
    with learn.no_bar(), learn.no_logging():
        fit(learn, 2, [KnowledgeDistillationCallback(t, **BOTH), At(event, raises(ex), n=2)])
        assert not hooks(learn.model, t) and '_do_one_batch' not in vars(learn)
        fit(learn, 1, KnowledgeDistillationCallback(t, **BOTH))

# --- exactness

@pytest.mark.parametrize('weight,schedule', [(.3,None), (1.,None), (0.,None), (.8,lin), (.4,Schedule(sched_cos, .5, start_sparsity=.9))])
def test_same_as_a_loop(weight, schedule):
    "A fit gives the weights of a loop of plain PyTorch with the loss as defined"
    learn,t = learner(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)),wide()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .1, cbs=[KnowledgeDistillationCallback(t, SoftTarget, weight=weight, schedule=schedule), w := Twins()])
    m = net()
    opt,t,k = torch.optim.SGD(m.parameters(), .1),copy.deepcopy(t).eval(),0
    for _ in range(2):
        for x,y in zip(X[:32].split(8), Y[:32].split(8)):
            k += 1
            p = weight if schedule is None else schedule(k/8, weight)
            pred = m(x)
            with torch.no_grad(): tp = t(x)
            kl = (tp/5).softmax(1)*((tp/5).log_softmax(1)-(pred/5).log_softmax(1))
            (p*25*kl.sum(1).mean()+(1-p)*F.cross_entropy(pred, y)).backward()
            opt.step()
            opt.zero_grad()
            assert all(torch.allclose(v.float(), w.seen[k-1][n].float(), atol=1e-5) for n,v in m.state_dict().items())

def test_weight_zero_is_a_plain_fit():
    a,b = fit(learner(), 2),fit(learner(), 2, KnowledgeDistillationCallback(wide(), weight=0))
    assert same(state(a.model), state(b.model))

def test_terms_in_the_table():
    "Columns are the means of the terms, and the training loss is their mixture"
    learn,sums = learner(),[]
    cb = KnowledgeDistillationCallback(wide(), [SoftTarget,partial(SoftTarget, T=2),Attention], '2', '5', weight=.6, alpha=.3)
    fit(learn, 2, [cb, At('after_batch', lambda o: sums.append(o.loss.item()))])
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','task','SoftTarget','SoftTarget_2','Attention','time']
    for e,row in enumerate(learn.recorder.values):
        task,*kd = list(row)[2:]
        want = .6*(.3*(kd[0]+kd[1])+.7*kd[2])+.4*task
        assert sum(sums[4*e:4*e+4])/4==pytest.approx(want, rel=1e-5)

@pytest.mark.parametrize('cls', ['weight','KD first','KD last'])
def test_with_sparsify_in_any_order(cls):
    "One `Schedule` for both; the sparsity is exact, and order changes nothing"
    res = []
    for order in (1,-1):
        learn,cbs = learner(),[SparsifyCallback(50, schedule=cos), KnowledgeDistillationCallback(wide(), **BOTH, schedule=cos)][::order]
        fit(learn, 2, cbs)
        names,row = list(learn.recorder.metric_names)[1:-1],learn.recorder.values[-1]
        assert dict(zip(names, row))['sparsity']==pytest.approx(50) and len(names)==len(row)
        assert [int((learn.model[i].weight==0).sum()) for i in (0,3)]==[108,288]
        res.append(dict(zip(names, row)))
    assert {k:pytest.approx(v, rel=1e-4) for k,v in res[0].items()}==res[1]

# --- what else a fit may have

class OnCPU(MixedPrecision):
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.parametrize('name', kd_losses)
def test_mixed_precision(name):
    "Both networks run in bf16, each loss is float32 and finite"
    seen,t = [],wide()
    t[8].register_forward_hook(lambda m, a, o: seen.append((torch.is_autocast_enabled('cpu'), o.dtype)))
    layers = ('5','5') if 'fm_s' in loss_needs(kd_losses[name]) else (None,None)
    learn = fit(learner(), 1, [OnCPU(amp_mode='bf16'), cb := KnowledgeDistillationCallback(t, name, *layers)])
    assert cb.distiller.terms[name].dtype==torch.float32 and cb.distiller.terms[name].isfinite()
    assert set(seen[-4:])=={(True, torch.bfloat16)} and all(p.isfinite().all() for p in learn.model.parameters())

def test_half_precision_student():
    "A student in bf16 beside a teacher in float32, and the other way round"
    for s,t in ((net().bfloat16(), wide()), (net(), wide().bfloat16())):
        kd = Distiller(t, [SoftTarget,FitNet], '5', '5').prepare(s, x := X[:8].to(s[0].weight.dtype))
        with kd.watch(s): pred = s(x)
        loss = kd.loss(pred, x)
        loss.backward()
        assert loss.dtype==torch.float32 and loss.isfinite() and all(p.grad is not None for p in [*kd.parameters(), *s[:5].parameters()])

def test_gradient_accumulation():
    "Gradients of four batches, accumulated, are those of one that holds them all"
    def grads(bs, cbs):
        seen,learn = [],learner(net(norm=nn.Identity), bs=bs)
        fit(learn, 1, [KnowledgeDistillationCallback(wide(), SoftTarget, weight=.7), At('before_step', lambda o: seen.append([p.grad.clone() for p in o.model.parameters()])), *cbs])
        return seen[-1]
    assert all(torch.allclose(a, b, atol=1e-5) for a,b in zip(grads(8, [GradientAccumulation(32)]), grads(32, [])))

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_mixed_labels(mix):
    "A loss that names `target` gets probabilities of the classes where labels are mixed, and DecoupledKD refuses them"
    seen = []
    def mine(pred, teacher_pred, target):
        seen.append(target)
        return -(target*pred.log_softmax(1)).sum(1).mean()
    tasks = []
    fit(learner(loss_func=CrossEntropyLossFlat()), 1, [mix(1.), KnowledgeDistillationCallback(wide(), mine), At('after_loss', lambda o: tasks.append((o.knowledge_distillation.sums['task'].item(), o.knowledge_distillation.sums['mine'].item())))])
    assert len(seen)==4 and all(o.shape==(8,4) and torch.allclose(o.sum(1), torch.ones(8)) for o in seen)
    assert all(a==pytest.approx(b, rel=1e-4) for a,b in tasks)  # cross entropy with these labels is the mixed loss
    with pytest.raises(ValueError, match='soft labels'): fit(learner(loss_func=CrossEntropyLossFlat()), 1, [mix(1.), KnowledgeDistillationCallback(wide(), DecoupledKD)])
    fit(learner(loss_func=CrossEntropyLossFlat()), 1, [mix(1.), KnowledgeDistillationCallback(wide(), **BOTH)])

def test_export_and_save(tmp_path):
    "A saved learner has its student, not its teacher; it predicts, and says what it lacks when it is to train"
    learn = learner(path=tmp_path)
    learn.add_cb(KnowledgeDistillationCallback(wide(), **BOTH))
    fit(learn, 1, SaveModelCallback(fname='best'))
    learn.export('a.pkl')
    assert (tmp_path/'a.pkl').stat().st_size<60_000
    loaded = load_learner(tmp_path/'a.pkl')
    assert same(state(loaded.model), state(learn.model))
    loaded.dls = learn.dls
    with loaded.no_bar(), loaded.no_logging():
        loaded.validate()
        with pytest.raises(RuntimeError, match='not saved with its student'): loaded.fit(1)
    learn.save('m', with_opt=True)
    other = learner(path=tmp_path).load('m', with_opt=True)
    assert same(state(other.model), state(learn.model))

def test_copies_in_mid_fit():
    learn,copies = learner(),[]
    def take(o): copies.append((state(o.model), copy.deepcopy(o.model), pickle.loads(pickle.dumps(o.model))))
    fit(learn, 1, [KnowledgeDistillationCallback(wide(), **BOTH), At('after_pred', take), At('after_step', take)])
    assert len(copies)==8 and all(same(s, state(m)) and not hooks(m) for s,*ms in copies for m in ms)

def test_second_fit():
    "Adapters are trained on, and the columns are there once"
    learn = learner()
    learn.add_cb(cb := KnowledgeDistillationCallback(wide(), **BOTH))
    fit(learn, 1)
    first = [p.detach().clone() for p in cb.distiller.parameters()]
    ids = [id(p) for p in cb.distiller.parameters()]
    fit(learn, 1)
    assert ids==[id(p) for p in cb.distiller.parameters()] and len(first)==4 and not any(torch.equal(a, b) for a,b in zip(first, cb.distiller.parameters()))
    assert list(learn.recorder.metric_names).count('FitNet')==1 and len(learn.recorder.metric_names)==len(learn.recorder.values[0])+2

@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['fastai','torch'])
def test_adapters_in_the_optimizer(opt):
    "With discriminative rates and one-cycle, frozen layers, and a clipped norm, adapters train"
    learn,moved = learner(opt_func=opt, splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())]),[]
    learn.freeze()
    cb = KnowledgeDistillationCallback(wide(), FitNet, ['2','5'], ['2','5'])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, slice(1e-4,1e-2), cbs=[cb, GradientClip(), At('after_batch', lambda o: moved.append([p.detach().clone() for p in cb.distiller.parameters()]))])
    assert all(not torch.equal(a, b) for a,b in zip(moved[0], moved[-1])) and [len(o) for o in learn.opt.param_lists]==[4,6]

def test_lr_find(tmp_path):
    "lr_find leaves the model as it was, no adapter behind, and a fit works afterwards"
    learn,cb = learner(path=tmp_path),KnowledgeDistillationCallback(wide(), **BOTH)
    learn.add_cb(cb)
    before = state(learn.model)
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=8)
    assert same(before, state(learn.model)) and not hooks(learn.model) and not cb.distiller.parameters()
    fit(learn)

@pytest.mark.parametrize('backend', ['eager','aot_eager'])
@pytest.mark.parametrize('before', [False,True])
def test_compiled_student(backend, before):
    "A compiled student, also one that has run before, learns what another one learns"
    torch._dynamo.reset()
    res = []
    for compiled in (False,True):
        m = net()
        if compiled:
            m = torch.compile(m, backend=backend)
            if before: m(X[:8]).sum().backward()
            m.zero_grad()
            m.load_state_dict({f'_orig_mod.{k}':v for k,v in net().state_dict().items()})
        torch.manual_seed(3)
        learn = fit(learner(m), 2, KnowledgeDistillationCallback(wide(), **BOTH))
        assert not hooks(m)
        res.append(state(getattr(m, '_orig_mod', m)))
    assert all(torch.allclose(a.float(), b.float(), atol=1e-4) for a,b in zip(res[0].values(), res[1].values()))

def test_compiled_teacher():
    t = wide()
    for how in (dict(), BOTH): fit(learner(), 1, KnowledgeDistillationCallback(torch.compile(t, backend='eager'), **how))

@pytest.mark.parametrize('wrap', [o for k,o in WRAPPERS.items() if 'compiled' not in k], ids=[k for k in WRAPPERS if 'compiled' not in k])
def test_wrapped_teacher(wrap):
    "Layers have the names that they have inside, or in the wrapper"
    t,x = wide().eval(),X[:4]
    want = Distiller(t, **BOTH).prepare(net(), x).teach(x)
    for names in (['2','5'],['module.2','module.5']):
        got = Distiller(wrap(t), **{**BOTH, 'activations_teacher':names}).prepare(net(), x).teach(x)
        assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))
    assert match_feature_layers(net(), wrap(t), x)==match_feature_layers(net(), t, x)
    with pytest.raises(ValueError, match="the teacher has no layer '17'"): Distiller(wrap(t), **{**BOTH, 'activations_teacher':['2','module.17']})

def test_scripted_teacher():
    "Without pairs of layers, nobody looks into it"
    kd = Distiller(torch.jit.script(wide().eval())).prepare(net(), X[:4])
    kd.reset()
    assert torch.allclose(kd.teach(X[:4])[0], wide().eval()(X[:4]))

def test_no_host_sync():
    "No step asks a tensor for a number"
    class NoSync(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            assert f is not torch.ops.aten._local_scalar_dense.default and f is not torch.ops.aten.nonzero.default, f
            return f(*args, **(kwargs or {}))
    s,t = net(),wide()
    for names in ([o for o in kd_losses if 'Decoupled' not in o and o!='NormalizedKD'], ['SoftTarget','FitNet','RKD']):
        kd = Distiller(t, names, ['5'], ['5']).prepare(s, X[:2])
        with NoSync():
            with kd.watch(s): pred = s(X[:8])
            kd.mix(F.cross_entropy(pred, Y[:8]), kd.loss(pred, X[:8], target=Y[:8])).backward()

def test_device_follows_the_inputs():
    "The teacher is moved to where the inputs are, and adapters are made there"
    s,t = net().to('meta'),wide()
    kd = Distiller(t, [SoftTarget,FitNet,Attention,Similarity,RKD,ActivationBoundaries], '5', '5')
    x = X[:4].to('meta')
    kd.prepare(s, x)
    with kd.watch(s): pred = s(x)
    assert kd.loss(pred, x).device.type=='meta' and t[0].weight.device.type=='meta' and {p.device.type for p in kd.parameters()}=={'meta'}

def test_teacher_is_a_learner_or_a_module():
    t = wide()
    assert Distiller(learner(t)).teacher is t is Distiller(t).teacher and Distiller(types.SimpleNamespace(model=t)).teacher is t
    with pytest.raises(TypeError, match='nn.Module'): Distiller('resnet34')

def test_cache_saves_forwards():
    "Samples that come again, shuffled, cost the teacher nothing, and the fit is the same up to rounding"
    res = []
    for cache in (0,32):
        t,n = wide(),[]
        t.register_forward_hook(lambda *_: n.append(1))
        learn = fit(learner(), 3, KnowledgeDistillationCallback(t, **BOTH, cache=cache))
        res.append((state(learn.model), len(n)))
    assert res[1][1]==res[0][1]-8
    assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a,b in zip(res[0][0].values(), res[1][0].values()))

# --- what is refused

def refused(match, f, ex=ValueError):
    with pytest.raises(ex, match=match): f()

def test_wrong_arguments():
    t = wide()
    refused("did you mean 'SoftTarget'", lambda: Distiller(t, 'SoftTargt'))
    refused('teacher_pred', lambda: Distiller(t, lambda pred, teacher: pred))
    refused('uses nothing of the teacher', lambda: Distiller(t, lambda pred, target: pred))
    refused('1 of the student', lambda: Distiller(t, Attention, ['2'], ['2','5']))
    refused('give activations_student', lambda: Distiller(t, Attention))
    refused('does not use them', lambda: Distiller(t, SoftTarget, ['2'], ['2']))
    refused('weight must be a share', lambda: Distiller(t, weight=2))
    refused('weight must be a share', lambda: Distiller(t, weight='a'))
    refused('alpha must be a share', lambda: Distiller(t, **BOTH, alpha=-1))
    refused('cache', lambda: Distiller(t, cache=-1))
    refused('schedule', lambda: Distiller(t, schedule='coss'))
    refused('give a loss', lambda: Distiller(t, []))
    refused('compares tensors', lambda: SoftTarget((X,), (X,)), TypeError)

def test_refused_before_anything_changes():
    "A layer that does not run, gives no tensor, or cannot be adapted: the student is bit for bit as before"
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.body,self.pair,self.idle = net(),nn.LSTM(4, 4),nn.ReLU()
        def forward(self, x): return self.pair(self.body(x)[None])[0][0]
    for s,t,match in (('idle','2','did not run'), ('pair','2','returns a tuple'), ('body.2','8','no adapter fits'), ('body.22','2',"did you mean 'body.2'")):
        model = Odd()
        before,learn = state(model),learner(model)
        with pytest.raises(ValueError, match=match): fit(learn, 1, KnowledgeDistillationCallback(wide(), FitNet, s, t))
        assert same(before, state(model)) and not hooks(model)

def test_student_is_not_its_own_teacher():
    learn = learner()
    with pytest.raises(ValueError, match='share parameters'): fit(learn, 1, KnowledgeDistillationCallback(learn))

def test_loop_says_what_is_missing():
    s,kd = net(),Distiller(wide(), **BOTH)
    refused('prepare', lambda: kd.watch(s), RuntimeError)
    kd.prepare(s, X[:2])
    refused('watch', lambda: kd.loss(s(X), X), RuntimeError)

@pytest.mark.parametrize('name', ['DecoupledKD','NormalizedDecoupledKD','NormalizedKD'])
def test_hard_labels_needed(name):
    for bad in (F.one_hot(Y[:8], 4), F.one_hot(Y[:8], 4).float(), Y[:8].float(), Y[:4], None): refused('target', lambda: kd_losses[name](X[:8,0,0,:4], X[:8,0,1,:4], target=bad))
    refused('at least 2 classes', lambda: kd_losses[name](X[:8,0,0,:1], X[:8,0,1,:1], target=Y[:8]))

@pytest.mark.parametrize('name', kd_losses)
def test_gradients(name):
    "Against finite differences, in double precision; large logits give numbers"
    f,g = kd_losses[name],torch.Generator().manual_seed(1)
    shape,maps = ((5,3,2,2),True) if 'fm_s' in loss_needs(f) else ((6,4),False)
    s,t,y = torch.randn(*shape, generator=g, dtype=torch.double, requires_grad=True),torch.randn(*shape, generator=g, dtype=torch.double),torch.randint(0, 4, (6,), generator=g)
    call = (lambda s: f([s], [t])) if maps else (lambda s: f(**{k:v for k,v in dict(pred=s, teacher_pred=t, target=y).items() if k in loss_needs(f)}))
    assert torch.autograd.gradcheck(call, (s,), atol=1e-6)
    big = (100*s.detach()).float().requires_grad_()
    t = (100*t).float()
    call(big).backward()
    assert big.grad.isfinite().all()

def test_match_feature_layers():
    "Stages by the size of their maps; networks without one in common are refused"
    s,t = nn.Sequential(nn.Conv2d(3,4,3,2,1), nn.ReLU(), nn.Conv2d(4,8,3,2,1), nn.AdaptiveAvgPool2d(1)),nn.Sequential(nn.Conv2d(3,9,3,2,1), nn.Sequential(nn.Conv2d(9,9,3,2,1), nn.ReLU()), nn.AdaptiveAvgPool2d(1))
    assert match_feature_layers(s, learner(t), X[:2].repeat(1,1,3,3))==(['1','2'],['0','1'])
    refused('no feature maps of the same size', lambda: match_feature_layers(s, nn.Sequential(nn.Conv2d(3,4,2,3)), X[:2].repeat(1,1,3,3)))
    layers = match_feature_layers(net(), wide())
    fit(learner(), 1, KnowledgeDistillationCallback(wide(), Attention, *layers))

def test_segmentation():
    "Logits [n, classes, h, w] and labels [n, h, w]"
    s,t = nn.Conv2d(3,4,3,padding=1),nn.Conv2d(3,4,3,padding=1)
    y = torch.randint(0, 4, (48,6,6), generator=torch.Generator().manual_seed(0))
    for f in ('SoftTarget','DecoupledKD','DIST','NormalizedKD'): fit(learner(copy.deepcopy(s), data=type(learner().dls.train_ds)(zip(X, y))), 1, KnowledgeDistillationCallback(t, f))

@pytest.mark.parametrize('dims', [1, 2, 3, 'tokens'])
def test_adapters_are_drawn_from_their_own_numbers(dims):
    "Whatever else is drawn, adapters are the same each time, and nobody's next draw is another"
    def nets(n):
        conv = {1:nn.Conv1d, 2:nn.Conv2d, 3:nn.Conv3d}.get(dims)
        return nn.Sequential(nn.Linear(3, n), nn.ReLU(), nn.Linear(n, n)) if conv is None else nn.Sequential(conv(3, n, 3, padding=1), nn.ReLU(), conv(n, n, 1))
    x,found = torch.randn(2, 5, 3) if dims=='tokens' else torch.randn(2, 3, *[4]*dims),[]
    for seed in (0, 1):
        s,t = nets(4),nets(6)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        d = Distiller(t, 'FitNet', ['0','2'], ['0','2']).prepare(s, x)
        assert torch.equal(before, torch.get_rng_state())
        found.append([p.detach().clone() for p in d.parameters()])
    assert len(found[0])==4 and all(torch.equal(a, b) for a,b in zip(*found)) and not torch.equal(found[0][0].flatten()[:8], found[0][2].flatten()[:8])

# --- logits of another range

@pytest.mark.parametrize('loss', ['SoftTarget','Logits','Mutual','DecoupledKD','NormalizedKD','DIST',partial(SoftTarget, T=2.),lambda pred, teacher_pred: (pred-teacher_pred).abs().mean()], ids=lambda o: o if isinstance(o, str) else type(o).__name__)
def test_standardized(loss):
    "Scale and shift of a sample's logits do not matter, the loss is zero or least where they agree up to these, and a callback takes it"
    s,t,y = torch.randn(6, 4, dtype=torch.float64),torch.randn(6, 4, dtype=torch.float64),torch.randint(4, (6,))
    f = standardized(loss)
    given = dict(target=y) if 'target' in loss_needs(f) else {}
    a,b = f(s, t, **given),f(s*torch.rand(6, 1)+torch.randn(6, 1), 5*t+1, **given)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert f(s, s*3, **given)<a
    student,teacher = wide(),wide()
    learn = learner(student)
    fit(learn, 1, KnowledgeDistillationCallback(teacher, pickle.loads(pickle.dumps(f)) if isinstance(loss, str) else f))
    assert all(p.isfinite().all() for p in student.parameters())

def test_standardized_refuses():
    with pytest.raises(ValueError, match='has no pred'): standardized('FitNet')
    with pytest.raises(ValueError, match='at least 2 classes'): standardized('Logits')(torch.randn(4, 1), torch.randn(4, 1))
