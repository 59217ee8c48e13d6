"""Teachers whose answers hold several tensors, several teachers in one fit, and losses that fit what outputs mean"""
import copy
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
import pytest, torch
from torch import nn, Tensor
from torch.nn import functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, L1LossFlat, LabelSmoothingCrossEntropy, MSELossFlat
from fasterai.core.all import *
from fasterai.distill.all import *
from fasterai.distill.distiller import meant, place_of
from fasterai.distill.losses import check_meaning, meaning_in, meaning_of
from tiny import At, Items, OptimWrapper, X, Y, fit, learner, net, raises, same, state, told
from test_fits import TINY, column, data, set_seed
import test_fits
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner

def wide(seed=7, n=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3,n,3,padding=1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n,n,3,padding=1), nn.BatchNorm2d(n), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n,4))

def untouched_by(learn): return '_do_one_batch' not in vars(learn) and not any(m._forward_hooks for m in learn.model.modules())
def held(learn): return sum(len(o) for o in learn.opt.param_lists)

# --- answers that hold several tensors

def classifier(seed=0, **kw):
    set_seed(seed)
    return text_classifier_learner(data['texts'](), AWD_LSTM, config=awd_lstm_clas_config|TINY|kw, pretrained=False)

def language_model(seed=0, **kw):
    set_seed(seed)
    return language_model_learner(data['words'](), AWD_LSTM, config=awd_lstm_lm_config|TINY|kw, pretrained=False)

@pytest.mark.parametrize('make', [classifier, language_model])
@pytest.mark.parametrize('bare', [False,True])
@pytest.mark.parametrize('wider', [dict(), dict(emb_sz=10, n_hid=20), dict(n_layers=3)], ids=told)
def test_text_learners(make, bare, wider):
    "The teacher's logits are compared, whatever its width and depth, and its feature maps"
    teacher = make(1, **wider)
    inner = '0.module.hidden_dps.0' if make is classifier else '0.hidden_dps.0'
    before = state(teacher.model)
    learn = make()
    n,seen = len(list(learn.model.parameters())),[]
    def mine(pred, teacher_pred):
        seen.append((pred.shape, teacher_pred.shape))
        return F.mse_loss(pred, teacher_pred)
    cb = KnowledgeDistillationCallback(teacher.model if bare else teacher, [SoftTarget, FitNet, mine], inner, inner)
    test_fits.fit(learn, cb)
    assert all(s==t for s,t in seen) and column(learn, 'FitNet')>0 and column(learn, 'SoftTarget')>0
    assert same(before, state(teacher.model)) and untouched_by(learn) and held(learn)==n

class Heads(nn.Module):
    "Several heads over one body, whose answer `put` puts together"
    def __init__(self, body, put, n=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        width = body[-1].in_features
        self.body,self.heads,self.put = body[:-1],nn.ModuleList(nn.Linear(width, 4) for _ in range(n)),put
    def forward(self, x):
        x = self.body(x)
        return self.put([o(x) for o in self.heads])

class Pick(Callback):
    "What the loss function reads of the answer"
    def __init__(self, f): self.f = f
    def after_pred(self): self.learn.pred = self.f(self.pred)

@dataclass
class Answer:
    aux:Tensor
    best:Tensor

class Named(NamedTuple):
    aux:Tensor
    best:Tensor

ANSWERS = dict(  # what the answer is made of heads, and what is read of it
    last=(list, lambda o: o[-1]), middle=(tuple, lambda o: o[1]), dict=(lambda o: dict(aux=o[0], other=o[1], main=o[2]), lambda o: o['main']),
    nested=(lambda o: dict(aux=(o[0],o[1]), main=[o[2],o[0]]), lambda o: o['main'][0]), dataclass=(lambda o: Answer(o[0], o[2]), lambda o: o.best),
    named=(lambda o: Named(o[0], o[2]), lambda o: o.best), half=(lambda o: [x.bfloat16() for x in o], lambda o: o[-1].float()))

@pytest.mark.parametrize('kind', ANSWERS)
def test_what_the_loss_reads_is_compared(kind):
    "Heads of one shape: the teacher's is the one at the place that a callback of the learner picks"
    put,read = ANSWERS[kind]
    s,t,seen = Heads(net()[:-1].append(nn.Linear(8,4)), put),Heads(wide(), put, seed=5),[]
    def mine(pred, teacher_pred):
        seen.append(teacher_pred)
        return F.mse_loss(pred.float(), teacher_pred.float())
    learn = learner(s)
    told = []
    def note(cb): told.append(read(t.eval()(cb.x)))
    fit(learn, 1, [Pick(read), KnowledgeDistillationCallback(t, mine), At('after_loss', note, order=60)])
    assert len(seen)==4 and all(torch.allclose(a.float(), b.float(), atol=1e-6) for a,b in zip(seen, told))

def test_a_teacher_with_more_heads_than_the_student():
    "The student answers by one tensor, the teacher by several: the one called so, or the first of its shape"
    for put,which in ((lambda o: dict(aux=o[1], logits=o[2]), 2), (lambda o: dict(aux=o[1].sum(1), out=o[0], z=o[2]), 0), (lambda o: (o[0].sum(), o[1], o[2]), 1), (lambda o: [o[0][:,:2], o[2]], 2)):
        t = Heads(wide(), put).eval()
        want = t.heads[which](t.body(X[:8]))
        assert torch.allclose(Distiller(t).teach(X[:8], like=net()(X[:8]))[0], want)
        learn = fit(learner(), 1, KnowledgeDistillationCallback(t))
        assert column(learn, 'SoftTarget')>0

def test_plain_loop_of_answers():
    "Whole answers may be given: a key, a position or a function says which tensor, or a name that is common"
    s,t = Heads(net(), lambda o: dict(a=o[0], b=o[1])),Heads(wide(), lambda o: dict(a=o[0], b=o[1]), seed=3).eval()
    want = SoftTarget(s(X)['b'], t(X)['b'])
    for output in ('b', lambda o: o['b']): assert torch.allclose(Distiller(t, output=output).loss(s(X), X), want)
    s.put = t.put = tuple
    for output in (1, -2, lambda o: o[1]): assert torch.allclose(Distiller(t, output=output).loss(s(X), X), SoftTarget(s(X)[1], t(X)[1]))
    assert torch.allclose(Distiller(t, output=2).loss(s(X)[2], X), SoftTarget(s(X)[2], t(X)[2]))
    for put,which in ((lambda o: dict(loss=o[0].mean(), logits=o[1], z=o[2]), 1), (lambda o: (o[2], o[0].unsqueeze(1)), 2), (lambda o: [[o[1]], None], 1)):
        s.put = t.put = put
        assert torch.allclose(Distiller(t).loss(s(X), X), SoftTarget(s.heads[which](s.body(X)), t.heads[which](t.body(X))))

def test_losses_of_ones_own_get_answers_as_they_are():
    s,t = Heads(net(), list),Heads(wide(), list).eval()
    def all_heads(pred, teacher_pred):
        assert isinstance(pred, list) and isinstance(teacher_pred, list)
        return sum(F.mse_loss(a, b) for a,b in zip(pred, teacher_pred))
    assert torch.allclose(Distiller(t, all_heads).loss(s(X), X), sum(F.mse_loss(a, b) for a,b in zip(s(X), t(X))))
    s.put = t.put = lambda o: dict(logits=o[0], z=o[1])
    def keys(pred, teacher_pred): return F.mse_loss(pred['z'], teacher_pred['z'])
    kd = Distiller(t, [keys, SoftTarget])
    kd.loss(s(X), X)
    assert torch.allclose(kd.terms['SoftTarget'], SoftTarget(s(X)['logits'], t(X)['logits'])) and torch.allclose(kd.terms['keys'], F.mse_loss(s(X)['z'], t(X)['z']))

def test_answers_that_do_not_say():
    "Several of one shape, of which none is read: refused, and in the words of what there is"
    s,t = Heads(net(), list),Heads(wide(), list)
    with pytest.raises(TypeError, match=r'\(48, 4\), \(48, 4\).*output'): Distiller(t).loss(s(X), X)
    for bad,says in (('a', 'has 0, 1, -1'), (7, 'output=7'), (lambda o: o, 'gives a list')):
        with pytest.raises((ValueError,TypeError), match=says): Distiller(t, output=bad).loss(s(X), X)
    with pytest.raises(TypeError, match='a key, a position, or a function'): Distiller(t, output=1.5)
    with pytest.raises(TypeError, match='holds none'): meant(dict(a=1))
    model = Heads(net(), list)
    learn = learner(model, loss_func=lambda o,y: sum(F.cross_entropy(x, y) for x in o))
    with pytest.raises(TypeError, match='output'): fit(learn, 1, KnowledgeDistillationCallback(t))
    fit(learn, 1, KnowledgeDistillationCallback(t, output=0))

def test_places():
    a,b = torch.randn(2,3),torch.randn(2,3)
    assert place_of([a,dict(x=b)], b)==(-1,'x') and place_of((a,b,a+1), b.double())==(1,) and place_of(a, a)==() and place_of([a], b) is None

# --- several teachers

PAIRS = dict(loss=[SoftTarget,FitNet], activations_student='2', activations_teacher='2')

@pytest.mark.parametrize('second', [PAIRS, dict(), dict(loss=Attention, activations_student=['2','5'], activations_teacher=['5','2']), dict(loss=['SoftTarget','SoftTarget'])], ids=told)
def test_two_teachers(second):
    "Each has columns of its own, and adapters, which are trained with both and taken off again"
    learn = learner()
    n = len(list(learn.model.parameters()))
    a,b = KnowledgeDistillationCallback(wide(1), **PAIRS),KnowledgeDistillationCallback(wide(2, 12), **second)
    begun = {}
    def note(cb):
        if not begun: begun.update({id(p):p.detach().clone() for o in (a,b) for p in o.distiller.parameters()})
    fit(learn, 2, [a, b, At('before_backward', note)])
    names = learn.recorder.metric_names
    assert len(set(names))==len(names) and len(learn.recorder.values[-1])==len(names)-2
    assert {*a.columns.values(),*b.columns.values()}<={*names} and not {*a.columns.values()}&{*b.columns.values()}
    assert all(column(learn, o)>0 for o in (*a.columns.values(),*b.columns.values()))
    assert len(begun)==2*sum('FitNet' in o.distiller.losses for o in (a,b)) and not any(torch.equal(v, p) for o in (a,b) for p in o.distiller.parameters() for v in [begun[id(p)]])
    assert untouched_by(learn) and held(learn)==n and not any(m._forward_hooks for o in (a,b) for m in o.distiller.teacher.modules())

@pytest.mark.parametrize('event', 'before_batch after_pred after_loss before_backward before_step after_step after_train before_validate'.split())
@pytest.mark.parametrize('kept', [(),(0,),(1,),(0,1)], ids=told)
def test_two_teachers_interrupted(event, kept):
    "Given to the fit or kept by the learner: nothing of them stays, and the next fit works"
    learn = learner()
    n,both = len(list(learn.model.parameters())),[KnowledgeDistillationCallback(wide(1), **PAIRS),KnowledgeDistillationCallback(wide(2, 12), **PAIRS)]
    learn.add_cbs([both[i] for i in kept])
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [*(o for i,o in enumerate(both) if i not in kept), At(event, raises(KeyboardInterrupt), n=None if 'validate' in event else 1)])
    assert not any(m._forward_hooks for m in learn.model.modules())
    if not kept: assert untouched_by(learn) and held(learn)==n
    fit(learn, 1, [o for i,o in enumerate(both) if i not in kept])
    assert untouched_by(learn) and held(learn)==n

def test_a_teacher_that_leaves_in_mid_fit():
    learn = learner()
    both = [KnowledgeDistillationCallback(wide(1), **PAIRS),KnowledgeDistillationCallback(wide(2, 12), **PAIRS)]
    def leave(cb): cb.learn.remove_cb(both[0])
    learn.add_cb(both[0])
    fit(learn, 1, [At('after_batch', leave, n=2), both[1]])
    assert untouched_by(learn) and column_values(both[1], learn)

def column_values(cb, learn): return all(o>0 for o in (cb.sums or {}).values())

def test_two_teachers_same_as_a_loop():
    "Each takes its share of the loss that it finds, in the plain loop and in the fit"
    def run(fitted):
        s,ts = net(),[wide(1), wide(2, 12)]
        kds = [dict(PAIRS, teacher=t, weight=w) for t,w in zip(ts, (.5,.3))]
        torch.manual_seed(0)
        if fitted:
            learn = learner(s, opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=.1)
            cbs = [KnowledgeDistillationCallback(**o) for o in kds]
            for o in cbs: o.distiller.prepare(s, X[:2])  # with the adapters that the loop has
            fit(learn, 1, cbs)
            return state(s)
        kds = [Distiller(**o) for o in kds]
        for o in kds: o.prepare(s, X[:2])
        opt = torch.optim.SGD([*s.parameters(), *(p for o in kds for p in o.parameters())], lr=.1)
        s.train()
        for i in range(0, 32, 8):
            x,y = X[i:i+8],Y[i:i+8]
            with kds[0].watch(s), kds[1].watch(s): pred = s(x)
            loss = F.cross_entropy(pred, y)
            for o in kds: loss = o.mix(loss, o.loss(pred, x))
            opt.zero_grad(); loss.backward(); opt.step()
        assert not any(m._forward_hooks for m in s.modules())
        return state(s)
    a,b = run(True),run(False)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)

# --- losses that fit what outputs mean

SOFTMAX = ['SoftTarget','Mutual','DecoupledKD','NormalizedDecoupledKD','NormalizedKD','DIST', partial(SoftTarget, T=2.), partial(DIST, axis=-1)]
MULTI = (torch.rand(48, 4, generator=torch.Generator().manual_seed(3))>.6).float()
REAL = torch.randn(48, 4, generator=torch.Generator().manual_seed(4))

def labelled(y): return Items(zip(X, y))

@pytest.mark.parametrize('loss', SOFTMAX, ids=told)
@pytest.mark.parametrize('task,y,fits', [(nn.BCEWithLogitsLoss(), MULTI, 'MLD'), (BCEWithLogitsLossFlat(), MULTI, 'MLD'), (F.binary_cross_entropy_with_logits, MULTI, 'MLD'),
    (partial(F.binary_cross_entropy_with_logits, reduction='mean'), MULTI, 'MLD'), (nn.MultiLabelSoftMarginLoss(), MULTI, 'MLD'),
    (MSELossFlat(), REAL, 'Logits'), (nn.MSELoss(), REAL, 'Logits'), (L1LossFlat(), REAL, 'Logits'), (F.smooth_l1_loss, REAL, 'Logits'), (nn.HuberLoss(), REAL, 'Logits'),
    (lambda p,y: F.mse_loss(p, y), REAL, 'Logits'), (lambda p,y: F.binary_cross_entropy_with_logits(p, y), MULTI, 'MLD')],
    ids=['bce','flat bce','functional bce','partial bce','soft margin','flat mse','mse','l1','functional','huber','own mse','own bce'])
def test_refused_where_outputs_are_no_classes(loss, task, y, fits):
    "Before anything is changed, with the loss that fits, which works"
    learn = learner(data=labelled(y), loss_func=task)
    before = state(learn.model)
    with pytest.raises(ValueError, match=f'softmax over classes.*choose {fits}'): fit(learn, 1, KnowledgeDistillationCallback(wide(), loss))
    assert same(before, state(learn.model)) and untouched_by(learn)
    fit(learn, 1, KnowledgeDistillationCallback(wide(), fits))
    assert column(learn, fits)>0

@pytest.mark.parametrize('task,y', [(nn.MSELoss(), REAL[:,:1]), (nn.BCEWithLogitsLoss(), MULTI[:,:1]), (lambda p,y: F.l1_loss(p, y), REAL[:,:1]), (lambda p,y: F.l1_loss(p[:,0], y), REAL[:,0]),
    (lambda p,y: F.binary_cross_entropy_with_logits(p[:,0], y), MULTI[:,0])], ids=['mse','bce','own','flat','own bce'])
def test_one_output_is_no_class(task, y):
    one = lambda m: m[:-1].append(nn.Linear(m[-1].in_features, 1))
    learn = learner(one(net()), data=labelled(y), loss_func=task)
    before = state(learn.model)
    with pytest.raises(ValueError, match='choose (Logits|MLD)'): fit(learn, 1, KnowledgeDistillationCallback(one(wide())))
    assert same(before, state(learn.model))
    for o in (Logits, MLD): fit(learn, 1, KnowledgeDistillationCallback(one(wide()), o))

@pytest.mark.parametrize('task', [nn.CrossEntropyLoss(), CrossEntropyLossFlat(), FocalLossFlat(), LabelSmoothingCrossEntropy(), F.cross_entropy, lambda p,y: F.cross_entropy(p, y)], ids=['ce','flat','focal','smooth','functional','own'])
@pytest.mark.parametrize('cbs', [(), (MixUp,), (CutMix,)], ids=told)
def test_classes_stay_allowed(task, cbs):
    if cbs and not hasattr(task, 'y_int'): task = CrossEntropyLossFlat()  # what MixUp asks for
    fit(learner(loss_func=task), 1, [KnowledgeDistillationCallback(wide()), *(o() for o in cbs)])

def test_probabilities_of_classes_stay_allowed():
    for y in (F.one_hot(Y, 4).float(), .9*F.one_hot(Y, 4)+.025, REAL.softmax(1), F.one_hot(Y, 4).half(), REAL.softmax(1).bfloat16()):
        own = lambda p,y: -(F.log_softmax(p, 1)*y.float()).sum(1).mean()
        fit(learner(data=labelled(y), loss_func=own), 1, KnowledgeDistillationCallback(wide()))

def test_mixed_labels_that_are_each_yes_or_no():
    "MixUp takes the place of the loss function, which is still known"
    for cls in (MixUp, CutMix):
        with pytest.raises(ValueError, match='choose MLD'): fit(learner(data=labelled(MULTI), loss_func=BCEWithLogitsLossFlat()), 1, [cls(), KnowledgeDistillationCallback(wide())])

@pytest.mark.parametrize('y,says', [(MULTI,'choose MLD'), (REAL,'choose Logits'), (MULTI.long(),'choose MLD'), (MULTI.bool(),'choose MLD')], ids=['float','real','long','bool'])
def test_plain_loop_sees_labels(y, says):
    kd = Distiller(wide())
    with pytest.raises(ValueError, match=says): kd.loss(net()(X), X, target=y)
    assert kd.loss(net()(X), X, target=Y)>0

def test_segmentation_of_several_kinds_at_once():
    "Masks of labels that overlap, beside masks of classes"
    s,t = nn.Conv2d(3,4,3,padding=1),nn.Conv2d(3,4,5,padding=2)
    many = (torch.rand(48,4,6,6, generator=torch.Generator().manual_seed(1))>.5).float()
    own = lambda p,y: (p-y).square().mean()
    with pytest.raises(ValueError, match='choose MLD'): fit(learner(copy.deepcopy(s), data=labelled(many), loss_func=own), 1, KnowledgeDistillationCallback(t))
    fit(learner(copy.deepcopy(s), data=labelled(many), loss_func=own), 1, KnowledgeDistillationCallback(t, MLD))
    assert check_meaning(dict(SoftTarget=SoftTarget), None, many.argmax(1), many.shape) is None

def test_what_losses_and_labels_tell():
    assert meaning_of(partial(F.l1_loss, reduction='sum'))=='numbers' and meaning_of(BCELossFlat())=='numbers' and meaning_of(None) is None and meaning_of(lambda p,y: 0) is None
    class Own(nn.BCEWithLogitsLoss): pass
    assert meaning_of(Own())=='labels' and meaning_of(nn.NLLLoss())=='classes'
    assert meaning_in(MULTI, (48,4))=='labels' and meaning_in(REAL, (48,4))=='numbers' and meaning_in(Y, (48,4)) is None and meaning_in(REAL.softmax(1), (48,4)) is None
    assert meaning_in(REAL.softmax(1), (48,4), -1) is None and meaning_in(REAL[0].softmax(0), (4,), 0) is None

def test_each_label_by_itself():
    "The Kullback-Leibler divergence of two Bernoulli distributions by torch's own, a shift that is seen, and large logits"
    from torch.distributions import Bernoulli, kl_divergence
    s,t = REAL.double(),REAL.double().flip(0)
    for T in (1.,4.): assert torch.allclose(MLD(s, t, T=T), T*T*kl_divergence(Bernoulli(logits=t/T), Bernoulli(logits=s/T)).mean())
    assert MLD(s, s)==0 and MLD(s+1, s)>0 and SoftTarget(s+1, s).abs()<1e-9 and MLD(300*s.float(), -300*s.float()).isfinite()
