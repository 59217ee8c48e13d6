"""Fits on fastai's own data and learners: images, masks, tables and sentences, with every callback of the library, alone and together.

What was asked for is counted in the weights themselves; and nothing stays on the model."""
import copy
from functools import cache, partial
import pytest, torch
from tiny import told
from torch import nn
from torchvision.models import resnet18
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.learner import tabular_learner
from fastai.text.learner import language_model_learner, text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from fastai.torch_core import set_seed
from fastai.vision.learner import unet_learner, vision_learner
from fastai.vision.models.xresnet import xresnet18
import loaders
from fasterai.core.all import *
from fasterai.distill.all import *
from fasterai.prune.all import *
from fasterai.quantize.all import *
from fasterai.regularize.all import *
from fasterai.report.all import report
from fasterai.sparse.all import *

def small(pretrained=False):
    "A body and a head for `vision_learner` and `unet_learner`"
    def conv(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv(3,8), conv(8,16), conv(16,32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,2))

class Residual(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.a,self.b,self.norm = nn.Conv2d(n,n,3,padding=1),nn.Conv2d(n,n,3,padding=1),nn.BatchNorm2d(n)
    def forward(self, x): return self.norm(x+self.b(self.a(x).relu())).relu()

def residual(): return nn.Sequential(nn.Conv2d(3,12,3,2), nn.ReLU(), Residual(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12,2))

TINY = dict(emb_sz=8, n_hid=12, n_layers=2)
data = {o: cache(getattr(loaders, o)) for o in ('images','folders','masks','tables','texts','words','numbers','points','several','pairs','two_labels')}

LEARNERS = dict(
    vision=lambda: vision_learner(data['images'](), small, cut=-3, pretrained=False, lin_ftrs=[16]),
    plain =lambda: Learner(data['images'](), residual(), loss_func=CrossEntropyLossFlat()),
    unet  =lambda: unet_learner(data['masks'](), small, cut=-3, pretrained=False),
    table =lambda: tabular_learner(data['tables'](), layers=[32,16]),
    text  =lambda: text_classifier_learner(data['texts'](), AWD_LSTM, config=awd_lstm_clas_config|TINY, pretrained=False))
KINDS = list(LEARNERS)
OF = dict(vision=nn.Conv2d, plain=nn.Conv2d, unet=nn.Conv2d, table=nn.Linear, text=nn.Linear)  # layers that most of a network is made of

def learner(kind, seed=0):
    set_seed(seed)
    return LEARNERS[kind]()

def fit(learn, *cbs, n=1, lr=1e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, cbs=cbs)
    return learn

def batch(learn):
    "Plain tensors of the validation set: inputs, and the answers of a model that was left in eval mode"
    xb = learn.dls.valid.one_batch()[:learn.dls.n_inp]
    return tuple(o.as_subclass(torch.Tensor) for o in xb)

@torch.no_grad()
def answer(model, xb):
    out = model.eval()(*xb)
    return out[0] if isinstance(out, tuple) else out

def layers(model, kind): return {n:m for n,m in model.named_modules() if isinstance(m, OF[kind])}
def n_params(model): return sum(o.numel() for o in model.parameters())
PLAN = '_pruned' # what `PruneCallback` and `Pruner` note on a model that they cut, for `save_pruned`

def marks(model):
    "What could be left on a model: attributes, hooks, keys of its state, parameters that are trained"
    seen = {n: (set(vars(m))-{PLAN}, {k:len(v) for k,v in vars(m).items() if k.endswith('hooks')}) for n,m in model.named_modules()}
    return seen,list(model.state_dict()),[(n,type(p),p.requires_grad) for n,p in model.named_parameters()]
def state(model): return {k:v.clone() for k,v in model.state_dict().items()}
def column(learn, name): return learn.recorder.values[-1][learn.recorder.metric_names.index(name)-1]

def fitted(kind, *cbs, **kwargs):
    "A learner after a fit that left nothing on its model"
    learn = learner(kind)
    before,shape = marks(learn.model),answer(learn.model, batch(learn)).shape
    fit(learn, *cbs, **kwargs)
    assert marks(learn.model)==before and answer(learn.model, batch(learn)).shape==shape
    assert all(torch.isfinite(o).all() for o in learn.model.parameters())
    return learn

# --- zeros

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('how', [dict(), dict(granularity='filter'), dict(context='global', criteria=taylor), dict(criteria='wanda'),
    dict(criteria=movement, schedule=agp), dict(lth=True, schedule=iterative),
    dict(granularity='filter', lth=True, rewind_epoch=1, schedule=Schedule(sched_agp, start_pct=.5))], ids=told)
def test_sparsify(kind, how):
    learn = fitted(kind, SparsifyCallback(50, layer_type=OF[kind], **how), n=1+how.get('rewind_epoch', 0))
    dead = lambda m: ((m.weight==0).flatten(1).all(1) if how.get('granularity')=='filter' else m.weight==0)
    *ls,last = [dead(m) for m in layers(learn.model, kind).values()]
    if how.get('granularity')!='filter' or kind!='table': ls.append(last)
    zeros,all_ = [int(o.sum()) for o in ls],[o.numel() for o in ls]
    if how.get('context')=='global': assert sum(zeros)==sum(all_)//2
    else: assert zeros==[o//2 for o in all_]
    assert column(learn, 'sparsity')==pytest.approx(100*sum(zeros)/sum(all_))

@pytest.mark.parametrize('kind', KINDS)
def test_zeros_are_kept(kind):
    learn = fitted(kind, SparsifyCallback(50, layer_type=OF[kind]))
    zeros = [m.weight==0 for m in layers(learn.model, kind).values()]
    before = state(learn.model)
    fit(learn, KeepSparsity())
    assert all(torch.equal(m.weight==0, o) for m,o in zip(layers(learn.model, kind).values(), zeros))
    assert not all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

@pytest.mark.parametrize('kind', KINDS)
def test_coupled_zeros_can_be_removed(kind):
    learn = fitted(kind, SparsifyCallback(50, 'filter', coupled=True, layer_type=OF[kind]))
    x = batch(learn)
    assert 45<=column(learn, 'sparsity')<=50
    if kind=='text': return  # hidden units of an LSTM read a part of a network whose path its inputs choose
    small = Pruner().prune_model(learn.model, x)
    assert n_params(small)<.75*n_params(learn.model)
    torch.testing.assert_close(answer(small, x), answer(learn.model, x), rtol=1e-3, atol=1e-4)

def test_coupled_on_a_residual_network():
    "fastai's own: the sums of its blocks tie filters, and half of all channels are gone"
    set_seed(0)
    learn = fit(vision_learner(data['folders'](), xresnet18, pretrained=False), SparsifyCallback(50, 'filter', coupled=True))
    x = batch(learn)
    small = Pruner().prune_model(learn.model, x)
    widths = [(a.out_channels,b.out_channels) for a,b in zip(layers(learn.model, 'vision').values(), layers(small, 'vision').values())]
    assert all(b==a//2 for a,b in widths) and column(learn, 'sparsity')==50
    torch.testing.assert_close(answer(small, x), answer(learn.model, x), rtol=1e-3, atol=1e-4)

# --- channels

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('how', [dict(), dict(criteria='taylor', context='global'), dict(criteria='wanda', round_to=4)], ids=told)
def test_prune(kind, how):
    "Half of the channels go, the optimizer trains what is left, and the answers keep their shape"
    learn = learner(kind)
    if kind in ('table','text') and 'round_to' in how:  # an embedding reads no activations
        return cannot(learn, PruneCallback(50, **how), "'wanda' needs the activations that .* reads")
    xb,before = batch(learn),n_params(learn.model)
    shape,had = answer(learn.model, xb).shape,marks(learn.model)
    fit(learn, cb := PruneCallback(50, **how))
    now = n_params(learn.model)
    assert answer(learn.model, xb).shape==shape and marks(learn.model)==had and torch.isfinite(answer(learn.model, xb)).all()
    assert now<(.75 if kind=='text' else .6 if 'round_to' in how else .45)*before  # an LSTM's hidden units stay
    assert (30 if 'round_to' in how else 40 if how else 48)<=column(learn, 'pruned')<=50
    at = state(learn.model)
    fit(learn)
    still = [n for n,p in learn.model.named_parameters() if p.dim()>1 and torch.equal(p, at[n])]
    assert n_params(learn.model)==now and still==[]

@pytest.mark.parametrize('kind', ['vision','plain'])
def test_prune_halves_every_convolution(kind):
    before = [m.out_channels for m in layers(learner(kind).model, kind).values()]
    learn = fit(learner(kind), PruneCallback(50))
    assert [m.out_channels for m in layers(learn.model, kind).values()]==[o//2 for o in before]

def test_prune_a_unet_on_resnet18():
    set_seed(0)
    learn = unet_learner(data['masks'](), resnet18, pretrained=False)
    before,x = n_params(learn.model),batch(learn)
    fit(learn, PruneCallback(50, n_updates=2))
    assert n_params(learn.model)<.3*before and 48<=column(learn, 'pruned')<=50
    assert answer(learn.model, x).shape==(len(x[0]),3,loaders.SIDE,loaders.SIDE)

# --- teachers

MAPS = dict(vision=['0.1']*2, plain=['2.b','2.a'], unet=['layers.0.2']*2, table=['layers.0.0']*2, text=['1.layers.0.2']*2)
LOGITS = [SoftTarget, 'Logits', 'Mutual', DecoupledKD, 'NormalizedDecoupledKD', 'NormalizedKD', 'DIST']

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('how', [dict(), dict(loss=LOGITS), dict(loss=[SoftTarget,FitNet], maps=True, alpha=.5),
                                 dict(loss='Similarity', maps=True, schedule=lin), dict(cache=100)], ids=told)
def test_teacher(kind, how):
    "A learner of the same kind as the teacher, which stays as it is; a column for each loss"
    how = dict(how)
    teacher = fit(learner(kind, seed=1))
    before,had,modes = state(teacher.model),marks(teacher.model),[m.training for m in teacher.model.modules()]
    pairs = MAPS[kind] if how.pop('maps', False) else ()
    losses = how.pop('loss', SoftTarget)
    learn = fitted(kind, cb := KnowledgeDistillationCallback(teacher, losses, *pairs, **how))
    assert marks(teacher.model)==had and all(torch.equal(v, before[k]) for k,v in teacher.model.state_dict().items())
    assert modes==[m.training for m in teacher.model.modules()]
    for o in losses if isinstance(losses, list) else [losses]:
        assert 0<column(learn, getattr(o, '__name__', o))<20
    assert column(learn, 'task')>0

@pytest.mark.parametrize('kind', KINDS)
def test_a_teacher_is_imitated(kind):
    "The nearer to the teacher, the more weight it has"
    teacher = fit(learner(kind, seed=1))
    x = batch(teacher)
    def apart(weight):
        learn = fit(learner(kind), KnowledgeDistillationCallback(teacher, Logits, weight=weight), n=4, lr=1e-2)
        return float((answer(learn.model, x)-answer(teacher.model, x)).square().mean())
    assert apart(1.)<apart(0.)

class Teller(nn.Module):
    "Remembers how often it was asked since it was last reset, and returns its states beside its answer"
    def __init__(self, model):
        super().__init__()
        self.model,self.asked,self.runs = model,0,[]
    def reset(self):
        if self.asked: self.runs.append(self.asked)
        self.asked = 0
        self.model.reset()
    def forward(self, x):
        self.asked += 1
        return self.model(x)

def test_a_recurrent_teacher_begins_anew_with_each_epoch():
    learn = learner('text')
    teacher = Teller(fit(learner('text', seed=1)).model)
    fit(learn, KnowledgeDistillationCallback(teacher), n=3)
    assert teacher.runs==[learn.dls.train.n//learn.dls.bs]*3 and teacher.asked==0

def language_model(seed=0):
    set_seed(seed)
    return language_model_learner(data['words'](), AWD_LSTM, config=awd_lstm_lm_config|TINY, pretrained=False)

def test_words_have_their_classes_last():
    "A language model's teacher is compared along the axis that the learner's loss knows"
    teacher = fit(language_model(1))
    losses = [SoftTarget, DecoupledKD, partial(SoftTarget, axis=-1), partial(SoftTarget, axis=1)]
    learn = fit(language_model(), KnowledgeDistillationCallback(teacher, losses))
    known,last,first = (column(learn, o) for o in ('SoftTarget','SoftTarget_2','SoftTarget_3'))
    assert 0<known==last!=first and column(learn, 'DecoupledKD')>0

def test_scores_of_no_classes_are_refused():
    "A softmax over one output would be 1 whatever the output is"
    def regression(): return vision_learner(data['numbers'](), small, cut=-3, pretrained=False, n_out=1)
    for loss in (SoftTarget, 'DIST', DecoupledKD):
        with pytest.raises(ValueError, match='choose Logits'): fit(regression(), KnowledgeDistillationCallback(regression(), loss))
    assert column(fit(regression(), KnowledgeDistillationCallback(regression(), Logits)), 'Logits')>0

# --- penalties

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('mk', [
    lambda types, weight: RegularizationCallback('filter', weight, layer_types=types),
    lambda types, weight: RegularizeCallback('group_lasso', 'filter', weight, layer_types=types),
    lambda types, weight: RegularizeCallback('slimming', weight=weight),
    lambda types, weight: RegularizeCallback(large_final, 'weight', weight, layer_types=types, schedule='cos')], ids=['filter','lasso','slimming','cos'])
def test_penalty(kind, mk):
    "What has its price becomes smaller than without one"
    priced,free = (column(fitted(kind, mk(OF[kind], w), n=2, lr=1e-2), 'penalty') for w in (1e-1,0))
    assert 0<priced<free

def test_a_norm_of_no_features_has_no_penalty():
    "fastai's tables have a BatchNorm of their numbers, even where there are none"
    dls = loaders.TabularDataLoaders.from_df(loaders.table(), procs=[loaders.Categorify], cat_names=['kind'], cont_names=[], y_names='label', bs=16, seed=0, num_workers=0)
    learn = tabular_learner(dls, layers=[8])
    assert learn.model.bn_cont.num_features==0
    assert column(fit(learn, RegularizeCallback('slimming', weight=1e-2)), 'penalty')>0

# --- shared values

def shared(model, kind): return [m.weight[m.weight!=0].unique().numel() for m in layers(model, kind).values()]

@pytest.mark.parametrize('kind', KINDS)
def test_shared_values(kind):
    learn = fitted(kind, cb := KMeansCallback(3))
    assert max(shared(learn.model, kind))<=8 and (cb.quantizer.report()['values']<=8).all()
    if kind=='text': assert all(len(o.module.weight_hh_l0.unique())<=8 for o in learn.model[0].module.rnns)  # as they are computed with

@pytest.mark.parametrize('kind', KINDS)
def test_zeros_are_kept_while_values_are_shared(kind):
    learn = fitted(kind, SparsifyCallback(50, layer_type=OF[kind]))
    zeros = [m.weight==0 for m in layers(learn.model, kind).values()]
    fit(learn, KMeansCallback(3), KeepSparsity())
    assert all(torch.equal(m.weight==0, o) for m,o in zip(layers(learn.model, kind).values(), zeros)) and max(shared(learn.model, kind))<=8

# --- together

@pytest.mark.parametrize('kind', KINDS)
def test_zeros_a_teacher_and_a_penalty(kind):
    sparsify,penalty = SparsifyCallback(50, 'filter', layer_type=OF[kind]),RegularizationCallback('filter', 1e-3, layer_types=OF[kind])
    learn = fitted(kind, sparsify, KnowledgeDistillationCallback(learner(kind, 1)), penalty, GradientAccumulation(16))
    assert 45<=column(learn, 'sparsity')<=50 and min(column(learn, o) for o in ('SoftTarget','task','penalty'))>0

@pytest.mark.parametrize('kind', KINDS)
def test_fewer_channels_a_teacher_and_a_penalty(kind):
    learn = learner(kind)
    before,x = n_params(learn.model),batch(learn)
    penalty = RegularizeCallback('group_lasso', 'filter', 1e-3, layer_types=OF[kind])
    fit(learn, PruneCallback(50), KnowledgeDistillationCallback(learner(kind, 1)), penalty)
    assert n_params(learn.model)<.75*before and len(answer(learn.model, x))==len(x[0])
    assert column(learn, 'pruned')>=48 and column(learn, 'SoftTarget')>0

@pytest.mark.parametrize('kind', KINDS)
def test_shared_values_that_become_zero_beside_a_teacher(kind):
    sparsify = SparsifyCallback(50, layer_type=OF[kind], schedule=agp)
    learn = fitted(kind, KMeansCallback(4), sparsify, KnowledgeDistillationCallback(learner(kind, 1)))
    assert max(shared(learn.model, kind))<=16 and column(learn, 'sparsity')>=49

def test_mixed_images():
    learn = fitted('vision', MixUp(), SparsifyCallback(50, 'filter'), KnowledgeDistillationCallback(learner('vision', 1)))
    assert column(learn, 'sparsity')==50

# --- what cannot be done is said

def cannot(kind, cb, says):
    learn = learner(kind) if isinstance(kind, str) else kind
    before = state(learn.model)
    with pytest.raises(ValueError, match=says): fit(learn, cb)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

@pytest.mark.parametrize('kind', ['table','text'])
def test_layers_that_are_not_there(kind):
    for cb in (SparsifyCallback(50), RegularizationCallback('filter')): cannot(kind, cb, 'no layer of type Conv2d.*it has .*Linear')

def test_words_in_and_words_out():
    "Of a language model whose decoder is its encoder, the units between two LSTMs go"
    learn = fit(language_model(), PruneCallback(50))
    assert [(o.module.input_size,o.module.hidden_size) for o in learn.model[0].rnns]==[(8,6),(6,8)]
    cannot(language_model(), SparsifyCallback(50, 'filter', coupled=True, layer_type=nn.Linear), 'no filter of .* can be removed')

# --- a report on what came out

@pytest.mark.parametrize('kind', KINDS)
def test_report_after_a_fit(kind):
    before,after = learner(kind),fit(learner(kind), PruneCallback(50))
    rep = report(before.model, after.model, after.dls, repeats=6, warmup=0, progress=False)
    y = torch.cat([o[-1].flatten() for o in after.dls.valid])
    assert rep.params['after']<rep.params['before'] and rep.macs['after']<rep.macs['before']
    assert rep.of.tolist()==[len(y)]*2 and not [o for o in rep.notes if 'not measured' in o]
    preds,targs = after.get_preds()
    axis = 1 if kind=='unet' else -1
    assert rep.right['after']==int((preds.argmax(axis).flatten()==targs.flatten()).sum())

def mixed(kind):
    "A model for the data of `kind`"
    out = dict(numbers=1, points=4, several=4, pairs=2, two_labels=2, folders=2)[kind]
    body = lambda ni: nn.Sequential(nn.Conv2d(ni,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,out))
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = body(6)
        def forward(self, a, b): return self.net(torch.cat([a,b], 1))
    return Two() if kind=='pairs' else body(3)

quick = partial(report, repeats=6, warmup=0, progress=False)

@pytest.mark.parametrize('kind,says', [('folders',None), ('pairs',None), ('numbers','the labels are numbers (float32)'),
    ('points','the labels are numbers'), ('several','correct=lambda out, y: (out>0)==y.bool()'), ('two_labels','several labels')])
def test_report_on_other_loaders(kind, says):
    dls = data[kind]()
    a,b = mixed(kind),mixed(kind)
    for part in (dls, dls.valid, dls.train):
        rep = quick(a, b, part)
        assert rep.attrs['about'].startswith('1×3×32×32')
        n = len(dls.train.items)//dls.bs*dls.bs if part is dls.train else len(dls.valid.items)  # what is left over is not trained on
        if says: assert 'accuracy' not in rep and says in rep.notes[0] and rep.difference['after']>0
        else: assert rep.of['after']==n

def test_report_with_a_function_of_several_labels():
    def n_labels(kind, correct): return quick(mixed(kind), data[kind](), correct=correct).of.iloc[0]
    n = len(data['several']().valid.items)
    assert n_labels('several', lambda out, y: (out>0)==y.bool())==4*n
    assert n_labels('two_labels', lambda out, y: out.argmax(1)==y[0])==n

def test_report_on_tables_of_numbers():
    learn = tabular_learner(loaders.tables('price'), layers=[8])
    rep = quick(learn.model, copy.deepcopy(learn.model), learn.dls)
    assert 'accuracy' not in rep and rep.difference['after']==0 and 'numbers' in rep.notes[0]

@pytest.mark.parametrize('kind', ['vision','unet','table','text'])
def test_report_on_new_data(kind):
    "A loader of data without labels, and of the same with them"
    learn,other = learner(kind),learner(kind, 1)
    items = dict(table=loaders.table()[:20], text=loaders.sentences()[:20]).get(kind, loaders.files()[:20])
    bare = learn.dls.test_dl(items.drop(columns=['label','price']) if kind=='table' else items)
    rep = quick(learn.model, other.model, bare)
    n = 20*(loaders.SIDE**2 if kind=='unet' else 1)
    assert 'the data has no labels' in rep.notes[0] and rep.of['after']==n>=rep.same['after']>=0 and rep.difference['after']>0
    if kind in ('table','unet'): assert 'accuracy' in quick(learn.model, learn.dls.test_dl(items, with_labels=kind=='unet'))

def test_report_on_words():
    "Each word of a text is a label"
    learn = fit(language_model(), n=2, lr=.1)
    rep = quick(learn.model, learn.dls)
    learn.model.reset()
    plain = lambda o: o.as_subclass(torch.Tensor)
    right = [(answer(learn.model, (plain(x),)).argmax(-1)==plain(y)).flatten() for x,y in learn.dls.valid]
    assert rep.right.iloc[0]==int(torch.cat(right).sum())>0 and rep.of.iloc[0]==len(torch.cat(right)) and rep.attrs['about'].startswith('1×16')

def test_report_on_loaders_without_a_validation_set():
    how = dict(valid_pct=0., item_tfms=loaders.Resize(32), bs=8, num_workers=0)
    whole = loaders.ImageDataLoaders.from_name_func(loaders.folder(), loaders.files(), lambda name: name[0], **how)
    for dls in (whole, loaders.DataLoaders(whole.train)):
        with pytest.raises(ValueError, match='pass its `train`'): quick(mixed('folders'), dls)
    assert quick(mixed('folders'), whole.train).of.iloc[0]==32
    with pytest.raises(ValueError, match='not a Datasets; pass a DataLoader'): quick(mixed('folders'), data['pairs']().valid_ds)
