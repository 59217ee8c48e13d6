"""In Lightning: the same masks as in a loop of one's own, and checkpoints that go on with the same bits"""
import copy, logging, pickle
from functools import partial
import pytest, torch
import lightning.pytorch as pl
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from fasterai.core.all import *
from fasterai.core.pace import Training, _told, attach
from fasterai.core.schedule import Schedule, sched_iterative
from fasterai.core.plan import pruned_plan
from fasterai.distill.training import Distill
from fasterai.lightning import *
from fasterai.prune.training import Prune
from fasterai.quantize.training import Share
from fasterai.regularize.training import GroupRegularize, Regularize
from fasterai.sparse.training import Keep, Sparsify
from tiny import Small as Net

logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings('ignore:.*does not have many workers', 'ignore:.*GPU available', 'ignore:Checkpoint directory')

torch.manual_seed(0)
X,Y = torch.randn(40, 1, 8, 8),torch.randint(0, 4, (40,))

class Inside(pl.LightningModule):
    "A network in a module, which runs it"
    def __init__(self, opt=torch.optim.AdamW, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.net,self.opt,self.kwargs = Net(),opt,kwargs
    def training_step(self, batch, i):
        x,y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log('loss', loss)
        return loss
    def configure_optimizers(self): return self.opt(self.parameters(), lr=1e-2, **self.kwargs)

class Itself(pl.LightningModule, Net):
    "A module that is the network"
    def __init__(self):
        pl.LightningModule.__init__(self)
        torch.manual_seed(0)
        net = Net()
        for n,m in net.named_children(): setattr(self, n, m)
    forward = Net.forward
    def training_step(self, batch, i): return F.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-2)

def data(): return DataLoader(TensorDataset(X, Y), batch_size=8)
def trainer(path, epochs=4, **kwargs):
    quiet = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=path)
    return pl.Trainer(max_epochs=epochs, **(dict(enable_checkpointing=False) | quiet | kwargs))

TECHNIQUES = dict(
    sparsify=(SparsifyCallback, Sparsify, (60,'weight','global','movement','agp'), {}),
    filters=(SparsifyCallback, Sparsify, (50,'filter'), dict(coupled=True)),
    updates=(SparsifyCallback, Sparsify, (70,'filter','local','updating_movement','lin'), dict(n_updates=7)),
    taylor=(SparsifyCallback, Sparsify, (60,'weight','global','taylor','cos'), {}),
    wanda=(SparsifyCallback, Sparsify, (60,'weight','local','wanda','lin'), dict(n_updates=8)),
    tickets=(SparsifyCallback, Sparsify, (60,), dict(schedule='iterative', lth=True)),
    keep=(KeepSparsity, Keep, (), {}),
    prune=(PruneCallback, Prune, (50,'lin'), dict(criteria='movement', n_updates=8)),
    share=(KMeansCallback, Share, (2,), {}),
    penalty=(RegularizeCallback, Regularize, ('group_lasso','filter',1e-2), dict(schedule='lin')),
    penalty_paper=(RegularizationCallback, GroupRegularize, ('filter',1e-2), {}))

def prepared(module, name):
    net = getattr(module, 'net', module)
    if name=='keep': net.b.weight.data[:5] = 0
    return net

def loop(make, net, epochs=4):
    "The same with plain PyTorch"
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with attach(technique := make(), Training(net, opt, epochs, lambda: (X[:2],)), 5*epochs):
        for i in range(epochs):
            for x,y in data():
                opt.zero_grad()
                F.cross_entropy(net(x), y).backward()
                opt.step()
    return net

def same(a, b):
    a,b = a.state_dict(),b.state_dict()
    return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('module', [Inside,Itself])
@pytest.mark.parametrize('name', TECHNIQUES)
def test_as_a_plain_loop(name, module, tmp_path):
    callback,technique,args,kwargs = TECHNIQUES[name]
    m = module()
    net = prepared(m, name)
    trainer(tmp_path, callbacks=callback(*args, **kwargs)).fit(m, data())
    m2 = Inside()
    want = loop(lambda: technique(*args, **kwargs), prepared(m2, name))
    assert same(want, nn.Module.requires_grad_(net)) if module is Inside else all(torch.equal(v, dict(net.state_dict())[k]) for k,v in want.state_dict().items())
    assert not net._forward_pre_hooks and not net._state_dict_hooks and not net._load_state_dict_pre_hooks

@pytest.mark.parametrize('name', [*TECHNIQUES])
def test_resume(name, tmp_path):
    callback,technique,args,kwargs = TECHNIQUES[name]
    whole,first,again = Inside(),Inside(),Inside()
    for m in (whole,first,again): prepared(m, name)
    trainer(tmp_path, callbacks=callback(*args, **kwargs)).fit(whole, data())
    save = pl.callbacks.ModelCheckpoint(tmp_path/'c', save_top_k=-1, every_n_epochs=1, filename='{epoch}', save_on_train_epoch_end=True)
    trainer(tmp_path, callbacks=[callback(*args, **kwargs), save], enable_checkpointing=True).fit(first, data())
    assert same(whole.net, first.net)
    torch.manual_seed(5)
    for p in again.parameters(): p.data.normal_()
    trainer(tmp_path, callbacks=callback(*args, **kwargs)).fit(again, data(), ckpt_path=tmp_path/'c'/'epoch=1.ckpt', weights_only=False)
    assert same(whole.net, again.net)
    if name=='prune': assert pruned_plan(again.net)==pruned_plan(whole.net) and again.net.a.out_channels==6

def test_clipped_accumulated_and_with_a_closure(tmp_path):
    "Gradients of shared values are summed after clipping; steps are the optimizer's"
    m = Inside(torch.optim.SGD, momentum=.9)
    trainer(tmp_path, callbacks=[KMeansCallback(2), SparsifyCallback(50, schedule='lin')], gradient_clip_val=.1, accumulate_grad_batches=2).fit(m, data())
    want = Inside().net
    opt = torch.optim.SGD(want.parameters(), lr=1e-2, momentum=.9)
    share,sparse = Share(2),Sparsify(50, schedule='lin')
    training = Training(want, opt, 4, lambda: (X[:2],))
    with attach(share, training, 12), attach(sparse, training, 12):
        for _ in range(4):
            opt.zero_grad()
            for i,(x,y) in enumerate(data()):
                (F.cross_entropy(want(x), y)/2).backward()
                if i%2==0 and i<4: continue
                torch.nn.utils.clip_grad_norm_(want.parameters(), .1)
                opt.step()
                opt.zero_grad()
    assert same(want, m.net)
    assert max(len(o.weight.unique()) for o in (want.a,want.b,want.c))<=5

def test_logged(tmp_path):
    t = trainer(tmp_path, 2, callbacks=[SparsifyCallback(50), RegularizationCallback('filter')])
    t.fit(Inside(), data())
    assert t.callback_metrics['sparsity']==50 and t.callback_metrics['penalty']>0

def test_told(tmp_path):
    class Two(Inside):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r'without a `forward` holds 2 networks \(net, other\)'): trainer(tmp_path, callbacks=SparsifyCallback(50)).fit(Two(), data())
    with pytest.raises(ValueError, match='needs to know how long training is'): trainer(tmp_path, -1, callbacks=SparsifyCallback(50)).fit(Inside(), data())
    with pytest.raises(ValueError, match='SparsifyCallback holds masks of weights, whose shapes PruneCallback changes'):
        trainer(tmp_path, callbacks=[SparsifyCallback(50), PruneCallback(50)]).fit(Inside(), data())
    with pytest.raises(ValueError, match="did you mean 'filter'"): trainer(tmp_path, callbacks=SparsifyCallback(50, 'filtr')).fit(Inside(), data())
    m = Inside()
    class Halt(pl.Callback):
        def on_train_batch_end(self, t, *args):
            if t.global_step==7: raise RuntimeError('stop')
    with pytest.raises(RuntimeError, match='stop'): trainer(tmp_path, callbacks=[SparsifyCallback(50), Halt()]).fit(m, data())
    assert not m.net._forward_pre_hooks
    class Early(pl.Callback):
        def on_train_batch_end(self, t, *args):
            if t.global_step==7: t.should_stop = True
    with pytest.warns(UserWarning, match='training ended after step 7 of 20, before the schedule of SparsifyCallback did'): trainer(tmp_path, callbacks=[SparsifyCallback(50), Early()]).fit(m, data())

def test_several(tmp_path):
    "Two of a kind have states of their own"
    def two(): return [SparsifyCallback(50, 'weight', criteria=movement, layer_type=nn.Linear), SparsifyCallback(30, 'filter', criteria='updating_movement')]
    assert len({o.state_key for o in two()})==2 and [o.state_key for o in two()]==[o.state_key for o in two()]
    whole,again = Inside(),Inside()
    save = pl.callbacks.ModelCheckpoint(tmp_path/'c', save_top_k=-1, every_n_epochs=1, filename='{epoch}', save_on_train_epoch_end=True)
    trainer(tmp_path, callbacks=[*two(), save], enable_checkpointing=True).fit(whole, data())
    trainer(tmp_path, callbacks=two()).fit(again, data(), ckpt_path=tmp_path/'c'/'epoch=2.ckpt', weights_only=False)
    assert same(whole.net, again.net)

# --- a teacher

def teacher():
    torch.manual_seed(1)
    return Net(20)

def distilled(technique, net, epochs=4):
    "The same with plain PyTorch"
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with attach(technique, Training(net, opt, epochs), 5*epochs, adds=False) as steps:
        for i in range(epochs):
            for x,y in data():
                if not steps.k: torch.manual_seed(7)
                opt.zero_grad()
                with technique.seen(net) as seen: loss = F.cross_entropy(net(x), y)
                technique.compare_seen((steps.k+1)/steps.n, seen)
                technique.mixed((steps.k+1)/steps.n, loss).backward()
                opt.step()
    return net

class Seed(pl.Callback):
    "Adapters begin at random"
    def on_train_batch_start(self, trainer, *args):
        if not trainer.global_step: torch.manual_seed(7)

KD = dict(logits={}, maps=dict(loss=['SoftTarget','FitNet'], activations_student=['a','b'], activations_teacher=['a','b'], weight=.7, schedule='cos'))

@pytest.mark.parametrize('module', [Inside,Itself])
@pytest.mark.parametrize('how', KD)
def test_teacher(how, module, tmp_path):
    m = module()
    net = getattr(m, 'net', m)
    t = trainer(tmp_path, callbacks=[Seed(), KnowledgeDistillationCallback(teacher(), **KD[how])])
    t.fit(m, data())
    want = distilled(Distill(teacher(), **KD[how]), Inside().net)
    assert all(torch.equal(v, dict(net.state_dict())[k]) for k,v in want.state_dict().items())
    assert 'training_step' not in vars(m) and not any(o._forward_hooks for o in m.modules()) and {'task','SoftTarget'}<=t.callback_metrics.keys()

def test_teacher_resumed(tmp_path):
    cb = lambda: KnowledgeDistillationCallback(teacher(), **KD['maps'])
    whole,again = Inside(),Inside()
    save = pl.callbacks.ModelCheckpoint(tmp_path/'c', save_top_k=-1, every_n_epochs=1, filename='{epoch}', save_on_train_epoch_end=True)
    trainer(tmp_path, callbacks=[cb(), save], enable_checkpointing=True).fit(whole, data())
    trainer(tmp_path, callbacks=cb()).fit(again, data(), ckpt_path=tmp_path/'c'/'epoch=1.ckpt', weights_only=False)
    assert same(whole.net, again.net)

# --- what Lightning has of its own

class Manual(Inside):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
    def training_step(self, batch, i):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        opt.step()

def test_manual_optimization(tmp_path):
    m = Manual()
    trainer(tmp_path, callbacks=SparsifyCallback(50)).fit(m, data())
    assert int((m.net.a.weight==0).sum())==m.net.a.weight.numel()//2
    for cb in (RegularizationCallback('filter', 1.), KnowledgeDistillationCallback(teacher())):
        with pytest.raises(ValueError, match='which manual optimization does not use'): trainer(tmp_path, callbacks=cb).fit(Manual(), data())

def test_errors_of_others_are_theirs(tmp_path):
    class Fails(Inside):
        def validation_step(self, batch, i): raise KeyError('mine')
    with pytest.raises(KeyError, match='mine'): trainer(tmp_path, callbacks=SparsifyCallback(50)).validate(Fails(), data(), verbose=False)

def test_a_pruned_checkpoint_is_loaded(tmp_path):
    class Predicts(Inside):
        def predict_step(self, batch, i): return self.net(batch[0])
    t = trainer(tmp_path, callbacks=PruneCallback(50))
    t.fit(m := Predicts(), data())
    t.save_checkpoint(tmp_path/'p.ckpt')
    got = trainer(tmp_path, callbacks=PruneCallback(50)).predict(Predicts(), data(), ckpt_path=tmp_path/'p.ckpt', weights_only=False)
    small = cut_like(Predicts(), tmp_path/'p.ckpt')
    assert small.net.a.out_channels==6 and torch.equal(torch.cat(got), m.eval().net(X)) and torch.equal(small.eval().net(X), m.net(X))

def test_told_at_the_start(tmp_path):
    class EMA(pl.callbacks.WeightAveraging):
        pass
    with pytest.warns(UserWarning, match='EMA averages weights of earlier steps'): trainer(tmp_path, callbacks=[SparsifyCallback(50), EMA()]).fit(Inside(), data())
    save = pl.callbacks.ModelCheckpoint(tmp_path/'c', save_top_k=-1, every_n_epochs=1, filename='{epoch}', save_on_train_epoch_end=True)
    trainer(tmp_path, 2, callbacks=save, enable_checkpointing=True).fit(Inside(), data())
    with pytest.warns(UserWarning, match='after step 5, but the earlier state of SparsifyCallback is not known'):
        trainer(tmp_path, callbacks=SparsifyCallback(50)).fit(Inside(), data(), ckpt_path=tmp_path/'c'/'epoch=0.ckpt', weights_only=False)

def test_the_next_model_is_regularized(tmp_path):
    "A callback whose training was interrupted"
    cb = RegularizationCallback('filter', 1.)
    class Halt(pl.Callback):
        def on_train_batch_end(self, t, *args): raise RuntimeError('stop')
    with pytest.raises(RuntimeError, match='stop'): trainer(tmp_path, callbacks=[cb, Halt()]).fit(Inside(), data())
    a,b = Inside(),Inside()
    trainer(tmp_path, callbacks=cb).fit(a, data())
    trainer(tmp_path, callbacks=RegularizationCallback('filter', 1.)).fit(b, data())
    assert same(a.net, b.net)

class ByName(Inside):
    "Batches are dicts, and the module takes one of their entries"
    def forward(self, x): return self.net(x)
    def training_step(self, batch, i): return F.cross_entropy(self(x=batch['image']), batch['label'])

def test_batches_by_name(tmp_path):
    "What the network gets is compared, whatever the batch is"
    rows = DataLoader([dict(image=x, label=y) for x,y in zip(X, Y)], batch_size=8)
    a,b = ByName(),Inside()
    maps = dict(KD['maps'], activations_student=['net.a','net.b'])
    trainer(tmp_path, callbacks=[Seed(), KnowledgeDistillationCallback(teacher(), **maps)]).fit(a, rows)
    trainer(tmp_path, callbacks=[Seed(), KnowledgeDistillationCallback(teacher(), **KD['maps'])]).fit(b, data())
    assert same(a.net, b.net)

@pytest.mark.parametrize('how', [dict(max_epochs=-1, max_steps=20), dict(max_epochs=10, max_steps=20), dict(max_epochs=4), dict(max_epochs=-1, max_steps=10, accumulate_grad_batches=2), dict(max_epochs=-1, max_steps=17)])
def test_epochs_to_rewind_to(tmp_path, how):
    "There are as many as will be run, whatever says so"
    def run(epoch, batches=None):
        m = Inside()
        common = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path)
        pl.Trainer(callbacks=SparsifyCallback(50, schedule=Schedule(sched_iterative, .8), lth=True, rewind_epoch=epoch), **common, **how).fit(m, data() if batches is None else batches)
        return m
    assert int((run(3).net.a.weight==0).sum())==run(3).net.a.weight.numel()//2
    for wrong in (4, 9):
        with pytest.raises(ValueError, match=f'rewind_epoch {wrong} is not one of the 4 epochs'): run(wrong)
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(zip(X, Y))
    stream = DataLoader(Stream(), batch_size=8)
    if how['max_epochs']==4:
        with pytest.raises(ValueError, match='SparsifyCallback needs to know how long training is, but the data have no length: give the Trainer max_steps'): run(0, stream)
    elif how['max_epochs']==-1:  # nobody knows how long an epoch will be
        with pytest.warns(UserWarning, match='SparsifyCallback did not rewind: training ended before rewind_epoch 8 began'): run(8, stream)

class Later(Inside):
    "Its network is made when training begins"
    def __init__(self):
        pl.LightningModule.__init__(self)
        self.opt,self.kwargs = torch.optim.AdamW,{}
    def configure_model(self):
        if 'net' in self._modules: return
        torch.manual_seed(0)
        self.net = Net()

@pytest.mark.parametrize('make', [lambda: SparsifyCallback(60,'weight','global','movement','agp'), lambda: PruneCallback(50,'lin',n_updates=8), lambda: KMeansCallback(2)])
def test_a_network_that_is_made_later(tmp_path, make):
    save = pl.callbacks.ModelCheckpoint(tmp_path/'c', save_top_k=-1, every_n_epochs=1, filename='{epoch}', save_on_train_epoch_end=True)
    a,b,again = Inside(),Later(),Later()
    trainer(tmp_path, callbacks=make()).fit(a, data())
    trainer(tmp_path, callbacks=[make(), save], enable_checkpointing=True).fit(b, data())
    trainer(tmp_path, callbacks=make()).fit(again, data(), ckpt_path=tmp_path/'c'/'epoch=1.ckpt', weights_only=False)
    assert same(a.net, b.net) and same(a.net, again.net) and not again._load_state_dict_pre_hooks

def test_two_teachers(tmp_path):
    "Each has a state of its own, also two of one class and shape"
    def teachers():
        torch.manual_seed(1)
        return [KnowledgeDistillationCallback(o, **KD['maps']) for o in (Net(20), Net(20), Net(16))]
    assert len({o.state_key for o in teachers()})==3 and [o.state_key for o in teachers()]==[o.state_key for o in teachers()]
    save = pl.callbacks.ModelCheckpoint(tmp_path/'c', save_top_k=-1, every_n_epochs=1, filename='{epoch}', save_on_train_epoch_end=True)
    a,b = Inside(),Inside()
    trainer(tmp_path, callbacks=[*teachers(), save], enable_checkpointing=True).fit(a, data())
    trainer(tmp_path, callbacks=teachers()).fit(b, data(), ckpt_path=tmp_path/'c'/'epoch=1.ckpt', weights_only=False)
    assert same(a.net, b.net)

@pytest.mark.parametrize('event', ['on_train_epoch_end', 'on_train_batch_end'])
@pytest.mark.parametrize('make', [lambda: SparsifyCallback(50), KeepSparsity, lambda: PruneCallback(50), lambda: KMeansCallback(2), lambda: KnowledgeDistillationCallback(teacher()), lambda: RegularizationCallback('filter')])
def test_added_in_the_middle_of_a_fit(tmp_path, make, event):
    cb = make()
    class Adds(pl.Callback): pass
    def add(self, t, *args):
        if cb not in t.callbacks: t.callbacks.append(cb)
    setattr(Adds, event, add)
    with pytest.raises(RuntimeError, match=f'{type(cb).__name__} was added in the middle of a fit'): trainer(tmp_path, callbacks=Adds()).fit(Inside(), data())

@pytest.mark.parametrize('make', [lambda: SparsifyCallback(50), lambda: PruneCallback(50), lambda: RegularizationCallback('filter'), lambda: KnowledgeDistillationCallback(teacher(), **KD['maps'])])
def test_the_module_travels(tmp_path, make):
    "In the middle of a fit, a module can be pickled and copied, and what comes out has a step of its own"
    found = []
    class Copies(pl.Callback):
        def on_train_batch_end(self, t, m, *args): found.extend([pickle.loads(pickle.dumps(m)), copy.deepcopy(m)]) if not found else None
    m = Inside()
    trainer(tmp_path, callbacks=[make(), Copies()]).fit(m, data())
    for o in found:
        assert o.training_step.__self__ is o and o.net is not m.net
        o.training_step = None

class Far:
    def __call__(self, w, w0): return (w-w0).abs()
def further(w, w0, p=2): return (w-w0).abs()**p

@pytest.mark.parametrize('criteria', ['Far()', 'partial(further, p=2)', 'further', 'lambda w: w.abs()', 'Far().__call__'])
def test_words_without_addresses(criteria):
    "What a state goes by is the same in another process, whatever is among the arguments"
    def asked(around): return SparsifyCallback(50, criteria=eval(criteria), schedule=Schedule(around), save_tickets=False).asked
    made = [asked(sched_iterative),[object() for _ in range(100)],asked(sched_iterative)]
    assert made[0]==made[2] and '0x' not in made[0]
    for o in ([eval(criteria)], {'a':eval(criteria)}, (eval(criteria),), {'b','a','c'}): assert ' at 0x' not in _told(o)
    assert _told({'b','a','c'})=='{a, b, c}' and _told([1,'a'])=="[1, 'a']"

def test_callbacks_show_what_their_technique_has():
    "The same attributes in each engine"
    from fasterai import lightning, transformers
    from fasterai.distill.all import KnowledgeDistillationCallback
    from fasterai.prune.all import PruneCallback
    from fasterai.quantize.all import KMeansCallback
    from fasterai.regularize.all import RegularizeCallback
    from fasterai.repair.all import RepairCallback
    from fasterai.sparse.all import SparsifyCallback
    n = 0
    for cls in (SparsifyCallback,PruneCallback,KMeansCallback,RegularizeCallback,RepairCallback,KnowledgeDistillationCallback):
        assert cls.make.shown
        for engine in (cls,*(vars(o)[cls.__name__] for o in (lightning,transformers) if cls.__name__ in vars(o))):
            for k,doc in cls.make.shown.items():
                assert getattr(engine, k).__doc__==doc
                n += 1
    assert n==25  # a Trainer distills in its loss, without a callback
    cb = lightning.PruneCallback(50)
    cb.technique.left = 'a row'
    assert cb.left=='a row'
