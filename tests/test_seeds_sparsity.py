"""The published snippets of sparsification run as printed, given a Learner and data; old spellings warn, once each.

Their sources: the first README (000), the posts "FasterAI" (001, 2020) and "FasterAI: a library to make smaller and faster neural networks" (002, 2021), and the paper
"FasterAI: a lightweight library for neural networks compression" (003, Electronics 2022). Snippets are kept as text, so that nobody mends them."""
import math, re, warnings
import numpy as np, pytest, torch
from fastai.learner import Learner
from torch import nn
import fasterai.legacy as legacy
import fasterai.sparse.all as library
from fasterai.core.criteria import score
from reference import exact, fall
from tiny import Callback, convs, fit, learner, net, zeros

class OldLearner(Learner):
    "fastai v1 called `cbs` `callbacks`"
    def fit(self, *args, callbacks=None, **kwargs):
        with self.no_bar(), self.no_logging(): super().fit(*args, **({} if callbacks is None else dict(cbs=callbacks)), **kwargs)

@pytest.fixture
def given():
    "Names that a snippet may use"
    legacy._said.clear()
    return {**{k:v for k,v in vars(library).items() if not k.startswith('_')}, **dict(torch=torch, math=math, np=np, Learner=lambda data, model, **kw: learner(model, cls=OldLearner, **kw))}

def run(code, ns, n_warnings=None):
    "Run `code` twice; the old spellings in it warn the first time only"
    with warnings.catch_warnings(record=True) as first:
        warnings.simplefilter('always')
        exec(code, ns)
    with warnings.catch_warnings(record=True) as second:
        warnings.simplefilter('always')
        exec(code, ns)
    said = [[str(w.message) for w in ws if issubclass(w.category, FutureWarning) and 'old spelling' in str(w.message)] for ws in (first, second)]
    assert len(set(said[0]))==len(said[0]) and said[1]==[], said
    if n_warnings is not None: assert len(said[0])==n_warnings, said[0]
    return ns

def filters(model): return [int((m.weight==0).flatten(1).all(1).sum()) for m in convs(model)]

def test_000_readme(given):
    "`SparsifyCallback(learn, sparsity, granularity, method, criteria, sched_func)`, by position and by name, with everything it says is supported"
    for granularity in ('weight','kernel','filter'):
        for method in ('local','global'):
            for criteria in ('l1','grad'):
                for sched_func in ('annealing_linear','annealing_cos','annealing_gradual','annealing_no'):
                    legacy._said.clear()
                    learn = given['learn'] = learner(cls=OldLearner)
                    given |= dict(sparsity=50, granularity=granularity, method=method, criteria=criteria, sched_func=given[sched_func])
                    run('cb = SparsifyCallback(learn, sparsity, granularity, method, criteria, sched_func)', given, 2)
                    learn.fit(1, callbacks=[given['cb']])
                    n,gone = dict(weight=(792, sum(zeros(learn.model))), kernel=(88, sum(int((m.weight==0).flatten(2).all(2).sum()) for m in convs(learn.model))), filter=(16, sum(filters(learn.model))))[granularity]
                    assert gone==exact(n, 50)

def test_001_post_by_name(given):
    "The post's fit, with `criteria='l1'`"
    given['student'] = learner(cls=OldLearner)
    run("student.fit(10, 1e-5, callbacks=[SparsifyCallback(student, sparsity=40, granularity='filter', method='local', criteria='l1', sched_func=annealing_cos)])", given, 4)
    assert filters(given['student'].model)==[3,3]

def test_001_post_sparsifier(given):
    "`Sparsifier(granularity, method, criteria)` and `prune`, then iterative pruning with `annealing_no`"
    given |= dict(learn=learner(cls=OldLearner), data=None, granularity='filter', method='local', criteria='l1', sparsity=25, increase_value=25, num_epochs=1, lr=1e-3)
    run("""
sparsifier = Sparsifier(granularity, method, criteria)
new_model = sparsifier.prune(learn.model, sparsity)
""", given, 3)
    assert given['new_model'] is given['learn'].model and filters(given['new_model'])==[2,2]
    legacy._said.clear()
    run("""
new_model = sparsifier.prune(learn.model, sparsity)
learn = Learner(data, new_model)
learn.fit(num_epochs, lr, callbacks=[SparsifyCallback(learn, sparsity, granularity, method, criteria, sched_func=annealing_no)])
sparsity += increase_value
# REPEAT
""", given)
    assert given['sparsity']==75 and filters(given['learn'].model)==[4,4]

def test_002_post(given):
    "The second post's fit: no Learner in front, `criteria=large_final`"
    given['student'] = learner(cls=OldLearner)
    run("student.fit(10, 1e-5, callbacks=[SparsifyCallback(40, granularity='filter', method='local', criteria=large_final, sched_func=annealing_cos)])", given, 2)
    assert filters(given['student'].model)==[3,3]

def test_003_listing_1(given):
    given |= dict(model=net(), learner=learner(cls=OldLearner), granularity='weight', context='global', criteria=library.large_final, schedule=library.one_cycle, sparsity=40, n_epochs=2)
    run("""
# (1) Static
sp=Sparsifier(model, granularity, context, criteria)
sp.prune_model(sparsity)

# (2) Dynamic
sp_cb=SparsifyCallback(sparsity, granularity, context, criteria, schedule)
learner.fit(n_epochs, cbs=sp_cb)
""", given, 0)
    for model in (given['model'], given['learner'].model): assert sum(zeros(model))==exact(792, 40)

LISTING_4 = """
random = torch.randn_like(wf)
large_final = torch.abs(wf)
squared_final = torch.square(wf)
small_final = torch.neg(torch.abs(wf))
large_init = torch.abs(wi)
small_init = torch.abs(torch.neg(wi))
large_init_large_final = torch.abs(torch.min(wf, wi))
small_init_small_final = torch.abs(torch.neg(torch.max(wf, wi)))
magnitude_increase = torch.sub(torch.abs(wf), torch.abs(wi))
movement = torch.abs(torch.sub(wf, wi))
"""
LISTING_5 = """
mov_large_final = torch.abs(torch.mul(x, torch.sub(x, y)))
mov_mag = torch.abs(torch.sub(torch.abs(x), torch.abs(y)))
"""

def expressions(listing): return [line.split(' = ') for line in listing.strip().splitlines()]

@pytest.mark.parametrize('name,expression', expressions(LISTING_4)+expressions(LISTING_5))
def test_003_listings_4_and_5(name, expression):
    "What is printed is what the library computes, but for three slips: the two `small_init…` lack their sign, and the two of both compare signed weights"
    torch.manual_seed(0)
    wi,wf = torch.randn(6,4,3,3),torch.randn(6,4,3,3)
    printed = eval(expression, dict(torch=torch, wf=wf, wi=wi, x=wf, y=wi))
    ours = score(library.criterias[name], w=wf, w0=wi)
    mended = dict(small_init=-printed, large_init_large_final=torch.min(wf.abs(), wi.abs()), small_init_small_final=-torch.max(wf.abs(), wi.abs()))
    if name!='random': torch.testing.assert_close(ours, mended.get(name, printed))
    assert ours.shape==printed.shape

@pytest.mark.parametrize('name,expression', expressions(LISTING_4)+expressions(LISTING_5))
def test_003_listings_4_and_5_as_a_users(name, expression):
    "A printed line, as a criteria of one's own, zeroes what it scores lowest"
    mine = eval('lambda w, w0: '+re.sub(r'\b(wf|wi|x|y)\b', lambda m: dict(wf='w', wi='w0', x='w', y='w0')[m[0]], expression), dict(torch=torch))
    model = net()
    w0 = model[0].weight.detach().clone()
    sp = library.Sparsifier(model, 'weight', 'local', mine)
    with torch.no_grad(): model[0].weight.copy_(torch.randn_like(w0))
    w = model[0].weight.detach().clone()
    sp.sparsify_model(30)
    assert zeros(model)==[exact(216, 30),exact(576, 30)]
    if name!='random':
        scores = mine(w, w0).flatten().tolist()
        assert set((model[0].weight==0).flatten().nonzero().flatten().tolist())==fall([scores], [()], 64)[0]

LISTING_6 = """
def one_shot(sparsity, t_step): return sparsity

def iterative(sparsity, t_step, n_steps=5):
    return (sparsity/n_steps)*(np.ceil((t_step)*n_steps))

def gradual(sparsity, t_step): return sparsity * (1 - t_step)**3

def one_cycle(sparsity, t_step, alpha=14, beta=6):
    return (1+np.exp(-alpha*beta)) / (1 + (np.exp(-alpha*t_step+beta)))*sparsity
"""
LISTING_7 = """
def dsd(sparsity, t_step):
  if t_step<0.5: return (1 + math.cos(math.pi*(1-t_step*2))) * sparsity / 2
  else: return (1 - math.cos(math.pi*(1-t_step*2))) * sparsity / 2
"""

def test_003_listing_6_values(given):
    "What is printed is what the library computes, but for two slips: `gradual` is printed upside down, and the scale of `one_cycle` lacks 1e-3 of reaching its target"
    exec(LISTING_6, printed := dict(np=np))
    for t in np.linspace(0, 1, 24):  # not where it jumps
        assert library.sched_one_shot(0, 40, t)==printed['one_shot'](40, t)
        assert library.sched_iterative(0, 40, t, n_steps=5)==pytest.approx(printed['iterative'](40, t))
        assert library.sched_agp(0, 40, t)==pytest.approx(40-printed['gradual'](40, t))
        assert library.sched_one_cycle(0, 40, t)==pytest.approx(printed['one_cycle'](40, t), abs=.02)
    assert library.sched_one_cycle(0, 40, 1)==40

def test_003_listing_7_values(given):
    "What is printed rises to the target at one half as ours does; in its second half it has a slip of sign, and ours falls to 0 as the text says"
    exec(LISTING_7, printed := dict(math=math))
    for t in np.linspace(0, .499, 11): assert library.sched_dsd(0, 40, t)==pytest.approx(printed['dsd'](40, t))
    for t in np.linspace(.5, 1, 11): assert library.sched_dsd(0, 40, t)==pytest.approx(library.sched_dsd(0, 40, 1-t))

@pytest.mark.parametrize('name,listing', [('one_shot',LISTING_6), ('iterative',LISTING_6), ('one_cycle',LISTING_6), ('dsd',LISTING_7)])
def test_003_listings_6_and_7_as_printed(given, name, listing):
    "A function of (sparsity, t_step), as the paper prints it, is a schedule"
    exec(listing, given)
    learn = learner(n=40)
    seen = []
    class See(Callback):
        order = 56
        def after_step(self): seen.append(100*sum(int((~m).sum()) for m in self.learn.sparsify.sparsifier.masks.values())/792)  # what has just returned is still 0
    fit(learn, 2, [given['SparsifyCallback'](40, 'weight', 'global', given['large_final'], given[name]), See()])
    assert seen==pytest.approx([given[name](40, k/10) for k in range(1, 11)], abs=.2)

def test_003_listing_8(given):
    "Lottery tickets: each round goes back to the start, or to the first epoch"
    given |= dict(sp=60)
    run("cb = SparsifyCallback(sp, 'weights', 'global', large_final, iterative, lth=True)", given, 1)
    given['cb1'] = eval("SparsifyCallback(sp, 'weights', 'global', large_final, iterative, lth=True, \\\nrewind_epoch=1)", given)
    for cb,epoch in (given['cb'], 0), (given['cb1'], 1):
        learn,saved,rounds = learner(net(), n=32),[],[]
        class See(Callback):
            order = 54
            def before_epoch(self):
                if self.epoch==epoch: saved.append([m.weight.detach().clone() for m in convs(self.model)])
        class After(Callback):
            order = 56
            def after_step(self):
                if saved and zeros(self.model)!=[0,0] and (not rounds or sum(zeros(self.model))>rounds[-1]):
                    rounds.append(sum(zeros(self.model)))
                    assert all(((m.weight==0) | (m.weight==w)).all() for m,w in zip(convs(self.model), saved[0]))
        fit(learn, 6, [See(), cb, After()])
        assert rounds==[exact(792, o) for o in (20,40,60)]
