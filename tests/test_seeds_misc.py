"""The published snippets of folding run as printed, given a model or a Learner; the old spelling warns once.

Their sources: the first README (000), the posts "FasterAI" (001, 2020) and "FasterAI: a library to make smaller and faster neural networks" (002, 2021), and the paper
"FasterAI: a lightweight library for neural networks compression" (003, Electronics 2022)."""
import re, warnings
import pytest
from torch import nn
import fasterai.legacy as legacy
import fasterai.misc.all as library
from fasterai.core.proof import difference
from tiny import X, fit, learner

@pytest.fixture
def given():
    "Names that a snippet may use: a trained network with two norms, its learner"
    legacy._said.clear()
    learn = fit(learner())
    return {**{k:v for k,v in vars(library).items() if not k.startswith('_')}, 'learn':learn, 'pruned_learner':learn, 'model':learn.model}

def folded(old, new):
    "Is `new` `old` without norms, with the same outputs, and `old` as it was?"
    count = lambda m: sum(isinstance(o, nn.BatchNorm2d) for o in m.modules())
    return count(old)==2 and count(new)==0 and difference(old, new, X)[0]<1e-5 and not any(isinstance(o, nn.Identity) for o in new.modules())

SNIPPETS = {
    '000 README and 001 post': 'bn_folder = BN_Folder()\nnew = bn_folder.fold(learn.model)',  # printed with one parenthesis too many, and without a name for the result
    '002 post': 'bn_folder = BN_Folder() \nfolded_model = bn_folder.fold(pruned_learner.model)\nnew = folded_model',
    '003 paper, listing 12': '1 bn = BN_Folder()\n2 new = bn.fold(model)'}

@pytest.mark.parametrize('source', SNIPPETS)
def test_snippet(given, source):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        exec(re.sub(r'(?m)^\d ', '', SNIPPETS[source]), given)
    assert folded(given['model'], given['new'])

def test_001_function(given):
    "`bn_folding_model`, which says once what it is called now"
    code = 'folded_model = bn_folding_model(pruned_learner.model)'
    with pytest.warns(FutureWarning, match='BN_Folder'): exec(code, given)
    assert folded(given['model'], given['folded_model'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        exec(code, given)
