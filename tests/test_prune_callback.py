"""`PruneCallback` beside all that a fit may have: counts at every step, the optimizer's state, other callbacks, precisions, compiled and frozen models, interrupts, a second fit."""
import copy, pickle
from functools import partial
import numpy as np, pytest, torch
from fastai.callback.core import *
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.optimizer import SGD, Adam, OptimWrapper, RMSProp, ranger
from torch import nn
from fasterai.core.criteria import criterias
from fasterai.core.schedule import sched_lin, schedules
from fasterai.prune.all import *
from fasterai.prune.pruner import pruned_plan
from fasterai.sparse.all import KeepSparsity, SparsifyCallback
from reference import exact
from tiny import At, DATA, X, Y, convs, fit, learner, net, raises, same, state, told

def widths(model): return [m.out_channels for m in convs(model)]
def hooks(model): return [n for n,m in model.named_modules() for o in ('_forward_hooks','_forward_pre_hooks','_backward_hooks','_forward_hooks_always_called','_state_dict_hooks') if getattr(m, o, None)]

def wide(n=20, m=30, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3,n,3,padding=1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n,m,3,padding=1), nn.BatchNorm2d(m), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(m,4))

class Tied(nn.Module):
    "A residual connection around a depthwise convolution"
    def __init__(self, n=12):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.d,self.b,self.n,self.head = nn.Conv2d(3,n,3),nn.Conv2d(n,n,3,padding=1,groups=n),nn.Conv2d(n,n,1),nn.BatchNorm2d(n),nn.Linear(n,4)
    def forward(self, x):
        x = self.a(x)
        return self.head(self.n(x+self.b(self.d(x).relu())).relu().mean((2,3)))

class Watch(Callback):
    "Widths after every step; parameters and buffers agree with each other, and the optimizer holds those of the model"
    order = 56
    def before_fit(self): self.seen = []
    def after_step(self):
        ps = list(self.model.parameters())
        assert {id(p) for p in ps}=={id(p) for l in self.opt.param_lists for p in l}
        opt = getattr(self.opt, 'opt', None) or self.opt
        for p in ps:
            for v in opt.state[p].values() if p in opt.state else []: assert not isinstance(v, torch.Tensor) or not v.dim() or v.shape==p.shape
            assert p.grad is None or p.grad.shape==p.shape
        self.seen.append(widths(self.model))

def half(learn, n=2, cbs=(), cb=None, **kwargs):
    "A fit to 50 % that is watched"
    fit(learn, n, [cb or PruneCallback(50), w := Watch(), *cbs], **kwargs)
    assert widths(learn.model)==[4,4] and not hooks(learn.model)
    with torch.no_grad(): assert learn.model.eval()(X).shape==(48,4)
    return w

# --- how many, when

@pytest.mark.parametrize('schedule', [o for o in schedules.values() if str(o)!='dsd'], ids=told)
@pytest.mark.parametrize('n_updates', [1,3,10,200])
def test_counts_at_every_step(schedule, n_updates):
    "After step k of n the percentage is that of the schedule at the last step that was due, of the original widths; after the last, the target"
    learn = learner(wide())
    fit(learn, 3, [PruneCallback(37, schedule, n_updates=n_updates), w := Watch()])
    n,m = 12,min(12, n_updates//3*3 or n_updates)
    for k,now in enumerate(w.seen, 1):
        last = max([j for j in range(1, k+1) if j*m//n>(j-1)*m//n], default=0)
        assert now==[c-exact(c, schedule(last/n, 37.) if last else 0.) for c in (20,30)], k
    assert w.seen[-1]==[20-7, 30-11]

def test_start_pct_is_obeyed():
    learn = learner(wide())
    fit(learn, 3, [PruneCallback(50, Schedule(sched_lin, .5), n_updates=200), w := Watch()])
    assert w.seen[:6]==[[20,30]]*6 and w.seen[6][1]<30 and w.seen[-1]==[10,15]

@pytest.mark.parametrize('context', ['local','global','erk','uniform_plus','lamp',lambda sizes, sparsity: {o:exact(n, sparsity) for o,n in sizes.items()}], ids=told)
@pytest.mark.parametrize('ratio', [10,33.3,90,100])
def test_contexts(context, ratio):
    "Exactly so many of all channels, and a layer keeps one"
    learn = learner(wide())
    fit(learn, 3, [PruneCallback(ratio, 'lin', context), w := Watch()])
    ns = [20-exact(20, ratio),30-exact(30, ratio)] if context=='local' or callable(context) else None
    assert widths(learn.model)==[max(o, 1) for o in ns] if ns else sum(widths(learn.model))==max(50-exact(50, ratio), 2)
    for a,b in zip(w.seen, w.seen[1:]): assert all(x>=y for x,y in zip(a, b))

@pytest.mark.parametrize('criteria', sorted(criterias)+[lambda w, w0, w_prev, grad: (w-w0).abs()+(w-w_prev).abs()+grad.abs(), Criteria('large_final', reducer='l2')], ids=told)
@pytest.mark.parametrize('context', ['local','global'])
def test_criteria(criteria, context):
    learn = learner(Tied())
    fit(learn, 2, PruneCallback(50, 'lin', context, criteria))
    assert learn.model.a.out_channels==learn.model.d.groups==learn.model.b.out_channels==6

def test_what_is_remembered_is_cut_along():
    "`w0` and `w_prev` are those of the channels that are left"
    learn,seen,start = learner(Tied()),[],{}
    def mine(w, w0, w_prev):
        seen.append((w.shape,w0.clone(),w_prev.clone()))
        return (w-w0).abs()+(w-w_prev).abs()
    cb = PruneCallback(50, 'lin', criteria=mine, n_updates=4)
    class Keep(Callback):
        order = 56
        def before_fit(self): start.update(state(self.model))
        def after_step(self):
            if not start or 'w_prev' not in cb.pruner.about.kept: return
            kept = pruned_plan(self.model)['kept']
            for n in ('a.weight','b.weight','d.weight'):
                w = start[n]
                for d,i in kept.get(n, {}).items(): w = w.index_select(d, torch.tensor(i))
                assert torch.equal(cb.pruner.about.kept['w0'][n], w)
    fit(learn, 2, [cb, Keep()])
    assert len(seen)==12 and all(a==b.shape==c.shape for a,b,c in seen)
    assert len({a[0] for a,_,_ in seen})>2

def test_the_least_important_go():
    "With a learning rate of nothing, what goes in steps is what would go at once"
    one,steps = wide(seed=3),learner(wide(seed=3), lr=0.)
    Pruner(one, 50, example_inputs=X[:2]).prune_model()
    fit(steps, 2, PruneCallback(50, 'lin', n_updates=1), lr=0.)
    assert pruned_plan(steps.model)['kept']==pruned_plan(one)['kept']
    gl,at = wide(seed=4),learner(wide(seed=4), lr=0.)
    with torch.no_grad():
        for m in (gl,at.model): m[0].weight.mul_(torch.linspace(1, 4, 20)[:,None,None,None])
    Pruner(gl, 50, 'global', example_inputs=X[:2]).prune_model()
    fit(at, 2, PruneCallback(50, 'one_shot', 'global'), lr=0.)
    assert widths(gl)==widths(at.model) and pruned_plan(gl)['kept']==pruned_plan(at.model)['kept']

@pytest.mark.parametrize('context', ['local','global'])
def test_round_to(context):
    learn = learner(wide(32, 24))
    fit(learn, 3, [PruneCallback(60, 'lin', context, round_to=8), w := Watch()])
    assert all(n%8==0 for o in w.seen for n in o) and sum(widths(learn.model))<56
    if context=='local': assert widths(learn.model)==[16,16]

def test_by_layer_ignored_and_types():
    learn = learner(wide())
    fit(learn, 2, [PruneCallback({'0':50,'3':10}, 'lin')])
    assert widths(learn.model)==[10,27]
    learn = learner(wide())
    fit(learn, 2, PruneCallback(50, ignored_layers='0'))
    assert widths(learn.model)==[20,15]
    learn = learner(nn.Sequential(*wide()[:-1], nn.Linear(30,10), nn.ReLU(), nn.Linear(10,4)))
    fit(learn, 2, PruneCallback(50, layer_type=nn.Linear))
    assert widths(learn.model)==[20,30] and learn.model[8].out_features==5

def test_few_graphs_and_few_cuts(monkeypatch):
    "The channels are followed once, and a cut is tried only where the number of channels changes"
    import fasterai.prune.pruner as module
    graphs,cuts = [],[]
    monkeypatch.setattr(module, 'ChannelGraph', lambda *a, f=module.ChannelGraph, **kw: (graphs.append(1), f(*a, **kw))[1])
    monkeypatch.setattr(module, 'legal', lambda *a, f=module.legal, **kw: (cuts.append(1), f(*a, **kw))[1])
    fit(learner(), 10, PruneCallback(50, 'lin', n_updates=200))
    assert len(graphs)==1 and len(cuts)==4

# --- the optimizer

OPTS = dict(sgd=partial(SGD, mom=.9, wd=.1), adam=partial(Adam, wd=.1), adamw=partial(OptimWrapper, opt=torch.optim.AdamW, weight_decay=.1, amsgrad=True), rmsprop=partial(RMSProp, mom=.9), ranger=partial(ranger, k=2),
    nesterov=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True), adafactor=partial(OptimWrapper, opt=torch.optim.Adafactor))

@pytest.mark.parametrize('opt', OPTS)
def test_training_goes_on(opt):
    "State goes along: what is left is, to the bit, what it was before the cut"
    learn,before = learner(wide(), opt_func=OPTS[opt]),{}
    def opt_of(l): return getattr(l.opt, 'opt', None) or l.opt
    def take(o): before.update({n:{k:v.clone() for k,v in opt_of(o).state[p].items() if isinstance(v, torch.Tensor)} for n,p in o.model.named_parameters()}, kept=copy.deepcopy(pruned_plan(o.model)['kept']))
    checked = []
    def check(o):
        now = pruned_plan(o.model)['kept']
        for n,p in o.model.named_parameters():
            for k,v in before[n].items():
                for d,i in now.get(n, {}).items():
                    was = before['kept'].get(n, {}).get(d, range(dict(wide().named_parameters())[n].shape[d]))
                    if v.dim()>d and v.shape[d]==len(was): v = v.index_select(d, torch.tensor([list(was).index(j) for j in i]))
                assert torch.equal(opt_of(o).state[p][k], v)
                checked.append(len(v.shape) and v.shape!=before[n][k].shape)
    fit(learn, 3, [At('after_step', take, order=54), PruneCallback(50, 'lin', n_updates=4), At('after_step', check, order=57)])
    assert widths(learn.model)==[10,15] and any(checked)
    if opt=='ranger': assert [o.shape for o in learn.opt.slow_weights[0]]==[p.shape for p in learn.model.parameters()]
    was = state(learn.model)
    fit(learn, 1)
    assert widths(learn.model)==[10,15] and not torch.equal(was['0.weight'], learn.model[0].weight)

def test_a_state_that_cannot_be_cut():
    learn = learner(opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))
    def spoil(o): o.opt.opt.state[o.model[0].weight]['flat'] = torch.zeros(7)
    with pytest.raises(ValueError, match="SGD cannot be cut: 'flat' of 0.weight"): fit(learn, 1, [PruneCallback(50, 'one_shot', n_updates=1), At('after_step', spoil, order=50)])
    assert widths(learn.model)==[8,8] and learn.model[3].weight.shape==(8,8,3,3)

def test_groups_and_discriminative_rates():
    learn = learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    half(learn, lr=slice(1e-4, 1e-2))
    assert [len(o) for o in learn.opt.param_lists]==[4,6] and learn.opt.hypers[0]['lr']!=learn.opt.hypers[1]['lr']

def test_frozen_layers():
    "Layers that do not train are cut like others; a criteria that needs their gradients says so before training"
    split = lambda m: [list(m[:3].parameters()), list(m[3:].parameters())]
    learn = learner(splitter=split)
    learn.freeze()
    half(learn)
    assert not learn.model[0].weight.requires_grad
    learn = learner(splitter=split)
    learn.freeze()
    was = state(learn.model)
    with pytest.raises(ValueError, match='frozen'): fit(learn, 1, PruneCallback(50, criteria='taylor'))
    assert same(was, state(learn.model))

# --- other callbacks

@pytest.mark.parametrize('kwargs', [dict(), dict(monitor='pruned', comp=np.greater), dict(every_epoch=True), dict(at_end=True), dict(with_opt=True)], ids=told)
def test_save_model(kwargs, tmp_path):
    "The epoch that is loaded in the end is one with the final shapes, also where the loss was lowest before"
    learn = learner(path=tmp_path)
    low = At('after_epoch', lambda o: o.recorder.values[-1].__setitem__(1, float(o.epoch)), order=51)
    half(learn, 3, [low, SaveModelCallback(**kwargs)])
    fresh = net(7)
    if not kwargs.get('every_epoch'):
        path = tmp_path/'a.safetensors'
        save_pruned(learn.model, path)
        cut = learner(load_pruned(path, fresh), path=tmp_path)
        assert same(state(cut.load('model', with_opt=False, weights_only=False).model), state(learn.model))

def test_best_after_the_last_cut(tmp_path):
    "With the cuts done half way, the best of the later epochs is kept"
    learn,states = learner(path=tmp_path),[]
    losses = iter([0.,1.,3.,2.,4.,5.])
    def told(o):
        o.recorder.values[-1][1] = next(losses)
        states.append(state(o.model))
    half(learn, 6, [At('after_epoch', told, order=58), SaveModelCallback()], PruneCallback(50, Schedule(sched_lin, 0, .5)))
    assert [len(o['0.weight']) for o in states]==[7,6,4,4,4,4] and same(states[3], state(learn.model))

def test_learner_saves_and_loads_in_mid_fit(tmp_path):
    half(learner(path=tmp_path), cbs=[At('after_train', lambda o: (o.learn.save('mid', with_opt=True), o.learn.load('mid', with_opt=True)))])

@pytest.mark.parametrize('stop', [False,True])
def test_lr_find(stop, tmp_path):
    "lr_find with the callback attached leaves the model as it was, interrupted or not"
    learn = learner(path=tmp_path)
    before = state(learn.model)
    learn.add_cb(PruneCallback(50))
    if stop:
        with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.added_cbs(At('after_batch', raises(KeyboardInterrupt), n=3)): learn.lr_find(show_plot=False, num_it=8)
    else:
        with learn.no_bar(): learn.lr_find(show_plot=False, num_it=8)
        assert same(before, state(learn.model))
    assert widths(learn.model)==[8,8]
    fit(learn)
    assert widths(learn.model)==[4,4]

def test_early_stopping():
    "A fit that stops early has lost what its table says; the next one reaches the target, of the original widths"
    learn = learner(wide())
    learn.add_cb(PruneCallback(50, 'lin'))
    fit(learn, 4, EarlyStoppingCallback(monitor='pruned', comp=np.less, patience=2))
    at = 50*[k for k in range(1, 13) if k*8//16>(k-1)*8//16][-1]/16  # the last that came of eight cuts in sixteen steps
    assert learn.recorder.epoch==2 and widths(learn.model)==[20-exact(20, at), 30-exact(30, at)]
    assert learn.recorder.values[-1][-1]==pytest.approx(100*(50-sum(widths(learn.model)))/50)
    fit(learn, 1)
    assert widths(learn.model)==[10,15]

class OnCPU(MixedPrecision):
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.parametrize('mode', ['fp16','bf16'])
@pytest.mark.parametrize('criteria', ['large_final','taylor','wanda'])
def test_mixed_precision(mode, criteria): half(learner(), cbs=[OnCPU(amp_mode=mode)], cb=PruneCallback(50, criteria=criteria))

def test_half_precision_weights():
    learn = learner(net().bfloat16(), data=type(DATA)((x.bfloat16(),y) for x,y in DATA), loss_func=lambda pred, y: nn.functional.cross_entropy(pred.float(), y))
    fit(learn, 2, PruneCallback(50, criteria='movement'))
    assert widths(learn.model)==[4,4] and learn.model[0].weight.dtype==torch.bfloat16

def test_skipped_steps():
    "Where a step or a batch is cancelled the next one catches up; and the last need not be taken"
    for ev,ex in ('before_step',CancelStepException), ('before_step',CancelBatchException), ('before_batch',CancelBatchException), ('before_backward',CancelBackwardException):
        for n in (1, 5, 8):
            learn = learner()
            fit(learn, 2, [PruneCallback(50, 'lin'), At(ev, raises(ex), n=n)])
            assert widths(learn.model)==[4,4], (ev, n)

@pytest.mark.parametrize('n_acc', [8,16,24,1000])
@pytest.mark.parametrize('criteria', ['large_final','taylor'])
def test_gradient_accumulation(n_acc, criteria):
    "A cut between the batches of one step cuts the gradients that are there already"
    half(learner(n=40), cbs=[GradientAccumulation(n_acc), GradientClip()], cb=PruneCallback(50, 'lin', criteria=criteria))

@pytest.mark.parametrize('backend', ['eager','aot_eager'])
def test_compiled(backend):
    torch._dynamo.reset()
    model = net()
    learn = learner(torch.compile(model, backend=backend))
    fit(learn, 2, PruneCallback(50, n_updates=3))
    assert widths(model)==[4,4]
    fit(learn, 1)

def test_validate_and_predictions():
    "`validate` and `get_preds` before, during and after a fit change nothing"
    learn = learner()
    learn.add_cb(PruneCallback(50))
    with learn.no_bar(): learn.validate(), learn.get_preds()
    assert widths(learn.model)==[8,8]
    fit(learn, 2, FetchPredsCallback())
    with learn.no_bar(), learn.no_logging(): learn.validate(), learn.get_preds()
    assert widths(learn.model)==[4,4]

def test_table():
    rows,learn = [],learner()
    learn.logger = rows.append
    with learn.no_bar(): learn.fit(2, cbs=PruneCallback(50))
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','pruned','time'] and len(rows[-1])==5 and rows[-1][3]==pytest.approx(50)

def test_beside_the_sparsifier():
    "Zeros and cuts do not mix in one fit, one after the other they do"
    from fasterai.sparse.all import SparsifyCallback
    learn = learner(wide())
    fit(learn, 1, SparsifyCallback(50, 'filter', coupled=True))
    fit(learn, 1, PruneCallback(50))
    assert widths(learn.model)==[10,15]

# --- again

def test_second_fit():
    "Percentages are of the original widths, with the same callback, with a new one, and in another process"
    learn = learner(wide())
    learn.add_cb(PruneCallback(30, 'lin'))
    for _ in range(2):
        fit(learn)
        assert widths(learn.model)==[14,21] and len(learn.recorder.metric_names)==len(learn.recorder.values[0])+2
    learn.remove_cb(PruneCallback)
    again = learner(pickle.loads(pickle.dumps(learn.model)))
    fit(again, 1, PruneCallback(50, 'lin', 'global'))
    assert sum(widths(again.model))==25 and all(a<=b for a,b in zip(widths(again.model), (14,21)))
    fit(learn, 1)
    assert widths(learn.model)==[14,21]

def test_after_a_cut_at_once():
    "A `Pruner` counts from the widths of now, the callback from the original ones"
    learn = learner(wide())
    Pruner(learn.model, 20, example_inputs=X[:2]).prune_model()
    assert widths(learn.model)==[16,24]
    fit(learn, 1, PruneCallback(50))
    assert widths(learn.model)==[10,15]

def test_saved_and_loaded(tmp_path):
    "What `save_pruned` writes after two fits loads into a fresh model, which goes on being pruned from there"
    learn = learner(Tied())
    for o in (30,50): fit(learn, 1, PruneCallback(o, 'lin'))
    save_pruned(learn.model, tmp_path/'a.safetensors')
    fresh = load_pruned(tmp_path/'a.safetensors', Tied())
    assert same(state(fresh), state(learn.model)) and str(fresh)==str(learn.model) and pruned_plan(fresh)==pruned_plan(learn.model)
    assert torch.equal(fresh.eval()(X), learn.model.eval()(X))
    fit(learner(fresh), 1, PruneCallback(75))
    assert fresh.a.out_channels==3

def test_export(tmp_path):
    learn = learner(path=tmp_path)
    learn.add_cb(PruneCallback(50, 'lin', 'global', 'movement'))
    fit(learn)
    learn.export('a.pkl')
    loaded = load_learner(tmp_path/'a.pkl')
    assert same(state(loaded.model), state(learn.model)) and loaded.prune.pruner is None
    loaded.dls = learn.dls
    assert sum(widths(fit(loaded).model))==8

def test_copies_in_mid_fit():
    copies = []
    half(learner(), cbs=[At('after_step', lambda o: copies.append((state(o.model), copy.deepcopy(o.model), pickle.loads(pickle.dumps(o.model)))))])
    for s,a,b in copies: assert same(s, state(a)) and same(s, state(b))

@pytest.mark.parametrize('kwargs,epochs', [(dict(n=8), 1), (dict(bs=64), 1), (dict(bs=64), 3)], ids=told)
@pytest.mark.parametrize('schedule', ['agp','one_cycle','one_shot','iterative'])
def test_short_fits(kwargs, epochs, schedule): half(learner(**kwargs), epochs, cb=PruneCallback(50, schedule))

def test_fits_that_train_nothing():
    learn = learner()
    before = state(learn.model)
    fit(learn, 0, PruneCallback(50))
    fit(learn, 1, PruneCallback(0))
    assert widths(learn.model)==[8,8]
    fit(learn, 4, [PruneCallback(50, 'lin'), w := Watch()], start_epoch=2)
    assert w.seen[0]==[6,6] and w.seen[-1]==[4,4]

# --- what stops it

STOPS = [('before_batch',KeyboardInterrupt), ('after_pred',KeyboardInterrupt), ('after_step',KeyboardInterrupt), ('after_batch',ValueError), ('before_batch',CancelFitException), ('before_batch',CancelTrainException),
    ('after_batch',CancelEpochException), ('after_loss',CancelFitException), ('before_validate',KeyboardInterrupt), ('before_train',KeyboardInterrupt)]

@pytest.mark.parametrize('event,ex', STOPS, ids=lambda o: getattr(o, '__name__', o))
@pytest.mark.parametrize('criteria', ['large_final','updating_movement','wanda'])
def test_interrupts(event, ex, criteria):
    "Whatever stops a fit, the model runs, no hook or column stays, and the next fit reaches the target"
    learn,cb = learner(wide()),PruneCallback(50, 'lin', criteria=criteria)
    stop = At(event, raises(ex), n=1 if event in ('before_validate','before_train') else 3)
    if event=='before_validate': stop.run_valid = True
    try: fit(learn, 2, [cb, stop])
    except (KeyboardInterrupt, ValueError): pass
    assert not hooks(learn.model) and not hasattr(learn, 'prune') and learn.model.eval()(X).shape==(48,4)
    fit(learn, 1)
    assert 'pruned' not in learn.recorder.metric_names
    fit(learn, 1, cb)
    assert widths(learn.model)==[10,15] and not cb.pruner.about.kept

# --- refused

@pytest.mark.parametrize('args,said', [((120,),'from 0 to 100'), ((-1,),'from 0 to 100'), (('30',),'percent'), ((True,),'percent'), ((30,'agpp'),'agp'), ((30,'agp','golbal'),'global'), ((30,'agp','local','large_finl'),'large_final'),
    (({'0':120},),'from 0 to 100'), ((30,'dsd'),'do not come back')])
def test_refused_at_the_door(args, said):
    with pytest.raises(ValueError, match=said): PruneCallback(*args)
    with pytest.raises(ValueError, match='n_updates'): PruneCallback(30, n_updates=0)

@pytest.mark.parametrize('kwargs,said', [(dict(pruning_ratio={'1000':30}),"no layer '1000'"), (dict(pruning_ratio={'8':30}),'output of the model'), (dict(ignored_layers='9'),"no layer '9'"), (dict(round_to=0),'at least 1'),
    (dict(round_to=64),'the largest has 8'), (dict(layer_type=nn.LSTM),'no channel'), (dict(pruning_ratio={'0':30}, context='global'),'local')], ids=told)
def test_refused_before_training(kwargs, said):
    learn = learner()
    was = state(learn.model)
    with pytest.raises(ValueError, match=said): fit(learn, 1, PruneCallback(**{'pruning_ratio':30, **kwargs}))
    assert same(was, state(learn.model)) and not hooks(learn.model)

def test_ratios_of_tied_layers():
    with pytest.raises(ValueError, match='tied'): fit(learner(Tied()), 1, PruneCallback({'a':30,'b':40}))
    learn = learner(Tied())
    fit(learn, 1, PruneCallback({'a':50,'b':50}))
    assert learn.model.a.out_channels==6

def test_activations_that_nobody_sees():
    class Attention(nn.Module):
        def __init__(self): super().__init__(); self.a,self.m,self.head = nn.Linear(6,8),nn.MultiheadAttention(8,2,batch_first=True),nn.Linear(8,4)
        def forward(self, x): y = self.a(x.mean(1)); return self.head(self.m(y,y,y)[0].mean(1))
    with pytest.raises(ValueError, match="'wanda' needs the activations that m"): fit(learner(Attention()), 1, PruneCallback(30, criteria='wanda'))
    with pytest.warns(UserWarning, match='kept all channels'): fit(learn := learner(Attention()), 1, PruneCallback(50))  # queries, keys and what comes out have one width
    assert learn.recorder.values[-1][-1]==0

# --- data for criteria, at once

@pytest.mark.parametrize('criteria', ['taylor','wanda',lambda act, w: w.abs()+act, lambda w, grad, act: (w*grad*act).abs()], ids=told)
@pytest.mark.parametrize('data', [(X,Y),[(X[:24],Y[:24]),(X[24:],Y[24:])],torch.utils.data.DataLoader(DATA, batch_size=16)], ids=lambda o: type(o).__name__)
def test_pruner_with_data(criteria, data):
    "Scores are those of the criteria on gradients and activations of all data, as a hand-made sum says"
    m = wide().eval()
    ref = copy.deepcopy(m)
    nn.functional.cross_entropy(ref(X), Y).backward()
    acts = [X.transpose(0,1).flatten(1).norm(dim=1), ref[:3](X).transpose(0,1).flatten(1).norm(dim=1).detach()]
    f = criterias[criteria] if isinstance(criteria, str) else criteria
    import inspect
    for i,act in zip((0,3), acts):
        known = dict(w=ref[i].weight.detach(), grad=ref[i].weight.grad, act=act[None,:,None,None].expand(ref[i].weight.shape))
        s = f(**{o:known[o] for o in inspect.signature(f).parameters}).flatten(1).mean(1)
        ref[i].low = sorted(s.argsort()[len(s)//2:].tolist())
    was = state(m)
    p = Pruner(m, 50, criteria=criteria, example_inputs=X[:2], data=data)
    p.prune_model()
    assert [pruned_plan(m)['kept'][f'{i}.weight'][0] for i in (0,3)]==[ref[i].low for i in (0,3)] and not hooks(m)
    assert all(q.grad is None for q in m.parameters())

def test_data_that_is_missing_or_wrong():
    m = wide()
    was = state(m)
    with pytest.raises(ValueError, match='activations: pass `data`'): Pruner(m, 50, criteria='wanda', example_inputs=X[:2]).prune_model()
    with pytest.raises(ValueError, match='gradients'): Pruner(m, 50, criteria='taylor', example_inputs=X[:2]).prune_model()
    with pytest.raises(ValueError, match='no batch'): Pruner(m, 50, criteria='wanda', example_inputs=X[:2], data=[]).prune_model()
    with pytest.raises(ValueError, match='target'): Pruner(m, 50, criteria='taylor', example_inputs=X[:2], data=X).prune_model()
    m[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match='0.weight is frozen'): Pruner(m, 50, criteria='taylor', example_inputs=X[:2], data=(X,Y)).prune_model()
    assert same(was, state(m))

@pytest.mark.parametrize('other', [lambda: SparsifyCallback(50), lambda: SparsifyCallback(50, 'filter'), KeepSparsity])
@pytest.mark.parametrize('first', [True,False])
def test_masks_beside_pruning_are_refused_before_anything_changes(other, first):
    learn = learner()
    was,cbs = state(learn.model),[PruneCallback(50),other()]
    with pytest.raises(ValueError, match='holds masks of weights, whose shapes PruneCallback changes: prune first'): fit(learn, 2, cbs if first else cbs[::-1])
    assert same(was, state(learn.model))
