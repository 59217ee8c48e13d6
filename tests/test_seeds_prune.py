"""The published snippets of pruning run as printed on a network whose filters were sparsified: smaller, the same outputs, the original untouched.

Their sources: the first README (000), the posts (001, 002), and the paper (003, Listing 9)."""
import re, warnings
import pytest
import fasterai.prune.all as library
from fasterai.core.proof import difference
from fasterai.sparse.sparsifier import Sparsifier
from tiny import X, fit, learner, same, state

SNIPPETS = {
    '000 README and 001 post': 'pruner = Pruner()\npruned_model = pruner.prune_model(learn.model)',
    '001 and 002 posts, a student': 'pruner = Pruner()\npruned_model = pruner.prune_model(student.model)',
    '003 paper, listing 9': '1 pruner = Pruner()\n2 pruned_model = pruner.prune_model(model)'}

@pytest.mark.parametrize('source', SNIPPETS)
def test_snippet(source):
    learn = fit(learner())
    Sparsifier(learn.model, 'filter').sparsify_model(50)
    was,names = state(learn.model),{**{k:v for k,v in vars(library).items() if not k.startswith('_')}, 'learn':learn, 'student':learn, 'model':learn.model}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        exec(re.sub(r'(?m)^\d ', '', SNIPPETS[source]), names)
    new = names['pruned_model']
    assert [new[i].out_channels for i in (0,3)]==[4,4] and difference(learn.model, new, X)[0]<1e-5 and same(was, state(learn.model))
