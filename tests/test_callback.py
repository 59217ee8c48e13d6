"""`SparsifyCallback` and `KeepSparsity` beside all that a fit may have: other callbacks, optimizers, precisions, compiled and frozen models, interrupts.

The claims are everywhere the same: the target is reached exactly, what is zero stays zero after every step, and nothing is left behind."""
import copy, math, pickle, warnings
import numpy as np, pytest, torch
from fastai.callback.core import *
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.optimizer import SGD, Adam, OptimWrapper, RMSProp, ranger
from functools import partial
from safetensors.torch import load_file, load_model
from torch import nn
from torch.nn.utils import prune
import fasterai.sparse.sparsify_callback as module
from fasterai.core import pool
from fasterai.core.schedule import cos, sched_cos
from fasterai.distill.all import KnowledgeDistillationCallback
from fasterai.prune.all import PruneCallback, Pruner
from fasterai.quantize.all import KMeansCallback
from fasterai.regularize.all import RegularizationCallback, RegularizeCallback
from fasterai.sparse.all import *
from reference import exact
from tiny import FAKE_GPU, At, DATA, X, Y, convs, fit, learner, net, raises, same, state, zeros

HALF = [108,288]  # zeros of `net` at 50 %, weight by weight

def show(o):
    "A short name of a case"
    if isinstance(o, dict): return '-'.join(f'{k}={show(v)}' for k,v in o.items()) or 'plain'
    return getattr(o, '__name__', None) or (type(o).__name__ if isinstance(o, nn.Module) else str(o)[:30])

def hooks(model): return [n for n,m in model.named_modules() for o in ('_forward_hooks','_forward_pre_hooks','_backward_hooks','_backward_pre_hooks','_forward_hooks_always_called','_state_dict_hooks') if getattr(m, o, None)]
def marks(model): return {n: (set(vars(m)), m.training) for n,m in model.named_modules()},list(model.state_dict()),{n:p.requires_grad for n,p in model.named_parameters()}

class Watch(Callback):
    "After every step: how many weights are zero, and does what is masked stay so?"
    order = 56
    def __init__(self, cb): self.cb,self.seen = cb,[]
    def after_step(self):
        sp,ps = self.cb.sparsifier,dict(getattr(self.model, '_orig_mod', self.model).named_parameters())
        assert all((ps[n][~m]==0).all() for n,m in sp.masks.items())
        self.seen.append(sp.reached())

def half_way(learn, n=2, cb=None, cbs=(), **kwargs):
    "A fit to 50 % that is watched"
    cb = cb or SparsifyCallback(50)
    fit(learn, n, [cb, w := Watch(cb), *cbs], **kwargs)
    assert zeros(learn.model)==HALF and not hooks(learn.model)
    return w

# --- other callbacks

def test_save_model(tmp_path):
    "The best model is saved, loaded at the end, and loads into a model that never met us"
    learn = learner(path=tmp_path)
    half_way(learn, cbs=[SaveModelCallback(monitor='sparsity', comp=np.greater)])
    assert same(state(learner(path=tmp_path).load('model').model), state(learn.model))

def test_learner_saves_and_loads_in_mid_fit(tmp_path):
    learn = learner(path=tmp_path)
    half_way(learn, cbs=[At('after_train', lambda o: (o.learn.save('mid', with_opt=True), o.learn.load('mid', with_opt=True)))])

@pytest.mark.parametrize('cb', [SparsifyCallback, KeepSparsity])
def test_lr_find(cb, tmp_path):
    "lr_find, before and with the callback attached, leaves the model as it was and the callback as good as new"
    learn = learner(path=tmp_path)
    if cb is KeepSparsity: Sparsifier(learn.model).sparsify_model(50)
    before = state(learn.model)
    learn.add_cb(cb(50) if cb is SparsifyCallback else cb())
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=8)
    assert same(before, state(learn.model)) and not hooks(learn.model)
    fit(learn)
    assert zeros(learn.model)==HALF

@pytest.mark.parametrize('cb', [SparsifyCallback, KeepSparsity])
def test_lr_find_interrupted(cb, tmp_path):
    "After an lr_find that was interrupted, the next fit does its work"
    learn = learner(path=tmp_path)
    if cb is KeepSparsity: Sparsifier(learn.model).sparsify_model(50)
    learn.add_cb(cb(50) if cb is SparsifyCallback else cb())
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.added_cbs(At('after_batch', raises(KeyboardInterrupt), n=3)): learn.lr_find(show_plot=False, num_it=8)
    fit(learn)
    assert zeros(learn.model)==HALF

def test_early_stopping():
    "A fit that stops early has the sparsity that its table says, and the next fit reaches the target"
    learn = learner()
    learn.add_cb(SparsifyCallback(50, context='global', schedule=lin))
    fit(learn, 4, EarlyStoppingCallback(monitor='sparsity', comp=np.less, patience=2))
    assert learn.recorder.epoch==2 and sum(zeros(learn.model))==exact(792, 37.5)
    assert learn.recorder.values[-1][-1]==pytest.approx(37.5, abs=.1)
    fit(learn, 1)
    assert sum(zeros(learn.model))==396

class OnCPU(MixedPrecision):
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.parametrize('mode', ['fp16','bf16'])
def test_mixed_precision(mode):
    dtypes = []
    half_way(learner(), cbs=[OnCPU(amp_mode=mode), At('after_pred', lambda o: dtypes.append(torch.is_autocast_enabled('cpu')))])
    assert dtypes==[True]*8

def test_skipped_steps():
    "Where AMP skips a step, the masks are renewed all the same; where a batch is cancelled, the next one catches up; and the last need not be taken"
    for ev,ex in ('before_step',CancelStepException), ('before_step',CancelBatchException), ('before_batch',CancelBatchException), ('before_backward',CancelBackwardException):
        for n in (1, 5, 8):
            learn = learner()
            fit(learn, 2, [SparsifyCallback(50, schedule=lin), At(ev, raises(ex), n=n)])
            assert zeros(learn.model)==HALF, (ev, n)

@pytest.mark.parametrize('n_acc', [8,16,24,1000])
def test_gradient_accumulation(n_acc):
    "The target is reached when the number of batches is not a multiple, too, and when no step is taken at all"
    w = half_way(learner(bs=8, n=40), cbs=[GradientAccumulation(n_acc)])
    assert len(w.seen)==2*5*8//n_acc

@pytest.mark.parametrize('criteria', [taylor, wanda], ids=show)
@pytest.mark.parametrize('n_updates', [1,3,200])
def test_gradients_and_activations_that_are_there(criteria, n_updates):
    "A criteria that looks at gradients or activations sees those of a training step: never none, never zeros, whenever it is asked"
    asked = []
    def mine(w, x):
        asked.append(x.abs().sum()>0)
        return w.abs()*x
    f = (lambda w, grad: mine(w, grad.abs())) if criteria is taylor else (lambda w, act: mine(w, act))
    for cbs in [], [GradientAccumulation(16)], [GradientAccumulation(24)], [GradientClip()]:
        learn = learner(n=32)
        fit(learn, 3, [SparsifyCallback(50, 'weight', 'local', f, lin, n_updates=n_updates), *cbs])
        assert zeros(learn.model)==HALF and all(asked) and not hooks(learn.model)

@pytest.mark.parametrize('n_updates', [1,2,5,7,200])
@pytest.mark.parametrize('epochs', [1,3])
def test_number_of_updates(n_updates, epochs, monkeypatch):
    "Masks are renewed `n_updates` times at most, in equal distances, at the end of each epoch if there are enough"
    steps,real = [],Sparsifier.update
    learn = learner(n=32)
    monkeypatch.setattr(Sparsifier, 'update', lambda self, s: (steps.append(learn.train_iter+1), real(self, s))[1])
    fit(learn, epochs, SparsifyCallback(50, schedule=lin, n_updates=n_updates))
    n = 4*epochs
    m = min(n, n_updates)
    m -= m%epochs if m>epochs else 0
    want = [math.ceil(i*n/m) for i in range(1, m+1)]
    assert steps==want and zeros(learn.model)==HALF

def test_number_of_updates_of_many_weights(monkeypatch):
    "Without kernels, more than a million weights are ranked in one step of eight, and at the end of each epoch; between two rankings the masks hold"
    monkeypatch.setattr(pool, '_has_kernels', lambda device: False)
    steps,real = [],Sparsifier.update
    model = nn.Sequential(nn.Flatten(), nn.Linear(108,1024), nn.Linear(1024,1024), nn.Linear(1024,4))
    learn = learner(model, n=20, bs=1)
    monkeypatch.setattr(Sparsifier, 'update', lambda self, s: (steps.append(learn.train_iter+1), real(self, s))[1])
    cb = SparsifyCallback(50, schedule=lin, layer_type=nn.Linear)
    fit(learn, 2, [cb, w := Watch(cb)])
    assert steps==[10,20,30,40] and cb.sparsifier.n_weights>2**20
    assert w.seen==pytest.approx([100*sum(exact(m.weight.numel(), 50*(k//10)/4) for m in model[1:])/cb.sparsifier.n_weights for k in range(1, 41)])

def test_export(tmp_path):
    learn = learner(path=tmp_path)
    learn.add_cb(SparsifyCallback(50, 'filter', 'global', 'movement', agp))
    fit(learn)
    learn.export('a.pkl')
    loaded = load_learner(tmp_path/'a.pkl')
    assert same(state(loaded.model), state(learn.model)) and loaded.sparsify.sparsifier is None
    loaded.dls = learn.dls
    assert sum((m.weight==0).flatten(1).all(1).sum() for m in convs(fit(loaded).model))==8

def test_copies_in_mid_fit():
    "`deepcopy` and pickle of the model in mid-fit give the model and nothing else"
    copies = []
    def take(o): copies.extend([(state(o.model), copy.deepcopy(o.model)), (state(o.model), pickle.loads(pickle.dumps(o.model)))])
    for criteria in (large_final, movement, wanda):
        half_way(learner(), cb=SparsifyCallback(50, criteria=criteria), cbs=[At('after_step', take), At('after_batch', take)])
    for s,m in copies: assert same(s, state(m)) and not hooks(m) and [type(o) for o in m.modules()]==[type(o) for o in net().modules()]

@pytest.mark.parametrize('event', ['before_batch','after_pred'])
def test_copies_before_the_step(event):
    "Also where activations are being gathered"
    seen = []
    half_way(learner(), cb=SparsifyCallback(50, criteria=wanda), cbs=[At(event, lambda o: seen.append(pickle.dumps(o.model)))])
    assert len(seen)==8

@pytest.mark.parametrize('backend', ['eager','aot_eager'])
@pytest.mark.parametrize('how', [dict(), dict(criteria=wanda), dict(criteria=taylor, granularity='filter'), dict(lth=True, schedule=iterative)], ids=show)
def test_compiled(backend, how, tmp_path):
    "A compiled model is sparsified; its tickets load into one that is not compiled"
    torch._dynamo.reset()
    model = net()
    learn = learner(torch.compile(model, backend=backend))
    if 'lth' in how: how = how|dict(save_tickets=tmp_path)
    fit(learn, 2, SparsifyCallback(50, **how))
    assert model[0].weight.count_nonzero()<=108 and not hooks(learn.model)
    for p in tmp_path.iterdir(): load_model(net(), p)
    fit(learn, 1, KeepSparsity())
    assert model[0].weight.count_nonzero()<=108

def test_frozen_layers():
    "Layers that do not train are sparsified like others; then they train, and what is zero stays"
    learn = learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.freeze()
    half_way(learn)
    assert not learn.model[0].weight.requires_grad and learn.model[8].weight.requires_grad
    learn.unfreeze()
    fit(learn, 1, KeepSparsity())
    assert zeros(learn.model)==HALF

def test_second_fit_with_the_same_callback():
    learn = learner()
    learn.add_cb(SparsifyCallback(50, schedule=lin))
    for n in (1,2):
        fit(learn, n)
        assert zeros(learn.model)==HALF and len(learn.recorder.metric_names)==len(learn.recorder.values[0])+2

def test_one_schedule_two_callbacks():
    sched = Schedule(sched_iterative, .2)
    for i in (0,1):
        learn = learner()
        cbs = [SparsifyCallback(50, schedule=sched), SparsifyCallback(30, schedule=sched, layer_type=nn.Linear)]
        fit(learn, 2, cbs)
        assert zeros(learn.model)==HALF and (learn.model[8].weight==0).sum()==exact(32, 30)
        assert learn.recorder.metric_names.count('sparsity')==2 and len(learn.recorder.values[0])==4

def test_nested_learner():
    "A fit inside a fit, each with its callback"
    inner = learner(net(1))
    half_way(learner(), cbs=[At('after_batch', lambda o: half_way(inner, 1), n=3)])
    assert zeros(inner.model)==HALF

def test_table_and_output(capsys):
    "The table has one column more, beside the time; nothing is printed unless asked"
    rows = []
    learn = learner()
    learn.logger = rows.append
    with learn.no_bar(): learn.fit(1, cbs=SparsifyCallback(50))
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','sparsity','time'] and len(rows[-1])==5 and rows[-1][3]==pytest.approx(50)
    assert capsys.readouterr().out==''
    fit(learn, 1, SparsifyCallback(50, verbose=True))
    assert capsys.readouterr().out.count('Sparsity in Conv2d')==2

def test_validate_and_predictions():
    "`validate` and `get_preds`, before and after a fit, with the callback attached, and during it: what is there is told and nothing changes"
    learn = learner()
    learn.add_cb(SparsifyCallback(50, lth=True, schedule=iterative))
    with learn.no_bar(): learn.validate(), learn.get_preds()
    assert zeros(learn.model)==[0,0]
    fit(learn, 2, FetchPredsCallback())
    masks = {k:v.clone() for k,v in learn.sparsify.sparsifier.masks.items()}
    with learn.no_bar(), learn.no_logging(): res,_ = learn.validate(),learn.get_preds()
    assert zeros(learn.model)==HALF and same(masks, learn.sparsify.sparsifier.masks)
    assert len(res)==1 or res[1]==pytest.approx(50)

@pytest.mark.parametrize('kwargs,epochs', [(dict(n=8), 1), (dict(n=8), 3), (dict(bs=64), 1), (dict(bs=1, n=2), 1)], ids=str)
@pytest.mark.parametrize('schedule', [one_cycle, one_shot, iterative, cos], ids=str)
def test_short_fits(kwargs, epochs, schedule):
    "One step is enough"
    model = net(norm=nn.Identity)
    learn = learner(nn.Sequential(model[0], nn.ReLU(), model[3], *model[6:]), **kwargs)
    fit(learn, epochs, SparsifyCallback(50, schedule=schedule))
    assert zeros(learn.model)==HALF

@pytest.mark.parametrize('again', [False,True])
def test_epochs_without_batches(again):
    "A loader that drops its only batch trains nothing, and breaks nothing"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    learn = learner()
    if again: fit(learn)
    learn.dls = DataLoaders(DataLoader(DATA[:4], bs=8, drop_last=True), DataLoader(DATA[32:], bs=8))
    before = state(learn.model)
    fit(learn, 2, SparsifyCallback(50))
    assert same(before, state(learn.model))

def test_fit_that_starts_late():
    "`start_epoch` goes on where another fit stopped: the level is that of the epoch"
    learn = learner()
    seen = []
    fit(learn, 4, [SparsifyCallback(50, context='global', schedule=lin), At('after_step', lambda o: seen.append(sum(zeros(o.model))))], start_epoch=2)
    assert seen==[exact(792, 50*k/16) for k in range(9, 17)]

def test_no_epochs_and_full_sparsity():
    learn = learner()
    fit(learn, 0, SparsifyCallback(50))
    assert zeros(learn.model)==[0,0]
    fit(learn, 1, SparsifyCallback(100))
    assert zeros(learn.model)==[215,575]
    fit(learn, 1, SparsifyCallback(0))
    assert not hooks(learn.model)

# --- what is left behind

STOPS = [('before_batch',KeyboardInterrupt), ('after_pred',KeyboardInterrupt), ('before_backward',RuntimeError), ('after_step',KeyboardInterrupt), ('after_batch',ValueError), ('before_batch',CancelFitException),
    ('before_batch',CancelBatchException), ('before_batch',CancelTrainException), ('after_batch',CancelEpochException), ('after_loss',CancelFitException), ('before_validate',KeyboardInterrupt), ('before_train',KeyboardInterrupt), ('forward',ValueError), ('forward',KeyboardInterrupt)]

class Fails(nn.Module):
    "Fails in the forward pass when told so"
    ex = None
    def forward(self, x):
        if self.ex: raise self.ex()
        return x

@pytest.mark.parametrize('event,ex', STOPS, ids=show)
@pytest.mark.parametrize('how', [dict(), dict(granularity='filter', context='global'), dict(criteria=wanda), dict(criteria=movement, lth=True, schedule=Schedule(sched_iterative)), dict(reset_end=True)], ids=show)
def test_nothing_is_left_behind(event, ex, how):
    "Whatever stops a fit, no hook, attribute, key, frozen parameter or column stays, and the same callback does its work in the next one"
    model = nn.Sequential(Fails(), *net())
    learn,cb = learner(model),SparsifyCallback(50, **how)
    fit(learn, 1)
    before = marks(model)
    stop = At('before_batch', lambda o: setattr(model[0], 'ex', lambda: ex('stop')), n=3, order=50) if event=='forward' else At(event, raises(ex), n=1 if event in ('before_validate','before_train') else 3)
    if event=='before_validate': stop.run_valid = True
    try: fit(learn, 2, [cb, stop])
    except (KeyboardInterrupt, RuntimeError, ValueError): pass
    vars(model[0]).pop('ex', None)
    model.train()
    now = marks(model)
    assert hooks(model)==[] and now[1:]==before[1:] and {k:v[0] for k,v in now[0].items()}=={k:v[0] for k,v in before[0].items()}
    assert cb.learn is None and not hasattr(learn, 'sparsify')
    fit(learn, 1)
    assert 'sparsity' not in learn.recorder.metric_names and len(learn.recorder.values[0])==2
    learn.model = nn.Sequential(Fails(), *net(1))
    learn.opt = None
    fit(learn, 2, cb)
    n = sum(zeros(learn.model)) if how.get('granularity')!='filter' else sum(int((m.weight==0).flatten(1).all(1).sum()) for m in convs(learn.model))
    assert n==(8 if how.get('granularity')=='filter' else 396)

def test_nothing_is_held_after_the_fit():
    "Copies of the weights are given back when a fit ends"
    learn,cb = learner(),SparsifyCallback(50, criteria=movement, lth=True, schedule=iterative)
    fit(learn, 2, cb)
    assert cb.technique.tickets.saved is None and not cb.sparsifier.about.kept and not cb.sparsifier.about.found

# --- zeros stay zero

OPTS = dict(sgd=partial(SGD, mom=.9, wd=.1), sgd_decoupled=partial(SGD, mom=.9, wd=.1, decouple_wd=False), adam=partial(Adam, wd=.1), adamw=partial(OptimWrapper, opt=torch.optim.AdamW, weight_decay=.1), rmsprop=partial(RMSProp, mom=.9), ranger=ranger,
    nesterov=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True), nadam=partial(OptimWrapper, opt=torch.optim.NAdam))

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('granularity,n_updates', [('weight',200),('weight',2),('filter',200)])
def test_zeros_stay(opt, granularity, n_updates):
    "After every step, under momentum, weight decay and moving averages, also in steps that renew nothing; and while the target falls"
    learn = learner(opt_func=OPTS[opt])
    cb = SparsifyCallback(50, granularity, schedule=lin, n_updates=n_updates)
    fit(learn, 3, [cb, w := Watch(cb)])
    assert len(w.seen)==12 and w.seen==sorted(w.seen)
    keep = KeepSparsity()
    was = {n:(p==0) for n,p in learn.model.named_parameters()}
    def check(model): assert all((p[was[n]]==0).all() for n,p in model.named_parameters() if n in ('0.weight','3.weight'))
    fit(learn, 2, [keep, At('after_step', lambda o: check(o.model), order=56)])
    check(learn.model)
    fit(learn, 2, [cb := SparsifyCallback(50, granularity, schedule=dsd), w := Watch(cb)])
    assert w.seen[3]==pytest.approx(50, abs=1) and w.seen[-1]==0

def test_keep_sparsity_holds_what_is_zero_and_no_more():
    "Zeros of any origin; of a filter that is gone its bias and normalization too; new zeros elsewhere are free"
    learn = learner()
    Sparsifier(learn.model, 'filter').sparsify_model(50)
    nn.init.zeros_(learn.model[8].bias)
    gone = (learn.model[0].weight==0).flatten(1).all(1)
    fit(learn, 3, KeepSparsity())
    assert all((p[gone]==0).all() for p in (learn.model[0].weight, learn.model[0].bias)) and (learn.model[8].bias!=0).all()
    assert not hooks(learn.model) and (learn.model[0].weight[~gone]!=0).all()

def test_keep_sparsity_of_nothing():
    "A model without a zero, one with a zero of either sign, and one without layers to hold, which is refused"
    learn = learner()
    fit(learn, 1, KeepSparsity())
    assert zeros(learn.model)==[0,0]
    learn.model[0].weight.data[0,0,0,0] = -0.
    fit(learn, 1, KeepSparsity())
    assert zeros(learn.model)==[1,0]
    class Scale(nn.Module):
        def __init__(self): super().__init__(); self.s = nn.Parameter(torch.ones(4))
        def forward(self, x): return x.mean((1,2,3))[:,None]*self.s
    learn = learner(Scale())
    before = state(learn.model)
    with pytest.raises(ValueError): fit(learn, 1, KeepSparsity())
    assert same(before, state(learn.model)) and not hooks(learn.model)

# --- lottery tickets

@pytest.mark.parametrize('rewind_epoch,epochs', [(0,3),(1,5),(2,10)])
@pytest.mark.parametrize('granularity,context', [('weight','global'),('filter','local')])
def test_tickets(rewind_epoch, epochs, granularity, context, tmp_path):
    "After each round weights and statistics are those of the rewind epoch, bit for bit, but for what is zero; the optimizer starts anew; each ticket loads elsewhere"
    learn,cb = learner(),SparsifyCallback(60, granularity, context, large_final, iterative, lth=True, rewind_epoch=rewind_epoch, save_tickets=tmp_path)
    saved,rounds = {},[]
    class Save(Callback):
        order = 54
        def before_epoch(self):
            if self.epoch==rewind_epoch: saved.update(state(self.model))
    class Check(Callback):
        order = 56
        def before_fit(self): self.level = 0.
        def after_step(self):
            level = cb.sparsifier.reached()
            if level>self.level:
                rounds.append(state(self.model))
                masks = cb.sparsifier.masks
                for k,v in rounds[-1].items():
                    want = saved[k]*masks[k] if k in masks else saved[k]
                    assert torch.equal(v, want) or (k in masks and ((v==want) | (v==0)).all()), k
                assert not any('grad_avg' in s for s in self.opt.state.values())
            self.level = level
    fit(learn, epochs, [Save(), cb, Check()])
    assert len(rounds)==3
    files = sorted(tmp_path.glob('*.safetensors'))
    assert len(files)==3
    for f,want in zip(files, rounds):
        load_model(m := net(5), f)
        assert same(state(m), want)
    fit(learner(m), 1, [KeepSparsity(), At('after_step', lambda o: [None for _ in [0] if not ((m[0].weight==0)>=(rounds[-1]['0.weight']==0)).all()])])
    assert ((m[0].weight==0)>=(rounds[-1]['0.weight']==0)).all()

def test_tickets_in_the_model_folder(tmp_path):
    learn = learner(path=tmp_path)
    fit(learn, 2, SparsifyCallback(50, schedule=one_shot, lth=True, save_tickets=True))
    assert [f.name for f in (tmp_path/'models').iterdir()]==['ticket_50.00.safetensors']

@pytest.mark.parametrize('lth', [False,True])
@pytest.mark.parametrize('rewind_epoch', [0,1])
def test_reset_end(lth, rewind_epoch):
    "After training weights and statistics are the saved ones, with the mask"
    learn,saved = learner(),{}
    class Save(Callback):
        order = 54
        def before_epoch(self):
            if self.epoch==rewind_epoch: saved.update(state(self.model))
    fit(learn, 4, [Save(), SparsifyCallback(50, schedule=Schedule(sched_cos, .3), lth=lth, reset_end=True, rewind_epoch=rewind_epoch)])
    assert zeros(learn.model)==HALF
    for k,v in state(learn.model).items(): assert torch.equal(v, saved[k]) or (k in ('0.weight','3.weight') and ((v==0) | (v==saved[k])).all())

def test_movement_is_from_the_rewind_point():
    "`w0` is the weight at the rewind epoch"
    seen,saved = [],[]
    def mine(w, w0): seen.append(w0.clone()); return (w-w0).abs()
    learn = learner()
    class Save(Callback):
        order = 54
        def before_epoch(self):
            if self.epoch==1: saved.extend(m.weight.detach().clone() for m in convs(self.model))
    fit(learn, 4, [Save(), SparsifyCallback(50, criteria=mine, schedule=Schedule(sched_iterative, .25), lth=True, rewind_epoch=1)])
    seen = seen[1:]  # the first call is a check of the criteria, at the door
    assert seen and all(any(torch.equal(o, s) for s in saved) for o in seen)

# --- refused at the door

BAD = [
    (dict(granularity='fliter'), 'filter'), (dict(granularity='block(0,2)'), 'block'), (dict(granularity='4:2'), '4:2'), (dict(granularity='shared_chanel'), 'shared_channel'), (dict(granularity=5), 'granularit'), (dict(granularity='head'), 'attention'),
    (dict(context='golbal'), 'global'), (dict(context=3), 'local'), (dict(context=lambda foo: {}), 'sizes'), (dict(criteria='large_finale'), 'large_final'), (dict(criteria=lambda w, grads: w), 'grad'), (dict(criteria=7), 'criteria'),
    (dict(schedule='one_cicle'), 'one_cycle'), (dict(schedule=lambda x: x), 'start, end, pos'), (dict(schedule=.5), 'schedule'), (dict(sparsity=101), '100'), (dict(sparsity=-1), '-1'), (dict(sparsity='50'), '50'), (dict(sparsity=math.nan), 'nan'), (dict(sparsity=True), 'True'),
    (dict(sparsity=[10]), '2 layers'), (dict(sparsity=[10,20,30]), '2 layers'), (dict(sparsity={'0.wieght': 20}), '0'), (dict(sparsity={'33': 20}), '3'), (dict(sparsity={'0': 200}), '200'), (dict(sparsity=[10,20], context='global'), 'local'), (dict(granularity='2:4', sparsity=60), '50'),
    (dict(layer_type=nn.Conv3d), 'Conv2d'), (dict(layer_type=nn.BatchNorm2d), 'Conv2d'), (dict(layer_type='Conv2d'), 'Conv2d'), (dict(layer_type=()), 'Conv2d'), (dict(round_to=0), 'round_to'), (dict(round_to=2.5), 'round_to'),
    (dict(n_updates=0), 'n_updates'), (dict(n_updates=1.5), 'n_updates'), (dict(rewind_epoch=1), 'lth'), (dict(lth=True, rewind_epoch=9), '9'), (dict(lth=True, rewind_epoch=-1), '-1'), (dict(lth=True, rewind_epoch=1, schedule=cos), 'start_pct'), (dict(save_tickets=True), 'lth'),
    (dict(model=nn.Conv2d(3,4,3)), 'model'), (dict(model=nn.Sequential()), ''), (dict(granulariti='filter'), 'granulariti'), (dict(criteria=lambda w: w.mean()), 'shape'), (dict(criteria=lambda *a: a[0]), ''), (dict(granularity='filter', round_to=64), 'round_to'), (dict(granularity='layer', round_to=8), 'round_to')]

@pytest.mark.parametrize('kwargs,says', BAD, ids=show)
def test_bad_arguments(kwargs, says):
    "Refused before a batch is seen, in words that help; the model is bit for bit as before"
    learn,batches = learner(),[]
    before,was = state(learn.model),marks(learn.model)
    with pytest.raises((ValueError, TypeError)) as e: fit(learn, 2, [SparsifyCallback(**dict(dict(sparsity=50), **kwargs)), At('before_batch', lambda o: batches.append(1))])
    assert says in str(e.value) and 'isinstance' not in str(e.value) and 'has no attribute' not in str(e.value) and 'not supported between' not in str(e.value), str(e.value)
    assert not batches and same(before, state(learn.model)) and hooks(learn.model)==[]

def test_gradients_of_frozen_layers():
    "A criteria that needs gradients of layers that have none is refused before a step is taken"
    learn = learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.freeze()
    before = state(learn.model)
    with pytest.raises(ValueError, match='frozen'): fit(learn, 1, SparsifyCallback(50, criteria='taylor'))
    assert same(before, state(learn.model)) and not hooks(learn.model)

def test_targets_by_layer():
    "A list or a dict goes along the schedule, layer by layer"
    for target,want in ([25,75], [54,432]), ({'3': 75}, [0,432]):
        learn = learner()
        cb = SparsifyCallback(target, schedule=lin)
        fit(learn, 2, [cb, w := Watch(cb)])
        assert zeros(learn.model)==want and w.seen==pytest.approx([100*sum(exact(n, t*k/8) for n,t in zip((216,576), (target if isinstance(target, list) else [0,75])))/792 for k in range(1, 9)])

@pytest.mark.parametrize('x', [.4, .5, 1., {'0':.5}, [.5,30,20]])
def test_fractions_are_refused(x):
    "A float up to 1 may be a fraction or a percentage: both readings are told, and nothing is changed"
    model = net()
    before = [p.clone() for p in model.parameters()]
    for call in (lambda: SparsifyCallback(x), lambda: Sparsifier(model).sparsify_model(x), lambda: Sparsifier(model).sparsify_layer('0', .5)):
        with pytest.raises(ValueError, match='percent .as a fraction. or .* percent: write sparsity .*unit='): call()
    if not isinstance(x, list):
        for call in (lambda: PruneCallback(x), lambda: Pruner(model, x)):
            with pytest.raises(ValueError, match='percent .as a fraction.'): call()
    assert all(torch.equal(a, b) for a,b in zip(before, model.parameters()))

def test_units():
    "`unit` tells how a number is meant, the same in a fit and without one"
    zeros = lambda m: int((m[0].weight==0).sum())
    counts = [zeros(Sparsifier(net()).sparsify_model(*args, **kw)) for args,kw in (((50,),{}), ((.5,),dict(unit='fraction')), (({'0':.5},),dict(unit='fraction')))]
    assert counts==[counts[0]]*3 and counts[0]==net()[0].weight.numel()//2
    learn = learner()
    fit(learn, 1, SparsifyCallback(.5, unit='fraction'))
    assert zeros(learn.model)==counts[0]
    assert zeros(Sparsifier(net()).sparsify_model(.4, unit='percent'))==int(.004*net()[0].weight.numel())
    with pytest.raises(ValueError, match="unit must be 'percent' or 'fraction', not 'percents'"): Sparsifier(net()).sparsify_model(50, unit='percents')
    with pytest.raises(ValueError, match='from 0 to 1'): Sparsifier(net()).sparsify_model(50, unit='fraction')

@pytest.mark.parametrize('x', ['0.weight','0','3.weight'])
def test_wrong_layer_names(x):
    sp = Sparsifier(net())
    with pytest.raises(ValueError, match='no layer'): sp.sparsify_layer(x+'x', 50)
    sp.sparsify_layer(x, 50)
    assert sp.reached()==pytest.approx(100*sum(zeros(sp.model))/792) and sorted(zeros(sp.model))[0]==0

# --- odd models

def test_channels_last():
    learn = learner(net().to(memory_format=torch.channels_last))
    plain = learner(net())
    for o in (learn, plain): half_way(o, cb=SparsifyCallback(50, criteria=large_init))
    for a,b in zip(convs(learn.model), convs(plain.model)): assert torch.equal(a.weight==0, b.weight==0)
    assert learn.model[3].weight.is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('granularity', ['weight','filter'])
def test_dtypes(dtype, granularity):
    class Float(nn.Module):
        def forward(self, x): return x.float()
    learn = learner(nn.Sequential(*net().to(dtype), Float()), data=[(x.to(dtype),y) for x,y in DATA])
    cb = SparsifyCallback(50, granularity)
    fit(learn, 2, [cb, Watch(cb)])
    assert zeros(learn.model)==HALF and learn.model[0].weight.dtype is dtype

class Tied(nn.Module):
    "One weight under two names, one module used twice"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.head = nn.Conv2d(3,8,3,padding=1),nn.Conv2d(8,8,3,padding=1),nn.Conv2d(8,8,3,padding=1),nn.Linear(8,4)
        self.c.weight = self.b.weight
        self.again = self.a
    def forward(self, x): return self.head(self.b(self.c(self.b(self.a(x)).relu())).mean((2,3)))

@pytest.mark.parametrize('granularity', ['weight','filter'])
def test_tied_weights(granularity):
    "A weight that is shared counts once"
    learn = learner(Tied())
    cb = SparsifyCallback(50, granularity, 'global')
    fit(learn, 2, [cb, Watch(cb)])
    assert len(cb.sparsifier.layers)==2 and cb.sparsifier.reached()==50
    assert learn.model.b.weight is learn.model.c.weight and not hooks(learn.model)

@pytest.mark.parametrize('norm', [lambda n: nn.BatchNorm2d(n, affine=False), lambda n: nn.GroupNorm(2, n), nn.InstanceNorm2d, lambda n: nn.BatchNorm2d(n, track_running_stats=False)])
def test_norms(norm):
    learn = learner(net(norm=norm))
    cb = SparsifyCallback(50, 'filter')
    fit(learn, 2, [cb, Watch(cb)])
    assert zeros(learn.model)==HALF

def test_part_of_a_model():
    "`model=` sparsifies a part and leaves the rest"
    body,head = nn.Sequential(*net()[:3]),nn.Sequential(*net()[3:])
    learn = learner(nn.Sequential(body, head))
    for granularity in ('weight','filter'):
        fit(learn, 2, SparsifyCallback(50, granularity, model=learn.model[1]))
        assert zeros(learn.model)==[0,288]

def test_two_inputs_and_a_dict():
    "Batches of more than one input, and models that take a dict"
    class Two(nn.Module):
        def __init__(self, named): super().__init__(); self.body,self.named = net(),named
        def forward(self, *xs): return self.body(xs[0]['a']+xs[0]['b']) if self.named else self.body(xs[0]+xs[1])
    for named in (False, True):
        data = [(dict(a=x, b=x), y) if named else (x, x, y) for x,y in DATA]
        learn = learner(Two(named), data=data)
        cb = SparsifyCallback(50, 'filter')
        fit(learn, 2, [cb, Watch(cb)])
        assert zeros(learn.model)==HALF

@pytest.mark.parametrize('model', [nn.Sequential(), nn.Sequential(nn.ReLU()), nn.Sequential(nn.LazyConv2d(4,3)), nn.utils.parametrizations.weight_norm(nn.Conv2d(3,4,3)), prune.l1_unstructured(nn.Conv2d(3,4,3), 'weight', .5)], ids=['empty','no-parameters','lazy','weight-norm','pruned'])
def test_models_that_are_refused(model):
    with pytest.raises(ValueError): Sparsifier(model)

@pytest.mark.parametrize('data', [(X,Y), [X,Y], [(X,Y)], [[X,Y],[X,Y]], torch.utils.data.DataLoader(DATA, 16)], ids=['tuple','batch-of-a-loader','list-of-tuples','list-of-lists','loader'])
@pytest.mark.parametrize('criteria', [taylor, wanda], ids=show)
def test_data(data, criteria):
    "A batch, as a tuple or as a DataLoader gives it, a list of batches or a loader; the model keeps its mode, statistics and gradients"
    model = net()
    model[1].eval()
    before,was = state(model),marks(model)
    Sparsifier(model, criteria=criteria, data=data).sparsify_model(50)
    after = state(model)
    assert zeros(model)==HALF and hooks(model)==[] and marks(model)==was and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(after[k], before[k]) for k in after if k not in ('0.weight','3.weight'))

def test_data_is_missing():
    "A criteria that asks for gradients or activations and is given none is an error, and the model is as before"
    for criteria in (taylor, wanda):
        model = net()
        before = state(model)
        with pytest.raises(ValueError, match='data'): Sparsifier(model, criteria=criteria).sparsify_model(50)
        assert same(before, state(model)) and not hooks(model)

def test_forward_with_keywords():
    "Activations are gathered where a layer is called with keywords, too"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.c,self.l = nn.Conv2d(3,4,3),nn.Linear(4,4)
        def forward(self, x): return self.l(input=self.c(input=x).mean((2,3)))
    model = Net()
    Sparsifier(model, criteria=wanda, data=[(X,Y)], layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(50)
    assert (model.c.weight==0).sum()==54 and (model.l.weight==0).sum()==8 and not hooks(model)

# --- state and devices

@pytest.mark.parametrize('how', [dict(), dict(granularity='filter', context='global'), dict(granularity='2:4'), dict(criteria=movement), dict(criteria=updating_movement, context='global'), dict(context='lamp')], ids=show)
def test_resume_gives_the_same_bits(how):
    "A Sparsifier that goes on from a state gives the masks of one that was never interrupted"
    def run(stop):
        model = net()
        sp,r = Sparsifier(model, **how),torch.Generator().manual_seed(1)
        for k in range(1, 9):
            with torch.no_grad(): [p.add_(torch.randn(p.shape, generator=r)*.1) for p in model.parameters()]
            sp.update(k*6)
            if k==stop:
                weights,held = state(model),copy.deepcopy(sp.state_dict())
                model = net(3)
                sp = Sparsifier(model, **how)
                model.load_state_dict(weights)
                sp.load_state_dict(held)
                sp.apply_masks()
                assert same(weights, state(model))
        return state(model)
    assert same(run(None), run(4))

def test_state_of_another_is_refused():
    a,b = Sparsifier(net(), 'weight'),Sparsifier(net(), 'filter')
    with pytest.raises(ValueError, match='granularity'): b.load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match='keep'): a.load_state_dict({})

@pytest.mark.parametrize('context', ['local','global'])
@pytest.mark.parametrize('granularity', ['weight','kernel','filter','2:4','block(2,3)','layer'])
def test_no_waiting_for_the_device(granularity, context):
    "On fake CUDA weights, where asking for a value raises, masks are renewed and applied, and live on the weight's device"
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Sequential(nn.Conv2d(4,8,3, bias=False, device=FAKE_GPU), nn.Conv2d(8,8,3, bias=False, device=FAKE_GPU))
        sp = Sparsifier(model, granularity, context)
        for level in (10,30,20,50):
            sp.update(level)
            sp.apply_masks()
        assert all(m.device.type==FAKE_GPU for m in sp.masks.values()) and all(o.keep.device.type==FAKE_GPU for o in sp.layers)

def test_default_device_does_not_matter():
    "Work is done where the weights are, not where torch makes new tensors"
    model = net()
    with torch.device('meta'):
        sp = Sparsifier(model, 'weight', 'global')
        sp.sparsify_model(50)
    assert sum(zeros(model))==396

def test_on_the_meta_device():
    "Masks follow the weights to another device"
    model = nn.Sequential(nn.Conv2d(4,8,3), nn.Conv2d(8,8,3))
    sp = Sparsifier(model, 'weight', 'local', movement)
    sp.sparsify_model(50)
    model.to('meta')
    sp.update(60)
    assert all(m.device.type=='meta' for m in sp.masks.values())

class Ends(Callback):
    "Ends a fit in its second epoch"
    def after_batch(self):
        if self.training and self.epoch==1: raise CancelFitException()

@pytest.mark.parametrize('make', [lambda: SparsifyCallback(50, schedule='lin'), lambda: SparsifyCallback([40,50], schedule='lin'), lambda: SparsifyCallback(50, 'filter', coupled=True), lambda: PruneCallback(50)])
def test_a_fit_that_ends_early_is_told(make):
    "How far it came, in one warning; a fit that comes to its end, and one that ends after the schedule did, say nothing"
    with pytest.warns(UserWarning, match=r'training ended after step \d+ of \d+, before the schedule of \w+ did: [\d.]+ percent (sparsity|pruned)') as said: fit(learner(), 4, [make(),Ends()])
    assert len([w for w in said if 'training ended' in str(w.message)])==1
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(learner(), 2, make())

# --- where a callback may be

class Adds(Callback):
    "Adds a callback at an event of the second epoch"
    order = 100
    def __init__(self, cb, event): self.cb,self.event = cb,event
    def __call__(self, event_name):
        if event_name==self.event and self.learn.epoch==1 and self.cb not in self.learn.cbs: self.learn.add_cb(self.cb)

@pytest.mark.parametrize('event', ['after_epoch', 'before_train', 'after_batch'])
@pytest.mark.parametrize('make', [lambda: SparsifyCallback(50), KeepSparsity, lambda: PruneCallback(50), lambda: KMeansCallback(2), lambda: KnowledgeDistillationCallback(net(1)), lambda: RegularizationCallback('filter')])
def test_added_in_the_middle_of_a_fit(make, event):
    cb = make()
    with pytest.raises(RuntimeError, match=f'{type(cb).__name__} was added in the middle of a fit, but must be there when it begins'): fit(learner(), 3, Adds(cb, event))

def test_two_learners():
    "A callback works where it was added last, and a fit elsewhere says so"
    cb = SparsifyCallback(50)
    a,b = learner(cbs=cb),learner()
    fit(a)
    b.add_cb(cb)
    fit(b)
    assert zeros(b.model)==HALF
    a.model.load_state_dict(net().state_dict())
    before = state(a.model)
    with a.no_bar(): a.get_preds()
    with pytest.raises(ValueError, match='this SparsifyCallback has been given to another Learner, and works in one at a time'): fit(a)
    assert same(before, state(a.model))
    a.add_cb(cb)
    fit(a)
    assert zeros(a.model)==HALF and sum(isinstance(o, SparsifyCallback) for o in a.cbs)==1
    with pytest.raises(ValueError, match='given to another Learner'): fit(b)
    for m in (net(2), net(3)): assert zeros(fit(learner(m), 1, cb_of_a_fit := SparsifyCallback(50)).model)==HALF==zeros(fit(learner(), 1, cb_of_a_fit).model)

@pytest.mark.parametrize('make,given,words', [(SparsifyCallback, dict(granularty='filter'), "did you mean 'granularity'"), (SparsifyCallback, dict(criterion='taylor'), "did you mean 'criteria'"), (PruneCallback, dict(critera='taylor'), "did you mean 'criteria'"),
    (KMeansCallback, dict(bit=3), "did you mean 'bits'"), (KnowledgeDistillationCallback, dict(los='FitNet'), "did you mean 'loss'"), (RegularizationCallback, dict(alhpa=3), "did you mean 'alpha'"), (RegularizeCallback, dict(wieght=3), "did you mean 'weight'"), (KeepSparsity, dict(what=3), 'Allowed: ')])
def test_names_of_arguments(make, given, words):
    first = () if make in (KeepSparsity, KMeansCallback) else (net(),) if make is KnowledgeDistillationCallback else (50,) if make in (SparsifyCallback, PruneCallback) else ()
    with pytest.raises(TypeError, match=f'{make.__name__} has no argument {next(iter(given))!r}: {words}'): make(*first, **given)

@pytest.mark.parametrize('given', ['Conv2d', 'nn.Conv2d', nn.Conv2d(1, 1, 1)])
def test_a_class_of_layers(given):
    with pytest.raises(TypeError, match='pass the class nn.Conv2d itself'): fit(learner(), 1, SparsifyCallback(50, layer_type=given))
    with pytest.raises(TypeError, match='layer_types must be a class .*pass the class nn.Conv2d itself'): fit(learner(), 1, RegularizeCallback(layer_types=given))

def test_prune_callbacks_that_overlap():
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ValueError, match='two of PruneCallback remove channels of 0, 3: give one of them all layers, as a dict of ratios'): fit(learn, 2, [PruneCallback(30), PruneCallback(50)])
    assert same(before, state(learn.model))

@pytest.mark.parametrize('both', [({'0':30},{'3':50}), ({'3':30},{'0':50})])
def test_prunings_of_other_layers(both):
    "They do what one of all of these layers does"
    ends = []
    for cbs in ([PruneCallback(o, 'lin') for o in both], [PruneCallback(both[0] | both[1], 'lin')]):
        ends.append([m.out_channels for m in convs(fit(learner(), 3, cbs).model)])
    assert ends[0]==ends[1]
