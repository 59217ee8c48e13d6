"Criteria and `repair` take the same data: inputs by name, batches that come once; and what fails leaves a model as it was"
import copy
from collections import OrderedDict
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fasterai.prune.all import Pruner
from fasterai.sparse.all import Sparsifier

class Two(nn.Module):
    "Takes two inputs, whose order matters"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.head = nn.Linear(6, 12),nn.Linear(5, 12),nn.Linear(12, 3)
    def forward(self, p, q, scale=1.): return self.head(F.relu(self.a(p)+scale*self.b(q)))

class Whole(nn.Module):
    "Takes a dict"
    def __init__(self):
        super().__init__()
        self.net = Two()
    def forward(self, batch): return self.net(batch['p'], batch['q'])

def two(cls=Two):
    torch.manual_seed(0)
    return cls().eval()

def by_name(n=4):
    torch.manual_seed(1)
    return [dict(q=torch.randn(32, 5), p=torch.randn(32, 6)) for _ in range(n)]

def zeros(model): return [p.detach()==0 for p in model.parameters()]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))

# --- inputs by name

FORMS = dict(dicts=lambda d: d, one=lambda d: {k:torch.cat([o[k] for o in d]) for k in d[0]}, with_target=lambda d: [(o,torch.zeros(32)) for o in d],
             alone=lambda d: [(o,) for o in d], lists=lambda d: [[o,torch.zeros(32)] for o in d], mapping=lambda d: [OrderedDict(o) for o in d])

@pytest.mark.parametrize('criteria', ['obs','wanda'])
@pytest.mark.parametrize('form', FORMS)
def test_by_name_as_in_order(form, criteria):
    data,res = by_name(),[]
    for given in (FORMS[form](data), [(o['p'],o['q'],torch.zeros(32)) for o in data]):
        model = two()
        Sparsifier(model, 'weight', 'local', criteria, layer_type=nn.Linear, data=given).sparsify_model(40)
        res.append(zeros(model))
    assert same(*res)

@pytest.mark.parametrize('criteria', ['obs','wanda'])
def test_a_model_that_takes_a_dict(criteria):
    data,res = by_name(),[]
    for cls in (Two,Whole):
        model = two(cls)
        Sparsifier(model, 'weight', 'local', criteria, layer_type=nn.Linear, data=[(o,torch.zeros(32)) for o in data]).sparsify_model(40)
        res.append(zeros(model))
    assert same(*res)

def test_gradients_by_name():
    data,y,res = by_name(),torch.arange(32)%3,[]
    for given in ([(o,y) for o in data], [(o['p'],o['q'],y) for o in data]):
        model = two()
        Sparsifier(model, 'weight', 'local', 'taylor', layer_type=nn.Linear, data=given).sparsify_model(40)
        res.append(zeros(model))
    assert same(*res)
    with pytest.raises(ValueError, match='with a target'):
        Sparsifier(two(), 'weight', 'local', 'taylor', layer_type=nn.Linear, data=data).sparsify_model(40)

def test_by_name_and_repaired():
    data,model = by_name(),two()
    sp = Sparsifier(model, 'weight', 'local', 'obs', layer_type=nn.Linear, data=data, repair=True)
    sp.sparsify_model(40)
    assert sp.repaired is not None and all(.35<o.float().mean()<.45 for o in zeros(model) if o.dim()>1)
    model = two()
    pruner = Pruner(model, 40, criteria='obs', data=data, example_inputs=data[0], repair=True)
    assert pruner.prune_model() is model and model.a.out_features==8 and pruner.repaired is not None
    assert model(**data[0]).isfinite().all()

def test_bert():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24), add_pooling_layer=False).eval()
    ids = torch.randint(0, 50, (2,7))
    for batch in (dict(input_ids=ids, attention_mask=torch.ones_like(ids)), transformers.BatchEncoding(dict(input_ids=ids, attention_mask=torch.ones_like(ids)))):
        new = copy.deepcopy(model)
        Sparsifier(new, 'weight', 'local', 'wanda', layer_type=nn.Linear, data=[batch]*3).sparsify_model(50)
        assert all((m.weight==0).float().mean()==.5 for m in new.modules() if isinstance(m, nn.Linear))

# --- batches that come once

def test_a_generator_serves_criteria_and_repair():
    data,res = by_name(),[]
    for given in (data, (o for o in data)):
        model = two()
        sp = Sparsifier(model, 'weight', 'local', 'obs', layer_type=nn.Linear, data=given, repair=True)
        sp.sparsify_model(40)
        pruner = Pruner(model, 40, criteria='obs', data=(o for o in data), example_inputs=data[0], repair=True)
        pruner.prune_model()
        assert sp.repaired is not None and pruner.repaired is not None
        res.append([*model.parameters()])
    assert same(*res)

# --- inputs from data

@pytest.mark.parametrize('given', [lambda d: d, lambda d: (o for o in d), lambda d: d[0], lambda d: [(o,torch.zeros(32)) for o in d]])
def test_example_inputs_come_from_data(given):
    model,data = two(),by_name()
    pruner = Pruner(model, 40, criteria='obs', data=given(data))
    pruner.prune_model()
    assert model.a.out_features==8 and all(torch.equal(pruner.graph.example_inputs[k], v) for k,v in data[0].items())

def test_example_inputs_that_are_given_come_first():
    model,data = two(),by_name()
    pruner = Pruner(model, 40, data=data, example_inputs=data[1], repair=True)
    pruner.prune_model()
    assert torch.equal(pruner.graph.example_inputs['p'], data[1]['p'])
