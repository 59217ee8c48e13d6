"""In the Trainer of transformers: the same masks as in a loop of one's own, and checkpoints that go on with the same bits"""
import pickle
import pytest, torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel, GPT2Model, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from fasterai.core.all import *
from fasterai.core.pace import Training, attach
from fasterai.core.schedule import Schedule, sched_iterative
from fasterai.core.plan import pruned_plan
from fasterai.distill.training import Distill
from fasterai.prune.pruner import Pruner
from fasterai.prune.training import Prune
from fasterai.quantize.training import Share
from fasterai.regularize.training import Regularize
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.training import Keep, Sparsify
from fasterai.transformers import *

torch.manual_seed(0)
IDS,Y = torch.randint(0, 30, (40, 6)),torch.randint(0, 3, (40,))
DATA = [dict(input_ids=i, attention_mask=torch.ones_like(i), labels=y) for i,y in zip(IDS, Y)]

def bert():
    torch.manual_seed(0)
    size = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3, max_position_embeddings=8)
    return BertForSequenceClassification(BertConfig(**size, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))

class InOrder(Trainer):
    "Without shuffling, so that a plain loop sees the same batches"
    def _get_train_sampler(self, *args): return torch.utils.data.SequentialSampler(self.train_dataset)

def trainer(model, path, callbacks, epochs=4, eval_dataset=None, **kwargs):
    common = dict(num_train_epochs=epochs, per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type='constant', report_to='none', disable_tqdm=True,
        save_strategy='no', logging_strategy='epoch', use_cpu=True, max_grad_norm=0, weight_decay=0., optim='adamw_torch', seed=0)
    return InOrder(model, TrainingArguments(str(path), **common | kwargs), train_dataset=DATA, eval_dataset=eval_dataset, callbacks=callbacks)

def same(a, b):
    a,b = a.state_dict(),b.state_dict()
    return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

LINEAR = dict(layer_type=nn.Linear)
TECHNIQUES = dict(
    sparsify=(SparsifyCallback, Sparsify, (60,'weight','global','movement','agp'), LINEAR),
    updates=(SparsifyCallback, Sparsify, (70,'filter','local','updating_movement','lin'), dict(n_updates=7) | LINEAR),
    wanda=(SparsifyCallback, Sparsify, (60,'weight','local','wanda','lin'), dict(n_updates=8, layer_type=nn.Linear)),
    taylor=(SparsifyCallback, Sparsify, (60,'weight','global','taylor','cos'), LINEAR),
    tickets=(SparsifyCallback, Sparsify, (60,), dict(schedule='iterative', lth=True) | LINEAR),
    heads=(SparsifyCallback, Sparsify, (50,'head'), dict(schedule='lin')),
    keep=(KeepSparsity, Keep, (), {}),
    prune=(PruneCallback, Prune, (50,'lin'), dict(criteria='movement', n_updates=8)),
    share=(KMeansCallback, Share, (2,), {}),
    penalty=(RegularizeCallback, Regularize, ('group_lasso','filter',1e-2), dict(schedule='lin', layer_types=nn.Linear)))

def prepared(name):
    model = bert()
    if name=='keep': model.bert.encoder.layer[0].output.dense.weight.data[:5] = 0
    return model

def loop(technique, model, epochs=4):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.)
    sample = {k:v for k,v in default_data_collator(DATA[:2]).items() if k!='labels'}
    with attach(technique, Training(model, opt, epochs, lambda: sample), 5*epochs):
        for i in range(epochs):
            model.train()
            for j in range(5):
                opt.zero_grad()
                model(**default_data_collator(DATA[8*j:8*j+8])).loss.backward()
                opt.step()
    return model

@pytest.mark.parametrize('name', TECHNIQUES)
def test_as_a_plain_loop_and_resumed(name, tmp_path):
    callback,technique,args,kwargs = TECHNIQUES[name]
    whole,first,again = (prepared(name) for _ in range(3))
    want = loop(technique(*args, **kwargs), whole)
    t = trainer(first, tmp_path, [callback(*args, **kwargs)], save_strategy='epoch')
    t.train()
    assert same(want, first) and not first._forward_pre_hooks
    folder = tmp_path/'checkpoint-10'
    if name=='prune': assert cut_like(again, folder) is again and pruned_plan(again)['kept']
    for p in again.parameters(): p.data.normal_()
    trainer(again, tmp_path, [callback(*args, **kwargs)]).train(resume_from_checkpoint=str(folder))
    assert same(want, again)
    column = technique.column
    assert column is None or [column in o for o in t.state.log_history]==[True]*len(t.state.log_history)

def test_told(tmp_path):
    with pytest.raises(ValueError, match='SparsifyCallback holds masks of weights, whose shapes PruneCallback changes'): trainer(bert(), tmp_path, [SparsifyCallback(50, **LINEAR), PruneCallback(50)]).train()
    with pytest.raises(ValueError, match='no PruneCallback has written'): cut_like(bert(), tmp_path)
    trainer(bert(), tmp_path, [], save_strategy='epoch').train()
    with pytest.warns(UserWarning, match='continues after step 10, but the earlier state of SparsifyCallback is not known'):
        trainer(bert(), tmp_path, [SparsifyCallback(50, **LINEAR)]).train(resume_from_checkpoint=str(tmp_path/'checkpoint-10'))
    class Early(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step==7
    with pytest.warns(UserWarning, match='training ended after step 7 of 20'): trainer(bert(), tmp_path, [SparsifyCallback(50, **LINEAR), Early()]).train()

def test_clipped_and_accumulated(tmp_path):
    m = bert()
    trainer(m, tmp_path, [KMeansCallback(3), SparsifyCallback(50, schedule='lin', **LINEAR)], max_grad_norm=.1, gradient_accumulation_steps=2).train()
    layers = [o for o in m.modules() if isinstance(o, nn.Linear)]
    assert all(len(o.weight.unique())<=9 for o in layers) and all(int((o.weight==0).sum())>=o.weight.numel()//2 for o in layers)

# --- a teacher

def teacher():
    torch.manual_seed(1)
    size = dict(vocab_size=30, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3, max_position_embeddings=8)
    return BertForSequenceClassification(BertConfig(**size))

KD = dict(logits=dict(weight=1.), maps=dict(loss=['SoftTarget','FitNet'], activations_student='bert.encoder.layer.0.output', activations_teacher='bert.encoder.layer.1.output', weight=.7, schedule='cos'))

@pytest.mark.parametrize('how', KD)
def test_teacher(how, tmp_path):
    "The Trainer's loss has its share, and adapters are trained along; a checkpoint goes on with the same bits"
    def student(path, **kwargs):
        model = bert()
        common = dict(num_train_epochs=4, per_device_train_batch_size=8, learning_rate=1e-2, report_to='none', disable_tqdm=True, save_strategy='epoch', logging_strategy='epoch', use_cpu=True, seed=0)
        return DistillationTrainer(model, TrainingArguments(str(path), **common), train_dataset=DATA, distill=Distill(teacher(), **KD[how])),model
    t,model = student(tmp_path)
    t.train()
    a,b = (t.state.log_history[i]['distill_FitNet' if how=='maps' else 'distill_SoftTarget'] for i in (0,-2))
    assert b<a and not model._forward_hooks and not any(m._forward_hooks for m in model.modules())
    t2,again = student(tmp_path)
    t2.train(resume_from_checkpoint=str(tmp_path/'checkpoint-10'))
    assert same(model, again)

def test_interrupted(tmp_path):
    "What is taken off does nothing any more"
    class Halt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==3: raise KeyboardInterrupt
    model,cb,halt = bert(),SparsifyCallback(80, schedule='lin', **LINEAR),Halt()
    t = trainer(model, tmp_path, [cb, halt])
    with pytest.raises(KeyboardInterrupt): t.train()
    zeros = lambda: sum(int((m.weight==0).sum()) for m in model.modules() if isinstance(m, nn.Linear))
    t.remove_callback(halt)
    t.remove_callback(cb)
    before = zeros()
    t.train()
    assert zeros()<before/2
    t.add_callback(cb)
    t.train()
    assert not model._forward_pre_hooks and not t.optimizer.optimizer._optimizer_step_post_hooks

def test_told_at_the_start(tmp_path):
    t = trainer(bert(), tmp_path, [SparsifyCallback(50, **LINEAR)], eval_strategy='epoch', save_strategy='epoch', load_best_model_at_end=True, eval_dataset=DATA)
    with pytest.warns(UserWarning, match='load_best_model_at_end may load an earlier model'): t.train()
    with pytest.raises(TypeError, match=r'distill must be a technique, Distill\(teacher\), not BertForSequenceClassification'): DistillationTrainer(bert(), distill=teacher())
    with pytest.raises(TypeError, match='takes the model first, not'): cut_like(str(tmp_path), bert())

# --- pruned

IDS_OF = dict(input_ids=IDS[:2])
def a_bert(): return BertModel(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=8, output_hidden_states=True)).eval()
def a_gpt(kind=GPT2LMHeadModel): return kind(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=2)).eval()

def test_attention_of_a_base_model():
    "Its own channels go, though what it reads is the output"
    for m,name in ((a_bert(),'encoder.layer.0.attention.output.dense'),(a_gpt(GPT2Model),'h.0.attn.c_proj')):
        Pruner(m, 50, example_inputs=IDS_OF).prune_model()
        w = m.get_submodule(name).weight
        assert sorted(w.shape)==[8,16] and m(**IDS_OF).last_hidden_state.shape==(2,6,16)

def test_caches_hold_no_channels_back():
    m = a_gpt()
    n = sum(p.numel() for p in m.parameters())
    Pruner(m, 50, example_inputs=IDS_OF).prune_model()
    assert sum(p.numel() for p in m.parameters())<n/2 and m.config.use_cache
    assert m(**IDS_OF).past_key_values is not None
    assert m.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1]<=9

def test_captured_outputs():
    "transformers installs hooks for them in the first run"
    m = a_bert()
    for look in (lambda: Pruner().prune_model(m, IDS_OF),lambda: Sparsifier(m, 'filter', coupled=True, layer_type=nn.Linear, example_inputs=IDS_OF)):
        look()
        assert len(m(**IDS_OF).hidden_states)==2

def test_resumed_from_another_folder(tmp_path):
    "What callbacks know is where the Trainer's own state is read"
    cb = lambda: SparsifyCallback(60, 'weight', 'global', 'movement', 'agp', **LINEAR)
    a,b,c = bert(),bert(),bert()
    trainer(a, tmp_path/'a', [cb()], save_strategy='epoch').train()
    trainer(b, tmp_path/'b', [cb()]).train(resume_from_checkpoint=str(tmp_path/'a'/'checkpoint-10'))
    assert same(a, b)
    (tmp_path/'a'/'checkpoint-10').rename(tmp_path/'moved')
    trainer(c, tmp_path/'c', [cb()]).train(resume_from_checkpoint=str(tmp_path/'moved'))
    assert same(a, c)

@pytest.mark.parametrize('how', [dict(epochs=10, max_steps=20), dict(epochs=4), dict(epochs=2, max_steps=18), dict(epochs=3.5), dict(epochs=1, max_steps=10, gradient_accumulation_steps=2)])
def test_epochs_to_rewind_to(tmp_path, how):
    def run(epoch):
        m = bert()
        trainer(m, tmp_path, [SparsifyCallback(50, schedule=Schedule(sched_iterative, .9), lth=True, rewind_epoch=epoch, **LINEAR)], **how).train()
        return m
    assert all(int((m.weight==0).sum())==m.weight.numel()//2 for m in run(3).modules() if isinstance(m, nn.Linear))
    with pytest.raises(ValueError, match='rewind_epoch 4 is not one of the 4 epochs'): run(4)

def test_an_interrupted_model_travels(tmp_path):
    class Halt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==3: raise KeyboardInterrupt
    m = bert()
    with pytest.raises(KeyboardInterrupt): trainer(m, tmp_path, [SparsifyCallback(50, **LINEAR), Halt()]).train()
    assert same(pickle.loads(pickle.dumps(m)), m)

@pytest.mark.parametrize('make', [lambda: SparsifyCallback(50, **LINEAR), KeepSparsity, lambda: PruneCallback(50), lambda: KMeansCallback(2), lambda: RegularizeCallback(layer_types=nn.Linear)])
@pytest.mark.parametrize('event', ['on_epoch_end', 'on_step_end'])
def test_added_in_the_middle_of_a_training(tmp_path, make, event):
    cb = make()
    class Adds(TrainerCallback): pass
    def add(self, args, state, control, **kwargs):
        if cb not in t.callback_handler.callbacks: t.add_callback(cb)
    setattr(Adds, event, add)
    t = trainer(bert(), tmp_path, [Adds()])
    with pytest.raises(RuntimeError, match=f'{type(cb).__name__} was added in the middle of a training, but must be there when it begins'): t.train()

@pytest.mark.parametrize('how', KD)
def test_a_student_that_is_compiled(how, tmp_path):
    "It learns what another one learns, also where its code was compiled before without its layers being looked at"
    def student(path, compiled, how):
        model = bert()
        common = dict(max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, report_to='none', disable_tqdm=True, save_strategy='no', use_cpu=True, seed=0)
        if compiled: common |= dict(torch_compile=True, torch_compile_backend='eager')
        DistillationTrainer(model, TrainingArguments(str(path), **common), train_dataset=DATA, distill=Distill(teacher(), **KD[how])).train()
        return model
    want = student(tmp_path, False, how)
    student(tmp_path, True, 'logits')
    found = student(tmp_path, True, how)
    assert all(torch.allclose(a, b, atol=1e-5) for a,b in zip(found.parameters(), want.parameters()))
