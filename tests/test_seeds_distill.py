"""The published snippets of distillation run as printed, given learners and data; old spellings warn, once each.

Their sources: the first README (000), the posts "FasterAI" (001, 2020) and "FasterAI: a library to make smaller and faster neural networks" (002, 2021), and the paper
"FasterAI: a lightweight library for neural networks compression" (003, Electronics 2022)."""
import pytest
from fastai.callback.schedule import *
from fastai.metrics import accuracy
import fasterai.distill.all as library
import fasterai.legacy as legacy
from test_seeds_sparsity import OldLearner, run
from test_distill import wide
from tiny import learner, same, state

class OneCycle(OldLearner):
    def fit_one_cycle(self, *args, callbacks=None, **kwargs):
        with self.no_bar(), self.no_logging(): super().fit_one_cycle(*args, **({} if callbacks is None else dict(cbs=callbacks)), **kwargs)

@pytest.fixture
def given():
    "Names that a snippet may use"
    legacy._said.clear()
    return {**{k:v for k,v in vars(library).items() if not k.startswith('_')}, 'teacher':learner(wide(), cls=OldLearner), 'student':learner(cls=OneCycle, metrics=[accuracy])}

@pytest.mark.parametrize('code', [  # 000: the call; 001, with fastai v1's `callbacks`; 002, with `cbs`
    'cb = KnowledgeDistillation(student, teacher); student.fit_one_cycle(10, 1e-4, cbs=cb)',
    'student.fit_one_cycle(10, 1e-4, callbacks=[KnowledgeDistillation(student, teacher)])',
    'student.fit_one_cycle(10, 1e-4, cbs=KnowledgeDistillation(student, teacher))'], ids=['000','001','002'])
def test_posts(given, code):
    before,first = state(given['teacher'].model),state(given['student'].model)
    run(code, given, 1)
    assert same(before, state(given['teacher'].model)) and not same(first, state(given['student'].model)) and len(given['student'].recorder.values)==10

@pytest.mark.parametrize('L_f', [library.Attention, None], ids=['both','logits'])
def test_003_listing_10(given, L_f):
    "`Loss = β(α·L_l + (1 − α)·L_f) + (1 − β)·L_c`"
    layers = ['2','5'] if L_f else None
    given |= dict(tch=given['teacher'], L_l=library.SoftTarget, L_f=L_f, layers_std=layers, layers_tch=layers, alpha=.3, beta=.7)
    run('kd_cb = KnowledgeDistillationCallback(tch, L_l, L_f, layers_std, layers_tch, alpha, beta)', given, 1)
    kd = given['kd_cb'].distiller
    assert kd.weight==.7 and list(kd.losses)==['SoftTarget','Attention'][:1+bool(L_f)] and (kd.alpha==.3 or not L_f)
    legacy._said.clear()
    run('kd_cb = KnowledgeDistillationCallback(tch=tch, L_l=L_l, L_f=L_f, layers_std=layers_std, layers_tch=layers_tch, alpha=alpha, beta=beta)', given, 1)
    given['student'].fit(1, callbacks=[given['kd_cb']])
    task,*terms = list(given['student'].recorder.values[-1])[3:]
    assert len(terms)==1+bool(L_f) and all(v>0 for v in terms)
