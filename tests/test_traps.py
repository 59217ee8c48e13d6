"""fastai's own traps: models that are put in by hand, and an earlier epoch that is brought back"""
import copy, warnings
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.optimizer import SGD, Adam, OptimWrapper
from fasterai.core.all import *
from fasterai.core.schedule import sched_lin
from fasterai.distill.all import *
from fasterai.misc.all import BN_Folder, FC_Decomposer
from fasterai.prune.all import *
from fasterai.quantize.all import *
from fasterai.regularize.all import *
from fasterai.sparse.all import *
from tiny import At, X, convs, fit, learner, net, same, state, warnings_are, zeros

CALLBACKS = dict(sparsify=lambda: SparsifyCallback(50), keep=KeepSparsity, prune=lambda: PruneCallback(20), distill=lambda: KnowledgeDistillationCallback(net(7)),
    regularize=RegularizeCallback, shared=lambda: KMeansCallback(4))
OPTS = dict(adam=Adam, sgd=partial(SGD, mom=.9), wrapped=partial(OptimWrapper, opt=torch.optim.AdamW))

def moved(learn, before): return [n for n,p in learn.model.named_parameters() if n in before and not torch.equal(p, before[n])]
def copies(learn): return {n:p.detach().clone() for n,p in learn.model.named_parameters()}
def sparse_then(change, **kwargs):
    "A learner that was sparsified, and whose model was changed then"
    learn = fit(learner(**kwargs), 1, SparsifyCallback(50, 'filter'))
    learn.model = change(learn.model)
    return learn

CHANGES = dict(pruned=lambda m: Pruner().prune_model(m), folded=lambda m: BN_Folder().fold(m), low_rank=lambda m: FC_Decomposer().decompose(m), copied=copy.deepcopy, other=lambda m: net(5))

@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('cb', CALLBACKS)
def test_a_model_put_in_by_hand_is_trained(change, cb):
    "With one warning, which says what to do"
    learn = sparse_then(CHANGES[change])
    old,before = learn.opt,copies(learn)
    with pytest.warns(UserWarning, match='create_opt') as ws: fit(learn, 1, [CALLBACKS[cb](), CALLBACKS['regularize']()] if cb!='regularize' else CALLBACKS[cb]())
    assert sum('create_opt' in str(o.message) for o in ws)==1 and learn.opt is not old
    if cb!='prune': assert moved(learn, before)
    with warnings_are('error'): fit(learn, 1, RegularizeCallback())

@pytest.mark.parametrize('opt', OPTS)
def test_hyperparameters_stay(opt):
    "Those of the fit, with groups of their own rates; and what is frozen stays so"
    split = lambda m: [list(m[:3].parameters()), list(m[3:].parameters())]
    learn = learner(splitter=split, opt_func=OPTS[opt])
    learn.freeze()
    fit(learn, 1, KeepSparsity())
    learn.model = copy.deepcopy(learn.model)
    before,seen = copies(learn),[]
    with pytest.warns(UserWarning, match='create_opt'): fit(learn, 1, [RegularizeCallback(), At('before_step', lambda o: seen.append([h['lr'] for h in o.opt.hypers]))], lr=slice(1e-3,1e-2), wd=.1)
    assert np.allclose(seen[0], [1e-3,1e-2]) and all(h['wd']==.1 for h in learn.opt.hypers)
    names = moved(learn, before)
    assert '3.weight' in names and '0.weight' not in names

def test_nothing_is_said_where_nothing_is_wrong():
    "The first fit, a second one, after a cut, a new optimizer, groups that leave parameters out, and where nothing is trained"
    with warnings_are('error'):
        learn = fit(learner(), 2, PruneCallback(50))
        fit(learn, 1, KeepSparsity())
        learn.model = copy.deepcopy(learn.model)
        learn.create_opt()
        fit(learn, 1, RegularizeCallback())
        with learn.no_bar(), learn.no_logging():
            learn.add_cb(RegularizeCallback())
            learn.model = net(3)
            learn.validate()
    learn = learner(splitter=lambda m: [list(m[3:].parameters())])
    with warnings_are('error'): fit(fit(learn, 1, RegularizeCallback()), 1, RegularizeCallback())

@pytest.mark.parametrize('opt', OPTS)
def test_a_part_put_in_by_hand_is_trained(opt):
    "And what the optimizer remembers of the rest is kept"
    learn = fit(learner(opt_func=OPTS[opt]), 1)
    learn.model[8],known = nn.Linear(8, 4),getattr(learn.opt, 'opt', learn.opt).state[learn.model[0].weight]
    before = copies(learn)
    with pytest.warns(UserWarning, match='2 of 10 parameters .*create_opt'): fit(learn, 1, RegularizeCallback())
    assert {'0.weight','8.weight','8.bias'}<={*moved(learn, before)} and (opt!='adam' or getattr(learn.opt, 'opt', learn.opt).state[learn.model[0].weight]['step']==8)
    with warnings_are('error'): fit(learn, 1, RegularizeCallback())

def test_channels_removed_by_hand_between_two_fits():
    "In place, with the optimizer given there, which needs no other"
    learn = fit(learner(), 1)
    Pruner(learn.model, 50, example_inputs=X[:2]).prune_model(optimizer=learn.opt)
    before = copies(learn)
    with warnings_are('error'): fit(learn, 1, KeepSparsity())
    assert len(moved(learn, before))==10

def test_parameters_left_out_on_purpose_stay_out():
    learn = learner()
    learn.opt = SGD(list(learn.model[8].parameters()), lr=.1)
    before = copies(learn)
    with pytest.warns(UserWarning, match='8 of 10 parameters .*will not change'): fit(learn, 1, RegularizeCallback())
    assert moved(learn, before)==['8.weight','8.bias']

def test_weights_assigned_by_a_state_dict():
    learn = fit(learner(), 1)
    learn.model.load_state_dict({k:v.clone() for k,v in net(4).state_dict().items()}, assign=True)
    before = copies(learn)
    with pytest.warns(UserWarning, match='create_opt'): fit(learn, 1, KnowledgeDistillationCallback(net(2)))
    assert len(moved(learn, before))==10

# --- an earlier epoch that is brought back

class Losses(Callback):
    "Have validation losses, for those who keep the best"
    order = 58
    def __init__(self, losses): self.losses = iter(losses)
    def after_epoch(self): self.recorder.values[-1][1] = next(self.losses)

@pytest.mark.parametrize('how', [dict(), dict(granularity='filter', context='global'), dict(granularity='2:4'), dict(lth=True), dict(criteria='movement')], ids=str)
@pytest.mark.parametrize('schedule', ['lin','one_cycle','agp','iterative',Schedule(sched_lin, 0, .5)], ids=str)
def test_the_model_that_is_kept_is_sparse_enough(how, schedule, tmp_path):
    learn,cb = learner(path=tmp_path),SparsifyCallback(50, schedule=schedule, **how)
    with warnings_are('ignore'): fit(learn, 6, [cb, Losses([0.,1.,2.,4.,3.,5.]), SaveModelCallback()])
    n = sum(int((m.weight==0).sum()) for m in convs(learn.model))
    if how.get('granularity')=='2:4': assert n>=.45*sum(m.weight.numel() for m in convs(learn.model))
    else: assert abs(cb.technique.reached()-50)<1 and n>=.49*sum(m.weight.numel() for m in convs(learn.model))

def test_the_best_of_those_that_are_sparse_enough(tmp_path):
    "With the level reached half way, the best of the later epochs is kept; also where more is better"
    for sign in (1,-1):
        states = []
        learn = learner(path=tmp_path)
        saver = SaveModelCallback(comp=np.less if sign==1 else np.greater)
        fit(learn, 6, [SparsifyCallback(50, schedule=Schedule(sched_lin, 0, .5)), Losses([sign*o for o in (0.,1.,3.,2.,4.,5.)]), At('after_epoch', lambda o: states.append(state(o.model)), order=59), saver])
        assert zeros(learn.model)==[108,288] and same(states[3], state(learn.model))

def test_weights_that_grow_back(tmp_path):
    "`dsd` ends dense: the model that is kept is not one from its sparse middle"
    learn = learner(path=tmp_path)
    fit(learn, 4, [SparsifyCallback(50, schedule='dsd'), Losses([1.,0.,2.,3.]), SaveModelCallback()])
    assert sum(zeros(learn.model))<40  # of 396 in its middle: what grows back begins at zero

@pytest.mark.parametrize('cb,ok', [(lambda: KMeansCallback(2), lambda m: all(len(o.weight.unique())<=5 for o in convs(m))), (KeepSparsity, lambda m: zeros(m)==[108,288])], ids=['shared','kept'])
def test_the_best_of_an_earlier_fit_is_not_brought_back(cb, ok, tmp_path):
    "A callback that goes on from fit to fit with its best forgets it when values begin to be shared, or zeros to be held"
    learn,saver = learner(path=tmp_path),SaveModelCallback(reset_on_fit=False)
    fit(learn, 1, [Losses([-5.]), saver])
    Sparsifier(learn.model).sparsify_model(50)
    fit(learn, 2, [cb(), Losses([2.,3.]), saver])
    assert ok(learn.model)
