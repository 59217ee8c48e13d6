"One network of each family of torchvision through all that `make zoo` tries with every one of them; and what it calls right"
import importlib.util
from pathlib import Path
import pytest

spec = importlib.util.spec_from_file_location('zoo', Path(__file__).parent.parent/'tools'/'zoo.py')
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)

FAMILIES = '''resnet18 resnext50_32x4d densenet121 googlenet inception_v3 mnasnet0_5 mobilenet_v2 mobilenet_v3_small
efficientnet_b0 regnet_y_400mf shufflenet_v2_x0_5 squeezenet1_0 convnext_tiny swin_t maxvit_t
lraspp_mobilenet_v3_large r3d_18 raft_small quantized_mobilenet_v2'''.split()

@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('name', FAMILIES)
def test_family(name):
    row = zoo.one(name)
    assert zoo.verdict(row)=='right', row['problems']

def row_with(**changed):
    "A row in which all is right, but for `changed`"
    right = dict(zero=dict(how='coupled', zeros=40), lossless=dict(gone=40, whys=[], difference=1e-16, untouched=True), ratio=dict(gone=30, outputs=True),
        fold=dict(folded=9, unsaid=0, left=[], difference=0., untouched=True), saved=dict(difference=0.), step=dict(grads=3))
    return dict(model='a', kind='b', dtype='float64', filters=100, norms=9, before=1000, **{k:{**v, **changed.get(k, {})} for k,v in right.items()})

@pytest.mark.parametrize('changed,kind', [
    (dict(), None), (dict(lossless=dict(difference=1e-3)), 'wrong'), (dict(lossless=dict(difference=float('nan'))), 'wrong'),
    (dict(lossless=dict(untouched=False)), 'wrong'), (dict(ratio=dict(outputs=False)), 'wrong'), (dict(fold=dict(difference=1e-9)), 'wrong'),
    (dict(saved=dict(difference=1e-5)), 'wrong'), (dict(lossless=dict(gone=0)), 'silent'), (dict(lossless=dict(gone=0, warnings=['none can go'], whys=['the code counts'])), 'short'),
    (dict(lossless=dict(gone=0, warnings=['norms'])), None), (dict(lossless=dict(difference=1e-3, rounding=1e-3)), None),
    (dict(zero=dict(zeros=10)), 'silent'), (dict(ratio=dict(gone=14)), 'silent'), (dict(ratio=dict(gone=14, warnings=['less'])), 'short'),
    (dict(fold=dict(unsaid=1)), 'silent'), (dict(fold=dict(folded=0)), 'short'), (dict(step=dict(error='ValueError: no gradient')), 'refused'),
    (dict(ratio=dict(error='IndexError: 3')), 'error'), (dict(zero=dict(how='by hand', refused='ValueError: no')), 'refused')])
def test_what_is_not_right(changed, kind):
    row = row_with(**changed)
    row['problems'] = zoo.problems(row)
    assert {k for k,_ in row['problems']}==({kind} if kind else set())
    assert zoo.shown(row).endswith(kind or 'right')
    assert f'1 {kind or "right"}' in zoo.summary([row])
