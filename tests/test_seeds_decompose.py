"""The published snippets of decomposition run as printed, given a model; the old spelling warns, once.

Their sources: the first README (000), the posts "FasterAI" (001) and (002), and the paper (003, Listing 13 and Table 9)."""
import warnings
import pytest
from torch import nn
from torchvision.models import resnet18
import fasterai.legacy as legacy
import fasterai.misc.all as library

@pytest.fixture
def given():
    legacy._said.clear()
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    return {**{k:v for k,v in vars(library).items() if not k.startswith('_')}, **dict(model=model, folded_model=model, percent_removed=.5, pct_removed=.5)}

def run(code, ns, old):
    "Run `code` twice; an `old` spelling warns the first time only"
    for n in (1,0):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            exec(code, ns)
        said = [str(w.message) for w in said if issubclass(w.category, FutureWarning)]
        assert said==['FCDecomposer is an old spelling: write FC_Decomposer'][:n*old]
    return ns

def thin(model): return [[m.out_features for m in o] for o in model if isinstance(o, nn.Sequential)]

@pytest.mark.parametrize('code', ['FCD = FCDecomposer()\ndecomposed_model = FCD.decompose(model, percent_removed)',
    'fc_decomposer = FCDecomposer()\ndecomposed_model = fc_decomposer.decompose(folded_model, percent_removed=0.5)',
    'fc_dec = FCDecomposer()\ndec_model = fc_dec.decompose(folded_model, percent_removed=0.5)'], ids=['000','001','002'])
def test_readme_and_posts(given, code):
    ns = run(code, given, True)
    assert thin(ns.get('decomposed_model', ns.get('dec_model')))==[[24,48],[5,10]]
    assert [type(m) for m in given['model']]==[nn.Linear,nn.ReLU,nn.Linear]

def test_003_listing_13(given):
    run('fc = FC_Decomposer()\nnew = fc.decompose(model, pct_removed)', given, False)
    assert thin(given['new'])==[[24,48],[5,10]]

def test_003_table_9():
    counts = [sum(p.numel() for p in library.FC_Decomposer().decompose(resnet18(num_classes=102), o).fc.parameters()) for o in (.25,.5,.75)]
    assert counts==[46_766,31_416,15_452]
