"Criteria and `repair` take the same data: inputs by name, batches that come once; and what fails leaves a model as it was"
import copy
from collections import OrderedDict
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fasterai.core.obs import Reader,best_removed,removal_costs
from fasterai.analyze.all import block_influence
from fasterai.misc.all import FC_Decomposer
from fasterai.prune.all import Pruner,drop_blocks
from fasterai.repair.all import repair
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

# --- a repair that fails

class Branch(nn.Module):
    "Which layer runs is decided by values, and only one of them is cut"
    def __init__(self):
        super().__init__()
        self.a,self.norm,self.b,self.c,self.d = nn.Linear(10, 24),nn.BatchNorm1d(24),nn.Linear(24, 16),nn.Linear(24, 16),nn.Linear(16, 4)
    def forward(self, x):
        x = self.norm(self.a(x).relu()) if self.with_norm else self.a(x).relu()
        return self.d((self.b(x) if x.mean()>self.limit else self.c(x)).relu())
    with_norm,limit = False,.22

def branch():
    torch.manual_seed(0)
    return Branch(),[torch.randn(64, 10) for _ in range(8)]

def all_of(model, opt):
    "Everything that a cut changes, by place: objects, and copies of what is in them"
    tensors = [*model.named_parameters(),*model.named_buffers()]
    named = {n:(id(t),id(t.grad),t.detach().clone(),None if t.grad is None else t.grad.clone()) for n,t in tensors}
    own = {n:{k:v for k,v in vars(m).items() if isinstance(v, (int,tuple))} for n,m in model.named_modules()}
    state = {id(p):{k:v.clone() for k,v in s.items()} for p,s in opt.state.items()}
    return dict(named=named, own=own, state=state, groups=[[id(p) for p in g['params']] for g in opt.param_groups], pruned=hasattr(model, '_pruned'))

def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple,list)): return len(a)==len(b) and all(map(equal, a, b))
    return a==b

def trained(model, data, make=torch.optim.Adam):
    opt = make(model.parameters())
    for _ in range(2):
        opt.zero_grad()
        model(data[0]).square().mean().backward()
        opt.step()
    return opt

def fails(*_, **__): raise ValueError('no repair today')

def test_a_repair_that_fails_by_itself_leaves_the_model():
    model,data = branch()
    before = {n:p.clone() for n,p in model.named_parameters()}
    with pytest.raises((ValueError,RuntimeError)): Pruner(model, 40, data=data, repair=True, example_inputs=data[0]).prune_model()
    assert equal(before, dict(model.named_parameters())) and model.a.out_features==24 and not hasattr(model, '_pruned')
    for x in data: model(x)

@pytest.mark.parametrize('how', [dict(pruning_ratio=40), dict(params='2x'), dict(pruning_ratio=40, criteria='obs')], ids=str)
def test_a_failed_repair_leaves_all_as_it_was(how, monkeypatch):
    model,data = branch()
    model.with_norm,model.limit = True,float("inf")  # one branch alone
    opt = trained(model, data)
    model.eval()
    before = all_of(model, opt)
    pruner = Pruner(model, data=data, repair=True, **how)
    monkeypatch.setattr('fasterai.prune.pruner.Teacher.repair', fails)
    with pytest.raises(ValueError, match='no repair'): pruner.prune_model(optimizer=opt)
    assert equal(before, all_of(model, opt)) and pruner.reached()==0
    model.train()
    opt.zero_grad()
    model(data[0]).square().mean().backward()
    opt.step()
    monkeypatch.undo()
    model.eval()
    pruner.prune_model(optimizer=opt)
    assert model.a.out_features<24 and pruner.repaired is not None
    model(data[0]).sum().backward()
    opt.step()

def test_a_failed_step_leaves_all_as_it_was(monkeypatch):
    model,data = branch()
    model.with_norm,model.limit = True,float("inf")  # one branch alone
    opt = trained(model, data)
    model.eval()
    pruner = Pruner(model, 50, data=data, repair=True, criteria='movmag')
    pruner.start()
    pruner.update(20, opt)
    before,keep,kept,plan = all_of(model, opt),[g.keep.clone() for g in pruner.groups],{k:x.clone() for k,x in pruner.about.state_dict().items()},copy.deepcopy(model._pruned)
    with monkeypatch.context() as m:
        m.setattr('fasterai.prune.pruner.Teacher.repair', fails)
        with pytest.raises(ValueError, match='no repair'): pruner.update(50, opt)
    assert equal(before, all_of(model, opt)) and equal(keep, [g.keep for g in pruner.groups]) and equal(kept, pruner.about.state_dict()) and plan==model._pruned
    reached = pruner.reached()
    pruner.update(50, opt)
    assert model.a.out_features==12 and pruner.reached()==50>reached
    model(data[0]).sum().backward()
    opt.step()

def test_fastais_optimizer_is_as_it_was(monkeypatch):
    from fastai.optimizer import Adam, Lookahead
    model,data = branch()
    opt = Lookahead(Adam([*model.parameters()], lr=.01))
    for _ in range(7):
        model(data[0]).square().mean().backward()
        opt.step()
        opt.zero_grad()
    copied = lambda: dict(slow=[[t.clone() for t in o] for o in opt.slow_weights], state={id(p):{k:v.clone() if isinstance(v, torch.Tensor) else v for k,v in s.items()} for p,s in opt.state.items()})
    before = copied()
    monkeypatch.setattr('fasterai.prune.pruner.Teacher.repair', fails)
    with pytest.raises(ValueError, match='no repair'): Pruner(model, 40, data=data, repair=True).prune_model(optimizer=opt)
    assert equal(before, copied())
    model(data[0]).square().mean().backward()
    opt.step()

def test_repair_takes_arguments_by_name_with_a_target():
    "As a criteria does: a dict, alone or in a tuple with what is not looked at"
    torch.manual_seed(0)
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.out = nn.Linear(8, 16),nn.Linear(7, 16),nn.Linear(32, 4)
        def forward(self, p, q): return self.out(torch.cat([self.a(p),self.b(q)], 1).relu())
    dense,batches = Two(),[dict(p=torch.randn(32, 8), q=torch.randn(32, 7)) for _ in range(3)]
    found = []
    for data in (batches, [(o,torch.zeros(32)) for o in batches]):
        m = copy.deepcopy(dense)
        Sparsifier(m, 'weight', 'local', 'obs', layer_type=nn.Linear, data=data, repair=True).sparsify_model(40)
        found.append(m)
    for a,b in zip(found[0].parameters(), found[1].parameters()): assert torch.equal(a, b)

# --- few channels, of which most go

@pytest.mark.parametrize('n,k', [(12,9), (12,11), (16,14), (18,15), (40,38), (300,299)])
def test_few_ways_to_keep_some(n, k):
    torch.manual_seed(0)
    x,w = torch.randn(n, 2*n).double(),torch.randn(4, n)
    def readers(): return [Reader(w, x@x.T, torch.arange(n), n)]
    greedy = removal_costs(readers(), n).argsort()[:k]
    best = best_removed(readers, greedy, n)
    assert len(best.unique())==k and readers()[0].cost(best)<=readers()[0].cost(greedy)*(1+1e-9)

@pytest.mark.parametrize('n,ratio', [(12,75), (12,90), (16,90), (16,95)])
def test_obs_takes_most_of_few_channels(n, ratio):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, n, 3), nn.ReLU(), nn.Conv2d(n, 4, 3)).eval()
    Pruner(model, ratio, criteria='obs', data=[torch.randn(4, 3, 8, 8)], progress=False).prune_model()
    assert len(model[0].weight)==n-int(n*ratio/100)

# --- a Sparsifier zeroes and repairs, or neither

def of_sparsifier(o):
    return dict(params=[p.detach().clone() for p in o.model.parameters()], masks={n:m.clone() for n,m in o.masks.items()},
                state={n:t.clone() for n,t in o.state_dict().items()}, reached=o.reached(), left=o.left, asked=o._asked)

SPARSE = dict(weights=dict(granularity='weight'), global_=dict(granularity='weight', context='global'), filters=dict(granularity='filter'), pattern=dict(granularity='2:4'),
              tied=dict(granularity='filter', coupled=True), moved=dict(granularity='weight', criteria='movement'), obs=dict(granularity='weight', criteria='obs'))

@pytest.mark.parametrize('first', [None,20], ids=['fresh','again'])
@pytest.mark.parametrize('way', ['sparsify_model','sparsify_layer','sparsify_below','update'])
@pytest.mark.parametrize('kind', SPARSE)
def test_a_sparsifier_whose_repair_fails(kind, way, first, monkeypatch):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        o = Sparsifier(model, data=[torch.randn(4, 3, 8, 8) for _ in range(2)], repair=True, **SPARSE[kind])
        for p in model.parameters(): p.detach().add_(.01*torch.randn(p.shape))
        return o
    def call(o, how, n):
        if how=='sparsify_layer': return o.sparsify_layer('0', n)
        if how=='sparsify_below': return o.sparsify_below(float(torch.cat([*o._scores(o.layers).values()]).double().quantile(n/100)))
        getattr(o, how)(n)
    if kind=='obs' and way in ('update','sparsify_below'): return  # data are looked at by a percentage
    o,other = made(),made()
    for x in (o,other) if first else (): call(x, 'sparsify_model' if way=='sparsify_layer' else way, first)
    before = of_sparsifier(o)
    with monkeypatch.context() as m:
        m.setattr('fasterai.sparse.sparsifier.Teacher.repair', fails)
        with pytest.raises(ValueError, match='no repair'): call(o, way, 50)
    assert equal(before, of_sparsifier(o))
    o.apply_masks()
    assert equal(before['params'], of_sparsifier(o)['params'])
    for x in (o,other): call(x, way, 50)
    assert equal(of_sparsifier(o), of_sparsifier(other)) and o.reached()>before['reached']

def test_data_that_cannot_repair_leave_no_zeros():
    torch.manual_seed(0)
    for bad in (torch.full((2, 6), torch.nan), torch.randn(2, 5)):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError): Sparsifier(model, layer_type=nn.Linear, data=[torch.randn(2, 6),bad], repair=True).sparsify_model(50)
        assert same(before, model.parameters())

# --- data that come once, as a stream, or are none

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Added(nn.Conv2d(8, 8, 3, padding=1)), Added(nn.Conv2d(8, 8, 3, padding=1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
class Added(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x): return x+self.inner(x).relu()

def pictures():
    torch.manual_seed(1)
    return [torch.randn(4, 3, 8, 8) for _ in range(3)]

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, batches): self.batches = batches
    def __iter__(self): return iter(self.batches)

def cut(model, **how):
    Pruner(model, 40, progress=False, **how).prune_model()
    return model
def sparse(model, **how):
    Sparsifier(model, **how).sparsify_model(50)
    return model
def mended(model, data):
    teacher = copy.deepcopy(model)
    Pruner(model, 40, example_inputs=pictures()[0], progress=False).prune_model()
    repair(model, teacher, data, progress=False)
    return model
def dropped(model, **how):
    drop_blocks(model, 1, progress=False, **how)
    return model

DOORS = dict(repair=mended, obs=lambda m, d: cut(m, criteria='obs', data=d), prune=lambda m, d: cut(m, data=d, repair=True), target=lambda m, d: cut_to(m, d),
    sparse=lambda m, d: sparse(m, data=d, repair=True), sparse_obs=lambda m, d: sparse(m, criteria='obs', data=d), wanda=lambda m, d: sparse(m, criteria='wanda', data=d),
    drop=lambda m, d: dropped(m, data=d), drop_repair=lambda m, d: dropped(m, data=d, repair=True), fc=lambda m, d: FC_Decomposer().decompose(m, .5, data=d, repair=True))
def cut_to(model, data):
    Pruner(model, params='1.5x', data=data, repair=True, progress=False).prune_model()
    return model

@pytest.mark.parametrize('door', DOORS)
def test_once_and_as_a_stream_is_as_a_list(door):
    want = DOORS[door](small(), pictures())
    kinds = dict(once=lambda: (o for o in pictures()), stream=lambda: torch.utils.data.DataLoader(Stream(pictures()), None))
    for kind in kinds.values():
        found = DOORS[door](small(), kind())
        assert same([*want.state_dict().values()], [*found.state_dict().values()])

def test_influence_of_a_stream():
    stream = torch.utils.data.DataLoader(Stream(pictures()), None)
    assert block_influence(small(), stream, progress=False).equals(block_influence(small(), pictures(), progress=False))

NONE = dict(none=([None], 'batch 0 of data has no inputs'), some=([torch.randn(2, 3, 8, 8),None], 'batch 1 of data has no inputs'), targets=([(None,torch.zeros(2))], 'batch 0 of data has no inputs'),
    number=(5, 'data are batches'), function=(pictures, 'data are batches'), type_=(list, 'data are batches'), word=('train', 'data are batches'),
    meta=([torch.randn(2, 3, 8, 8, device='meta')], 'on the meta device'))
REPAIRED = [k for k in DOORS if k not in ('obs','sparse_obs','wanda')]

@pytest.mark.parametrize('kind', NONE)
@pytest.mark.parametrize('door', REPAIRED)
def test_no_batches(door, kind):
    data,why = NONE[kind]
    model = small()
    with pytest.raises(ValueError) as e: DOORS[door](model, data)
    assert door not in ('repair','drop','drop_repair') or why in str(e.value)
    if door!='repair': assert same([*model.state_dict().values()], [*small().state_dict().values()])

@pytest.mark.parametrize('door', REPAIRED)
def test_a_later_batch_that_does_not_fit(door):
    model = small()
    with pytest.raises(ValueError, match='does not run with data'): DOORS[door](model, [*pictures(),torch.randn(4, 2, 8, 8)])
    if door!='repair': assert same([*model.state_dict().values()], [*small().state_dict().values()])

# --- steps

@pytest.mark.parametrize('criteria', ['obs','wanda','taylor'])
@pytest.mark.parametrize('call', ['update','step'])
def test_steps_learn_from_data(criteria, call):
    "As `prune_model` does; each step from the network as it is then"
    data = [(x,torch.zeros(4, dtype=torch.long)) for x in pictures()]
    found = []
    for n in (0,1):
        model = small()
        p = Pruner(model, 50, criteria=criteria, data=data, progress=False)
        if n: assert getattr(p, call)(50)
        else: p.prune_model()
        found.append([*model.state_dict().values()])
    assert same(*found)
    model = small()
    p = Pruner(model, 50, criteria=criteria, data=data, progress=False)
    for o in (20,50): assert getattr(p, call)(o)>0
    assert p.reached()==50 and [o.shape for o in model.parameters()]==[o.shape for o in found[0] if o.dim()]

def test_a_batch_that_was_looked_at_comes_first():
    "Data are for what nothing is known of"
    model = small()
    p = Pruner(model, 50, criteria='wanda', example_inputs=pictures()[0], progress=False)
    p.start()
    p.look(pictures()[0])
    known = {k:v.clone() for k,v in p.about.found['act'].items()}
    p.data = [torch.zeros(4, 3, 8, 8)]
    seen = []
    p._learn = lambda: seen.append(1)
    p.update(50)
    assert known and not seen

def test_two_inputs_by_name_are_those_that_run_a_decomposition():
    "No size is looked for, where data tell it"
    data = by_name()
    model = two()
    decomposer = FC_Decomposer()
    new = decomposer.decompose(model, .5, data=data, repair=True)
    assert decomposer.ranks and decomposer.repaired is not None and new(**data[0]).shape==(32,3)
    with_target = FC_Decomposer().decompose(model, .5, data=[(o,torch.zeros(32)) for o in data], repair=True)
    assert same([*new.state_dict().values()], [*with_target.state_dict().values()])
    with pytest.raises(ValueError, match='does not run with data'): FC_Decomposer().decompose(model, .5, data=[dict(p=torch.randn(3, 6), q=torch.randn(3, 4))], repair=True)

class Helped(nn.Module):
    "Has a head that runs in training alone"
    def __init__(self, helped=True):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.b,self.out = nn.Conv2d(3,8,3),nn.Conv2d(8,8,3),nn.Linear(8,5)
        self.aux = nn.Linear(8,5) if helped else None
    def forward(self, x):
        x = torch.relu(self.a(x))
        y = self.out(torch.relu(self.b(x)).mean((2,3)))
        return (y,self.aux(x.mean((2,3)))) if self.training and self.aux is not None else y

def test_heads_of_training_alone():
    "They are cut to fit, and what goes is told by what the model gives"
    x,plain,helped = torch.randn(16,3,8,8),Helped(False).eval(),Helped().eval()
    for m in (plain,helped): Pruner(m, 50, criteria='obs', data=x, repair=True).prune_model()
    assert helped.aux.in_features==4 and torch.equal(helped.a.weight, plain.a.weight)
    assert len(helped.train()(x))==2
