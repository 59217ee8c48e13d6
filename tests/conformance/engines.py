"""One training, driven by each engine: the same network, batches, optimizer and technique"""
import logging, sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import Small as Net

N,BS,EPOCHS = 32,8,3
STEPS = N//BS # batches in an epoch
_gen = torch.Generator().manual_seed(0)
X,Y = torch.randn(N, 1, 8, 8, generator=_gen),torch.randint(0, 4, (N,), generator=_gen)

def network(tied=False, frozen=False, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(tied=tied)
    if frozen: net.b.requires_grad_(False)
    net.a.weight.data[:3] = 0  # something to keep
    return net

def optimizer(kind, params):
    made = dict(sgd=partial(torch.optim.SGD, momentum=.9, weight_decay=1e-2), adamw=partial(torch.optim.AdamW, weight_decay=1e-2))
    return made[kind]([p for p in params if p.requires_grad], lr=LR[kind])

LR = dict(sgd=.05, adamw=1e-2)

class Stop(Exception):
    "What interrupts a training"

class Watch:
    "Looks at the network after each step, when the next one begins and at the end; stops a training, and averages its weights"
    def __init__(self, look=None, stop=None, ema=False): self.look,self.stop,self.k,self.seen,self.ema,self.average = look,stop,0,[],ema,None
    def attach(self, opt, net):
        self.net = net
        if self.ema: self.average = torch.optim.swa_utils.AveragedModel(net)
        self.hook = opt.register_step_pre_hook(self.before)
    def before(self, *args):
        if self.k: self.note()
        if self.stop is not None and self.k==self.stop: raise Stop
        self.k += 1
    def note(self):
        if self.look: self.seen.append(self.look(self.net))
        if self.average is not None: self.average.update_parameters(self.net)
    def end(self):
        self.hook.remove()
        self.note()

def _with(amp): return torch.autocast('cpu', torch.bfloat16) if amp else nullcontext()
def _compiled(net, compile):
    if not compile: return net
    torch._dynamo.reset()
    return torch.compile(net, backend='eager')

# In two processes, each has a half of each batch

def world(): return dist.get_world_size() if dist.is_initialized() else 1
def part(x, i, share): # All samples; number of the batch; how they are shared: Lightning's way, that of Accelerate, or fastai's
    "What of batch `i` is for this process"
    n,r = world(),dist.get_rank()
    if share=='halves': return x.chunk(n)[r][i*BS//n:][:BS//n]
    x = x[i*BS:][:BS]
    return x[r::n] if share=='turns' else x.chunk(n)[r]

# --- a loop of one's own

def loop(technique, net, watch, folder, opt='adamw', amp=False, acc=1, clip=None, compile=False, epochs=EPOCHS, resume=None, save=None, in_loss=False, share='turns'):
    from fasterai.core.pace import Training, attach
    run,optim,at = nn.parallel.DistributedDataParallel(net) if world()>1 else _compiled(net, compile),optimizer(opt, net.parameters()),0
    if resume:
        state = torch.load(folder/resume)
        at = state['epoch']
        if 'prune.plan' in state: _cut(net, state['prune.plan'])
        net.load_state_dict(state['net'])
        technique.load_state_dict(state['technique'])
        optim.load_state_dict(state['opt'])
    watch.attach(optim, net)
    distills = hasattr(technique, 'compare_seen')
    with attach(technique, Training(run if world()>1 else net, optim, epochs, lambda: (X[:2],), folder), epochs*STEPS//acc, at*STEPS//acc, adds=not (in_loss or distills)) as steps:
        if distills: technique.get_ready(X[:2])
        for epoch in range(at, epochs):
            net.train()
            for i in range(STEPS):
                x,y = X[i*BS:][:BS],Y[i*BS:][:BS]
                if world()>1: x,y = part(X, i, share),part(Y, i, share)
                with _with(amp), technique.seen(net) if distills else nullcontext() as seen: loss = F.cross_entropy(run(x), y)
                if distills:
                    pct = (steps.k+1)/steps.n
                    with _with(amp): technique.compare_seen(pct, seen)
                    loss = technique.mixed(pct, loss)
                if in_loss and (more := steps.loss()) is not None: loss = loss+more
                (loss/acc).backward()
                if (i+1)%acc: continue
                if clip: nn.utils.clip_grad_norm_(net.parameters(), clip)
                optim.step()
                optim.zero_grad()
            if save is not None and epoch+1==save:
                from fasterai.core.plan import as_bytes, plan_text, pruned_plan
                plan = pruned_plan(net)
                cut = {'prune.plan':as_bytes(plan_text(plan))} if plan['kept'] else {}
                torch.save(dict(epoch=save, net=net.state_dict(), technique=technique.state_dict(), opt=optim.state_dict(), **cut), folder/'loop')
    watch.end()

def _cut(net, plan):
    from fasterai.core.plan import as_text, cut_to, read_plan
    cut_to(net, read_plan(as_text(plan)))

# --- fastai

def fastai(technique, net, watch, folder, opt='adamw', amp=False, acc=1, clip=None, compile=False, epochs=EPOCHS, resume=None, save=None):
    from fastai.callback.core import Callback
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.distributed import DistributedDL, Learner  # with `distrib_ctx`
    from fastai.optimizer import OptimWrapper
    load = lambda: DataLoader(list(zip(X, Y)), bs=BS//world(), num_workers=0)
    class Probe(Callback):
        order = -5
        def before_fit(self): watch.attach(self.opt.opt, net)
        def after_epoch(self):
            if save is not None and self.epoch+1==save: self.learn.save('half')
    class Autocast(Callback):
        "fastai's own is for GPUs"
        order = -4
        def before_batch(self):
            self.autocast = _with(True)
            self.autocast.__enter__()
        def after_loss(self): self.autocast.__exit__(None, None, None)
    def broadcast(self, t, rank):  # without a GPU
        dist.broadcast(t := torch.tensor(t), rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast
    learn = Learner(DataLoaders(load(), load(), device='cpu'), _compiled(net, compile), loss_func=nn.CrossEntropyLoss(), path=folder,
                    opt_func=lambda ps, **kw: OptimWrapper(opt=optimizer(opt, net.parameters())), lr=LR[opt])
    if resume: learn.load('half')
    cbs = [technique, Probe(), *([Autocast()] if amp else []), *([GradientAccumulation(acc*BS)] if acc>1 else []), *([GradientClip(clip)] if clip else [])]
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=False) if world()>1 else nullcontext(): learn.fit(epochs, cbs=cbs, **(dict(start_epoch=resume) if resume else {}))
    watch.end()

# --- Lightning

def lightning(technique, net, watch, folder, opt='adamw', amp=False, acc=1, clip=None, compile=False, epochs=EPOCHS, resume=None, save=None):
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset
    for o in ('lightning.pytorch','lightning.pytorch.utilities.rank_zero'): logging.getLogger(o).setLevel(logging.ERROR)
    run = _compiled(net, compile)
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net
        def training_step(self, batch, i): return F.cross_entropy(run(batch[0]), batch[1])
        def configure_optimizers(self): return optimizer(opt, net.parameters())
    class Probe(pl.Callback):
        def on_train_start(self, trainer, module): watch.attach(trainer.optimizers[0], net)
    callbacks = [Probe(), technique]
    if save is not None: callbacks.append(pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1, filename='{epoch}', save_on_train_epoch_end=True))
    trainer = pl.Trainer(max_epochs=epochs, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        enable_checkpointing=save is not None, callbacks=callbacks, strategy='ddp' if world()>1 else 'auto', devices=world(), precision='bf16-mixed' if amp else '32-true', accumulate_grad_batches=acc, gradient_clip_val=clip)
    rows = TensorDataset(X, Y)
    sampler = torch.utils.data.DistributedSampler(rows, shuffle=False) if world()>1 else None  # its own shuffles
    data = DataLoader(rows, batch_size=BS//world(), sampler=sampler)
    trainer.fit(Module(), data, **(dict(ckpt_path=folder/f'epoch={resume-1}.ckpt', weights_only=False) if resume else {}))
    watch.end()

# --- transformers

class Answers(nn.Module):
    "A network as its Trainer wants it: called by name, it answers with a loss"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x, labels=None):
        logits = self.net(x)
        return dict(logits=logits) if labels is None else dict(loss=F.cross_entropy(logits, labels), logits=logits)

ANSWERS = WeakKeyDictionary() # of a network that is trained again

def transformers(technique, net, watch, folder, opt='adamw', amp=False, acc=1, clip=None, compile=False, epochs=EPOCHS, resume=None, save=None):
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from fasterai.transformers import DistillationTrainer, cut_like
    from fasterai.distill.training import Distill
    torch._dynamo.reset()
    class Probe(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs): watch.attach(optimizer.optimizer, net)
    class Ordered:
        def _get_train_sampler(self, *args): return torch.utils.data.SequentialSampler(self.train_dataset)
    distills = isinstance(technique, Distill)
    kind = type('Ours', (Ordered, DistillationTrainer if distills else Trainer), {})
    args = TrainingArguments(str(folder), num_train_epochs=epochs, per_device_train_batch_size=BS//world(), ddp_backend='gloo' if world()>1 else None, learning_rate=LR[opt], lr_scheduler_type='constant', report_to='none',
        disable_tqdm=True, save_strategy='no' if save is None else 'epoch', logging_strategy='no', use_cpu=True, bf16=amp, max_grad_norm=clip or 0., seed=0,
        gradient_accumulation_steps=acc, torch_compile=compile, **(dict(torch_compile_backend='eager') if compile else {}))
    model = ANSWERS[net] = ANSWERS[net] if net in ANSWERS else Answers(net)
    if resume and list(folder.glob(f'checkpoint-{resume*STEPS//acc}/fasterai-prune-*')): cut_like(model, folder/f'checkpoint-{resume*STEPS//acc}')
    given = dict(distill=technique) if distills else dict(callbacks=[technique])
    trainer = kind(model, args, train_dataset=[dict(x=x, labels=y) for x,y in zip(X, Y)], optimizers=(optimizer(opt, net.parameters()), None), **given)
    trainer.add_callback(Probe())
    trainer.train(resume_from_checkpoint=str(folder/f'checkpoint-{resume*STEPS//acc}') if resume else None)
    watch.end()

ENGINES = dict(loop=loop, fastai=fastai, lightning=lightning, transformers=transformers)
