"What a step of training takes away is repaired at once by what the network gave before it, in a loop, in fastai, Lightning and transformers"
import copy, pickle, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fasterai.core.pace import Training, attach
from fasterai.prune.all import Prune, PruneCallback, Pruner
from fasterai.repair.all import Repair, RepairCallback, repair
from fasterai.sparse.all import SparsifyCallback
from tiny import At, X, Y, convs, fit, learner, net, zeros

def differs(a, b):
    with torch.no_grad(): return (a.eval()(X)-b.eval()(X)).square().mean().item()

LOSSES = dict(prune=lambda: PruneCallback(50, 'lin', n_updates=2), sparsify=lambda: SparsifyCallback(60, schedule='lin', n_updates=2), filters=lambda: SparsifyCallback(50, 'filter', coupled=True, n_updates=2))

@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('first', [True,False])
def test_closer_than_without(kind, first):
    "Without training, a network that is repaired stays closer to what it was, whichever callback is named first"
    found = []
    for more in (False,True):
        learn = learner()
        was = copy.deepcopy(learn.model)
        for _ in range(2): was.train()(X), learn.model.train()(X)  # statistics of norms
        cbs = [LOSSES[kind](),*([RepairCallback()] if more else [])]
        fit(learn, 1, cbs[::-1] if first else cbs, lr=0.)
        found.append(differs(learn.model, was))
    assert found[1]<.8*found[0]

@pytest.mark.parametrize('kind', LOSSES)
def test_target_is_reached(kind):
    "Zeros stay zero and channels gone, in a fit that trains"
    cb,mend = LOSSES[kind](),RepairCallback()
    learn,bare = learner(),learner()
    fit(learn, 2, [cb,mend])
    fit(bare, 2, LOSSES[kind]())
    assert zeros(learn.model)==zeros(bare.model) and [p.shape for p in learn.model.parameters()]==[p.shape for p in bare.model.parameters()]
    assert len(mend.repaired) and all(p.isfinite().all() for p in learn.model.parameters())

def test_optimizer_goes_on():
    "Parameters are the objects that they were, and the optimizer knows them as it would without a repair"
    learn = learner()
    params = [*learn.model.parameters()]
    fit(learn, 2, [LOSSES['prune'](),RepairCallback()])
    assert all(a is b for a,b in zip(params, learn.model.parameters()))
    for ps in learn.opt.param_lists:
        for p in ps: assert all(v.shape==p.shape for v in learn.opt.state[p].values() if isinstance(v, torch.Tensor) and v.dim())

def test_only_where_something_goes(monkeypatch):
    "As often as something is removed"
    import fasterai.repair.training as module
    n = []
    teacher = module.Teacher
    class Counted(teacher):
        def repair(self, model):
            n.append(1)
            return super().repair(model)
    monkeypatch.setattr(module, 'Teacher', Counted)
    fit(learner(), 2, [PruneCallback(50, 'lin', n_updates=2),RepairCallback()])
    assert len(n)==2
    n.clear()
    fit(learner(), 2, [PruneCallback(50, 'one_shot'),RepairCallback()])
    assert len(n)==1

def test_data():
    "Inputs that are given are used instead of those that were seen; of these the last few are kept, for the fit"
    seen = learner()
    mend = RepairCallback(n_batches=3)
    lengths = []
    fit(seen, 2, [LOSSES['prune'](),mend,At('after_step', lambda o: lengths.append(len(mend.technique.seen)), order=80)])
    assert max(lengths)==3 and not mend.technique.seen
    given = learner()
    fit(given, 2, [LOSSES['prune'](),cb := RepairCallback(data=[X[:16],X[16:32]])])
    assert len(cb.repaired) and not cb.technique.seen

def test_as_repair_does():
    "One cut in a loop is what `repair` gives with the network from before as the teacher"
    model = net()
    other = copy.deepcopy(model).eval()
    opt = torch.optim.SGD(model.parameters(), lr=0.)
    model.eval()
    with attach(Prune(50, 'one_shot'), Training(model, opt, sample=lambda: (X[:2],)), 1), attach(Repair(data=X), Training(model, opt), 1):
        F.cross_entropy(model(X), Y).backward()
        opt.step()
    teacher = copy.deepcopy(other)
    Pruner(other, 50, example_inputs=X[:2]).prune_model()
    repair(other, teacher, X)
    assert all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), other.state_dict().values()))

def test_a_teacher_that_was_cut():
    "Channels are those of the original network: a copy from the middle has lost some already"
    model = net()
    pruner = Pruner(model, 60, example_inputs=X[:2])
    pruner.update(25)
    teacher = copy.deepcopy(model)
    pruner.update(60)
    before = differs(model, teacher)
    table = repair(model, teacher, X)
    assert differs(model, teacher)<.5*before and (table.after.dropna()<=table.before.dropna()).all()
    with pytest.raises(ValueError, match='the teacher must be a copy from before'): repair(teacher, model, X)

def test_told():
    with pytest.warns(UserWarning, match='RepairCallback had nothing to repair'): fit(learner(), 1, RepairCallback())
    for cbs in (lambda a, b: [a,b], lambda a, b: [b,a]):
        with pytest.raises(ValueError, match='rewinds weights after each round'): fit(learner(), 1, cbs(SparsifyCallback(50, lth=True), RepairCallback()))
    with pytest.raises(ValueError, match='n_batches is a whole number'): RepairCallback(n_batches=0)
    with pytest.raises(ValueError, match='repair in one process'): Repair().check(Training(net(), world=2))

def test_nothing_is_left():
    "Neither batches nor a teacher, and it can be pickled"
    fit(learner(), 1, [LOSSES['prune'](),cb := RepairCallback()])
    assert cb.technique.teacher is None and not cb.technique.seen
    technique = Repair(n_batches=5)
    assert pickle.loads(pickle.dumps(technique)).seen.maxlen==5

def test_lightning(tmp_path):
    pl = pytest.importorskip('lightning.pytorch')
    from fasterai.lightning import PruneCallback, RepairCallback
    from torch.utils.data import DataLoader, TensorDataset
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()
        def training_step(self, batch, i): return F.cross_entropy(self.net(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-2)
    loader = lambda: DataLoader(TensorDataset(X.cpu(), Y.cpu()), batch_size=8)
    quiet = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path, max_epochs=2)
    m = Module()
    pl.Trainer(callbacks=[cb := RepairCallback(),PruneCallback(50, 'lin', n_updates=2)], **quiet).fit(m, loader())
    assert cb.repaired is not None and [o.out_channels for o in convs(m.net)]==[4,4]
    plain = net()
    opt = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with attach(Prune(50, 'lin', n_updates=2), t := Training(plain, opt, 2, lambda: (X[:2],)), 12), attach(Repair(), t, 12):
        for _ in range(2):
            for x,y in loader():
                opt.zero_grad()
                F.cross_entropy(plain(x), y).backward()
                opt.step()
    assert all(torch.equal(a, b) for a,b in zip(plain.state_dict().values(), m.net.state_dict().values()))

def test_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    from fasterai.transformers import RepairCallback, SparsifyCallback
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    data = [dict(input_ids=torch.randint(30, (8,)), attention_mask=torch.ones(8, dtype=torch.long), labels=i%3) for i in range(24)]
    args = transformers.TrainingArguments(str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, report_to=[], save_strategy='no', logging_strategy='no', disable_tqdm=True, use_cpu=True)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='not repaired')
        transformers.Trainer(model, args, train_dataset=data, callbacks=[SparsifyCallback(50, schedule='lin', layer_type=nn.Linear, n_updates=2),cb := RepairCallback()]).train()
    assert (cb.repaired.after.dropna()<=cb.repaired.before.dropna()).all()
    assert sum(int((m.weight==0).sum()) for m in model.modules() if isinstance(m, nn.Linear))==sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))//2

BAD = dict(nan=[X[:8],X[8:16]*float('nan')], channels=[X[:8],torch.cat([X,X], 1)[:8]], none=[X[:8]*float('inf')])

@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('kind', LOSSES)
def test_data_that_cannot_repair_cost_nothing(kind, bad):
    "They are refused before anything is taken away"
    learn = learner()
    before = copy.deepcopy(learn.model)
    with pytest.raises(ValueError, match='not all finite|does not run with'): fit(learn, 1, [LOSSES[kind](),RepairCallback(data=BAD[bad])], lr=0.)
    assert all(torch.equal(a, b) for a,b in zip(before.parameters(), learn.model.parameters()))

def test_batches_that_come_once():
    "A generator serves each repair"
    found = []
    for data in ([X[:16],X[16:32]],(o for o in (X[:16],X[16:32]))):
        learn = learner()
        fit(learn, 2, [LOSSES['prune'](),RepairCallback(data=data)], lr=0.)
        found.append(learn.model.state_dict())
    assert all(torch.equal(a, b) for a,b in zip(*(o.values() for o in found)))
    for data in ([],5,[None]):
        with pytest.raises(ValueError, match='data'): RepairCallback(data=data)
