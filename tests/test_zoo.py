"One model of each family of torchvision, pruned without loss and by ratio, and folded; `make zoo` tries all of them"
import importlib.util
from pathlib import Path
import pytest

spec = importlib.util.spec_from_file_location('zoo', Path(__file__).parent.parent/'tools'/'zoo.py')
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)

FAMILIES = '''resnet18 resnext50_32x4d densenet121 googlenet inception_v3 mnasnet0_5 mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_y_400mf shufflenet_v2_x0_5
squeezenet1_0 convnext_tiny swin_t maxvit_t'''.split()

@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('name', FAMILIES)
def test_family(name):
    row = zoo.one(name)
    assert row['ok'], row
