"""Calls of Deep Compression programs, as they were published"""
import warnings
import pytest, torch
from torch import nn
from torchvision.models import alexnet
import fasterai.legacy as legacy
from fasterai.quantize.all import Quantizer
from fasterai.sparse.all import LevelPruner
from tiny import warnings_are

PARTS = [('features.0.weight', .35), ('features.3.weight', .5), ('features.6.weight', .7), ('features.8.weight', .8), ('features.10.weight', .8), ('classifier.1.weight', .8), ('classifier.4.weight', .8), ('classifier.6.weight', .8)]
BITS = [('features.0.weight', 6), ('features.3.weight', 6), ('features.6.weight', 6), ('features.8.weight', 6), ('features.10.weight', 4), ('classifier.1.weight', 2), ('classifier.4.weight', 2), ('classifier.6.weight', 2)]

def test_prune_then_share(monkeypatch):
    "AlexNet: masks hold after each step of the loop, then each layer has its number of values, and zeros are zeros"
    monkeypatch.setattr(legacy, '_said', set())
    torch.manual_seed(0)
    model_ft,criterion = alexnet(),nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model_ft.parameters(), lr=.01, momentum=.9)
    prune_options = [[n, s] for n,s in PARTS]
    with pytest.warns(FutureWarning, match='Sparsifier'): pruner = LevelPruner(options=prune_options)
    masks = None
    for inputs,labels in [(torch.randn(2,3,64,64), torch.tensor([1,2]))]*2:
        optimizer.zero_grad()
        outputs = model_ft(inputs)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        pruner.prune(model=model_ft, update_masks=False)
        zero = [model_ft.get_parameter(n)==0 for n,_ in PARTS]
        assert masks is None or all(torch.equal(a, b) for a,b in zip(masks, zero))
        masks = zero
    assert [int(m.sum()) for m in masks]==[int(m.numel()*round(100*s)//100) for m,(_,s) in zip(masks, PARTS)]
    with pytest.warns(FutureWarning, match='KMeansQuantizer'): quantizer = Quantizer(options=BITS)
    with torch.no_grad(): quantizer.quantize(model_ft)
    for (n,b),m in zip(BITS, masks):
        w = model_ft.get_parameter(n)
        assert len(w.unique())==2**b+1 and torch.equal(w==0, m)

def test_masks_are_renewed_when_asked():
    m = nn.Sequential(nn.Linear(10, 10))
    with warnings_are('ignore'): pruner = LevelPruner(options=[['0.weight', .5]])
    pruner.prune(model=m)
    first = m[0].weight==0
    m[0].weight.data = torch.where(first, 2., 1.)*torch.linspace(1, 2, 100).view(10,10)
    pruner.prune(model=m, update_masks=True)
    assert not torch.equal(m[0].weight==0, first) and (m[0].weight==0).sum()==50

@pytest.mark.parametrize('options,says', [([['0.weight', 40]], 'fractions'), ([['0.weight', -.1]], 'fractions'), ([['0.weight', .5], ['0.weight', .2]], 'twice')])
def test_wrong_options(options, says):
    with pytest.raises(ValueError, match=says), warnings_are('ignore'): LevelPruner(options=options)

def test_wrong_name():
    m = nn.Sequential(nn.Linear(10, 10))
    before = m[0].weight.detach().clone()
    with pytest.raises(ValueError, match="no layer '00.weight'"), warnings_are('ignore'): LevelPruner(options=[['00.weight', .4]]).prune(m)
    assert torch.equal(before, m[0].weight)
