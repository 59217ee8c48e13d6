"""Analyses of Deep Compression programs, as they were published"""
import warnings
import pandas as pd
import pytest, torch
from torch import nn
import fasterai.legacy as legacy
from fasterai.analyze import all as senscan, all as bits_analysis
from tiny import warnings_are

g = torch.Generator().manual_seed(0)
val = [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, 4, (8,), generator=g)) for _ in range(2)]

def validate_func(model, loader, criterion):
    outs = [(model(x),y) for x,y in loader]
    return sum(float((o.argmax(1)==y).sum()) for o,y in outs)/16, sum(float(criterion(o, y)) for o,y in outs)/2

@pytest.fixture
def model_ft():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Conv2d(8,8,3), nn.ReLU(), nn.Flatten(), nn.Linear(128,4))

def test_sparsities(model_ft, tmp_path, monkeypatch):
    monkeypatch.setattr(legacy, '_said', set())
    path = tmp_path/'s.png'
    sparsities = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    criterion = nn.CrossEntropyLoss()
    with pytest.warns(FutureWarning, match='perform_sensitivity_analysis is an old spelling: write sensitivity'):
        sensitivities = senscan.perform_sensitivity_analysis(
            model_ft, val, sparsities, validate_func, criterion
        )
    with pytest.warns(FutureWarning, match='plot'): senscan.sensitivity_to_png(sensitivities, path)
    with pytest.warns(FutureWarning, match='to_csv'): senscan.sensitivities_to_csv(sensitivities, tmp_path/'s.csv')
    assert path.stat().st_size>1000
    df = pd.read_csv(tmp_path/'s.csv', dtype=dict(layer=str))
    assert df.layer[1:].unique().tolist()==['0','2','5'] and sorted(df.level[1:].unique())==[10,20,30,40,50,60,70,80,90]
    with torch.no_grad():
        assert df.metric[0]==validate_func(model_ft, val, criterion)[0]
        model_ft[2].weight.masked_fill_(model_ft[2].weight.abs()<model_ft[2].weight.abs().flatten().sort().values[int(.7*576)], 0)
        assert df[(df.layer=='2')&(df.level==70)].metric.item()==validate_func(model_ft, val, criterion)[0]
    with warnings_are('error'): senscan.sensitivity_to_png(sensitivities, path)  # said once

def test_bits(model_ft, tmp_path, monkeypatch):
    monkeypatch.setattr(legacy, '_said', set())
    path = tmp_path/'s.png'
    criterion = nn.CrossEntropyLoss()
    bits = [6, 4, 2]
    with torch.no_grad(), pytest.warns(FutureWarning, match='perform_bits_analysis'):
        sensitivities = bits_analysis.perform_bits_analysis(
            model_ft, val, bits, validate_func, criterion
        )
    with warnings_are('ignore'):
        bits_analysis.sensitivities_to_png(sensitivities, path)
        bits_analysis.sensitivities_to_csv(sensitivities, tmp_path/'s.csv')
    assert path.stat().st_size>1000 and pd.read_csv(tmp_path/'s.csv').level[1:].tolist()==bits*3

@pytest.mark.parametrize('sparsities', [[10,20], [0], [.5,-.1]])
def test_fractions(model_ft, sparsities):
    with warnings_are('ignore'), pytest.raises(ValueError, match='fractions'):
        senscan.perform_sensitivity_analysis(model_ft, val, sparsities, validate_func, nn.CrossEntropyLoss())
