"A finished network goes into a file whatever was done to it, in whatever order, and comes back with the same bits; files that were tampered with change nothing"
import copy, json, pickle, time
import pytest, torch, torchvision
from safetensors.torch import save_file
from torch import nn
from fasterai.core import running
from fasterai.core.files import File, read_file
from fasterai.core.plan import as_text, brought_to, carrying, cut_to, describes, kept_of, parts_of, plan_text, pruned_plan, read_plan, receiving, remember_parts, size, steps_of
from fasterai.misc.all import BN_Folder, Conv_Decomposer, FC_Decomposer
from fasterai.misc.bn_folding import Pointwise
from fasterai.prune.all import Pruner, drop_blocks, load_pruned, save_pruned
from fasterai.quantize.all import Quantizer
from fasterai.repair.all import repair
from tiny import Net, X as IMAGES, fit, learner, same

pytestmark = pytest.mark.filterwarnings('ignore')
X = IMAGES[:4]

class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv,self.norm,self.act = nn.Conv2d(n, n, 3, padding=1, bias=False),nn.BatchNorm2d(n),nn.ReLU()
    def forward(self, x): return x+self.act(self.norm(self.conv(x)))

def lively(model, seed=0):
    "Norms with statistics, so that folding changes numbers"
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(), m.running_var.uniform_(.5, 2)
    return model.eval()

def net(seed=0):
    torch.manual_seed(seed)
    head = nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(8,16),nn.ReLU(),nn.Linear(16,4)
    body = Block(8),Block(8),nn.Conv2d(8,12,3,padding=1),nn.BatchNorm2d(12, affine=False),nn.ReLU(),nn.Conv2d(12,8,1),nn.ReLU()
    return lively(nn.Sequential(nn.Conv2d(3,8,3,padding=1,bias=False), nn.BatchNorm2d(8), nn.ReLU(), *body, *head), seed)

def dropped(model):
    name = next(n for n,m in model.named_modules() if isinstance(m, Block))
    drop_blocks(model, [name], example_inputs=X)
    return model

DO = dict(prune=lambda m: Pruner(m, 30, example_inputs=X).prune_model(), fold=lambda m: BN_Folder().fold(m, X), fc=lambda m: FC_Decomposer().decompose(m, .6, example_inputs=X),
    conv=lambda m: Conv_Decomposer().decompose(m, .5, method='svd', example_inputs=X), drop=dropped, int8=lambda m: Quantizer('static', measure=False).quantize(m, X),
    bytes=lambda m: Quantizer('weight_only', measure=False).quantize(m), dynamic=lambda m: Quantizer('dynamic', measure=False).quantize(m))

def done(model, order):
    for o in order.split(): model = DO[o](model)
    return model

def equal(a, b, x=X):
    "The same keys in the same order, bits, types, layouts, outputs, words and flags"
    one,two = a.state_dict(),b.state_dict()
    assert list(one)==list(two) and all(torch.equal(v, two[k]) and v.dtype==two[k].dtype for k,v in one.items())
    flags = lambda m: [(n,p.requires_grad,[s for s,k in zip(p.stride(), p.shape) if k>1]) for n,p in m.named_parameters()]
    assert flags(a)==flags(b) and str(a)==str(b)
    a,b = a.eval(),b.eval()
    with torch.no_grad(): assert torch.equal(a(x), b(x))
    assert pruned_plan(a)==pruned_plan(b)
    return True

def there_and_back(model, fresh, path, x=X):
    save_pruned(model, path/'a')
    again = load_pruned(path/'a', fresh)
    assert again is fresh and equal(model, again, x)
    save_pruned(again, path/'b')
    assert (path/'a').read_bytes()==(path/'b').read_bytes()
    return again

TWO = [f'{a} {b}' for a in ('prune','fold','fc','conv','drop') for b in ('prune','fold','fc','conv','drop') if (a,b)!=('fold','fold')]
MORE = ['prune fold fc int8','fold prune','prune fold prune','conv prune int8','drop prune fold','drop prune fold fc conv bytes','prune drop prune','fold drop prune drop fc','prune conv prune fc prune','prune fold dynamic',
    'fc conv fold prune','prune int8','fold int8','int8','bytes','fold','fc','conv','fc fc','conv conv fold']

@pytest.mark.parametrize('order', [*TWO,*MORE])
def test_orders(order, tmp_path):
    there_and_back(done(net(), order), net(1), tmp_path)

@pytest.mark.parametrize('name', ['resnet18','mobilenet_v2','densenet121'])
def test_torchvision(name, tmp_path):
    x = torch.randn(2, 3, 64, 64)
    make = lambda: lively(getattr(torchvision.models, name)(num_classes=4))
    model = Pruner(make(), 30, example_inputs=x).prune_model()
    model = BN_Folder().fold(model, x)
    there_and_back(model, make(), tmp_path, x)
    model = Quantizer('weight_only', measure=False).quantize(Pruner(model, 20, example_inputs=x).prune_model(), x)
    there_and_back(model, make(), tmp_path, x)

def test_vision_transformer(tmp_path):
    x = torch.randn(1, 3, 32, 32)
    make = lambda: torchvision.models.VisionTransformer(32, 8, 3, 2, 48, 96, num_classes=4).eval()
    model = FC_Decomposer().decompose(make(), .7, example_inputs=x)
    assert sum(isinstance(m, nn.Sequential) and len(m)==2 and isinstance(m[0], nn.Linear) for m in model.modules())>5
    there_and_back(Pruner(model, 20, example_inputs=x).prune_model(), make(), tmp_path, x)

# --- what models have

def test_tied(tmp_path):
    "Weights that are shared stay so, also of layers that were replaced"
    def make(seed=0):
        torch.manual_seed(seed)
        shared = nn.Linear(16, 16)
        model = Net(lambda m, x: m.head(m.b(m.a(m.first(x.flatten(1))).relu())), first=nn.Linear(108,16), a=shared, b=shared, head=nn.Linear(16,16))
        model.tied = nn.Linear(16, 16)
        model.tied.weight = model.head.weight
        return model.eval()
    model = FC_Decomposer().decompose(make(), .7, example_inputs=X)
    model = Quantizer('weight_only', measure=False).quantize(model, X)
    again = there_and_back(model, make(1), tmp_path)
    assert again.a is again.b and type(again.a) is nn.Sequential and again.tied.weight is again.head.weight

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_types(dtype, tmp_path):
    x = X.to(dtype)
    do = [lambda m: Pruner(m, 30, example_inputs=x).prune_model(), lambda m: BN_Folder(verify=dtype==torch.float64).fold(m, x), lambda m: FC_Decomposer().decompose(m, .6, example_inputs=x)]
    model = net().to(dtype)
    for f in do: model = f(model)
    there_and_back(model, net(1).to(dtype), tmp_path, x)
    other = net(1)
    was = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match='convert the model first'): load_pruned(tmp_path/'a', other)
    assert same(was, other.state_dict())

@pytest.mark.parametrize('last', [False,True])
def test_layouts(last, tmp_path):
    "Convolutions of another layout round in another way, so the layout comes along"
    model = net().to(memory_format=torch.channels_last if last else torch.contiguous_format)
    there_and_back(done(model, 'prune fold conv'), net(1), tmp_path)
    there_and_back(done(model, 'fold'), net(1).to(memory_format=torch.channels_last), tmp_path)

def test_wrapped(tmp_path):
    model = nn.DataParallel(done(net(), 'prune fold fc'))
    save_pruned(model, tmp_path/'a')
    fresh = nn.DataParallel(net(1))
    assert load_pruned(tmp_path/'a', fresh) is fresh and equal(model.module, fresh.module)

def test_frozen_parameters_are_told(tmp_path):
    model = net()
    for n,p in model.named_parameters(): p.requires_grad_('weight' not in n)
    fresh = copy.deepcopy(net(1))
    for n,p in fresh.named_parameters(): p.requires_grad_('weight' not in n)
    assert any(not p.requires_grad for p in there_and_back(done(model, 'fc conv'), fresh, tmp_path)[-1].parameters())

class NormAct(nn.Module):
    "A norm with more than a norm in its code"
    def __init__(self, n, f):
        super().__init__()
        self.norm,self.f,self.drop = nn.BatchNorm2d(n),f,nn.PReLU(n)
        self.weight,self.bias,self.running_mean,self.running_var = self.norm.weight,self.norm.bias,self.norm.running_mean,self.norm.running_var
        del self.norm
    def forward(self, x):
        x = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return self.drop(self.f(x))
def buffered(m):
    for k in ('running_mean','running_var'):
        t = vars(m).pop(k)
        m.register_buffer(k, t)
    return m
def hard(x): return nn.functional.hardtanh(x, -1., 2.5)

def test_what_a_norms_module_did_beside_it(tmp_path):
    "Its operations and its parts stand in its place"
    def make(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3,6,3), buffered(NormAct(6, hard)), nn.Conv2d(6,8,3), nn.Flatten(), nn.Linear(32,4)).eval()
    model = BN_Folder().fold(make(), X)
    assert any(isinstance(m, Pointwise) for m in model.modules())
    there_and_back(Pruner(model, 30, example_inputs=X).prune_model(), make(1), tmp_path)
    assert 'hardtanh' in plan_text(pruned_plan(model))

@pytest.mark.parametrize('step', [['os::system','',{'self':0},{}], ['aten::add','__class__',{'self':0},{}], ['aten::__class__','',{'self':0},{}], ['aten::bernoulli','',{'self':0},{}], ['aten::relu','',{'self':1},{}],
    ['aten::hardtanh','',{'self':0},{'min_val':[1]}], ['aten::hardtanh','',{'self':0},{'device':'cuda'}], ['aten::zeros','',{},{'size':10**12}], 3])
def test_operations_of_files(step, tmp_path):
    "Only those that work element by element, with numbers that they take"
    m = net()
    was = parts_of(m)
    m[2] = Pointwise([('aten::relu','',{'self':0},{})])
    remember_parts(m, was, 'hand')
    plan = json.loads(plan_text(pruned_plan(m)))
    assert cut_to(net(), plan)
    plan['before'][0]['replaced']['new'][0]['args']['steps'] = [step]
    with pytest.raises(ValueError, match='element by element|does not take'): cut_to(net(), plan)

# --- what cannot be

def test_what_cannot_be_described(tmp_path):
    class Own(nn.Linear):
        def forward(self, x): return super().forward(x)*2
    m = net()
    was = parts_of(m)
    m[-1] = Own(16, 4)
    remember_parts(m, was, 'hand')
    for o in (m, copy.deepcopy(m), done(m, 'prune'), done(m, 'fold')):
        with pytest.raises(ValueError, match='what hand made of the Sequential cannot be saved: 14: an Own cannot be described'): save_pruned(o, tmp_path/'a')
    whole = FC_Decomposer().decompose(nn.Linear(16, 16), .7, example_inputs=torch.randn(2, 16))
    with pytest.raises(ValueError, match='the model itself was replaced, by a Sequential'): save_pruned(whole, tmp_path/'a')
    assert not (tmp_path/'a').exists()

class Scaled(nn.Module):
    def __init__(self, by): super().__init__(), setattr(self, 'by', by)
    def forward(self, x): return x*self.by

def test_kinds_of_ones_own(tmp_path):
    "Whoever describes a type of layer may save it"
    describes(Scaled, by=size)(Scaled)
    m = net()
    was = parts_of(m)
    m[2] = Scaled(3)
    remember_parts(m, was, 'hand')
    assert there_and_back(done(m, 'prune'), net(1), tmp_path)[2].by==3

def test_a_layer_of_the_users(tmp_path):
    "Nobody was told of it, and the file is refused in words, by its name"
    m = done(net(), 'prune')
    m[-1] = nn.Linear(m[-1].in_features, 7)
    save_pruned(done(m, 'fold'), tmp_path/'a')
    unchanged(net(1), tmp_path/'a', r'12\.\w+ has shape')
    m = done(net(), 'fold')
    m[-1] = nn.Sequential(nn.Linear(16, 4), nn.ReLU())
    save_pruned(m, tmp_path/'a')
    unchanged(net(1), tmp_path/'a', "which this Sequential has")

# --- files that were tampered with

def unchanged(fresh, path, match):
    "`load_pruned` raises a ValueError soon, and leaves all as it is"
    fresh(X).sum().backward()
    words,state,grads = str(fresh),copy.deepcopy(fresh.state_dict()),[None if p.grad is None else p.grad.clone() for p in fresh.parameters()]
    params,attrs,start = list(fresh.parameters()),[{k:v for k,v in vars(m).items() if not k.startswith('_')} for m in fresh.modules()],time.perf_counter()
    with pytest.raises(ValueError, match=match): load_pruned(path, fresh)
    assert time.perf_counter()-start<2
    assert str(fresh)==words and same(state, fresh.state_dict()) and all(a is b for a,b in zip(params, fresh.parameters())) and not pruned_plan(fresh)['kept'] and not steps_of(pruned_plan(fresh))
    assert all(a is None and p.grad is None or torch.equal(a, p.grad) for a,p in zip(grads, fresh.parameters()))
    assert attrs==[{k:v for k,v in vars(m).items() if not k.startswith('_')} for m in fresh.modules()]
    fresh(X).sum().backward()

HUGE = 10**12
def put(*path, value):
    def f(plan):
        for k in path[:-1]: plan = plan[k]
        plan[path[-1]] = value
    return f
NEW = 'before',1,'replaced','new'  # of what was folded first and decomposed then
def at(*path, value): return put(*NEW, 0, *path, value=value)
def nested(plan):
    inside = 0
    for _ in range(500): inside = {'a':inside}
    plan['before'][0]['replaced']['new'][0]['children'] = inside
def inside_itself(plan): plan['before'][0]['replaced']['children']['3']['act'] = ''
def swapped(plan): plan['before'][0]['replaced']['children']['3']['conv'] = '4.conv2'
def no_new(plan): plan['before'][1]['replaced']['new'] = []
TAMPERED = dict(
    kind=at('kind', value='os.system'), class_=at('kind', value='misc.bn_folding.BN_Folder'), sub=at('kind', value='LazyLinear'), number=at('kind', value=3), room=at('kind', value='quantize.int8.Quantizer'),
    wide=at('args','in_features', value=HUGE), wide_int=at('args','out_features', value=2**31-1), text=at('args','in_features', value='16'), negative=at('args','in_features', value=-1), true=at('args','in_features', value=True),
    real=at('args','in_features', value=16.), none=at('args','bias', value=None), more=at('args','device', value='cuda'), no_args=at('args', value={}), list_=at('args', value=[1]),
    frozen=at('frozen', value=['forward']), frozen_hidden=at('frozen', value=['__class__']), part=at('children', value={'a':'0'}), itself=at('children', value={'a':0}), later=at('children', value={'a':2}),
    deep=nested, cycle=inside_itself, strange=swapped, none_new=no_new, added=put('before',0,'replaced','added', value={'2':['bias']}), added_twice=put('before',0,'replaced','added', value={'14':['bias']}),
    added_hidden=put('before',0,'replaced','added', value={'0':['__dict__']}), lost=put('before',0,'replaced','children', value={'3':{'conv':'3.conv'}}), renamed=put('before',0,'replaced','children', value={'3':{'conv':'3.conv','norm':'3.norm','act':'3.act','__class__':'0'}}),
    dotted=put('before',0,'replaced','children', value={'':{'a.b':'0'}}), nothing=put('before',0,'replaced','children', value={'':{'0':None}}), no_module=put('before',0,'replaced','children', value={'xyz':{}}),
    kept_huge=put('kept','6.weight', value={'0':f'0-{HUGE}'}), kept_many=put('kept','6.weight', value={'0':'1-2,1-2'}), kept_words=put('kept','6.weight', value={'0':'a-b'}), kept_dim=put('kept','6.weight', value={'7':'0'}),
    kept_list=put('kept','6.weight', value={'0':[1]}), kept_name=put('kept','forward', value={'0':'0'}), sizes=put('sizes','6.weight', value=[HUGE]), sizes_text=put('sizes','6.weight', value=['1']), sizes_other=put('sizes', value=[]),
    widths=put('widths','6', value=HUGE), widths_text=put('widths','6', value='9'), attrs=put('attrs','0', value={'forward':1}), attrs_hidden=put('attrs','0', value={'__class__':1}), attrs_flag=put('attrs','0', value={'training':3}),
    attrs_huge=put('attrs','0', value={'in_channels':HUGE}), attrs_modules=put('attrs','0', value={'_parameters':{}}), attrs_module=put('attrs','nowhere', value={}), biases=put('biases', value=['2']), biases_twice=put('biases', value=['10.1']),
    biases_text=put('biases', value='0'), step=put('before',0, value=3), step_kind=put('before',0, value=dict(run='x')), before=put('before', value={}), tied=put('tied', value={'a':'b'}), tied_over=put('tied', value={'0.bias':'0.weight'}),
    tied_text=put('tied', value='x'), last=put('last', value=3), version=put('version', value=3), version_text=put('version', value='2'), no_version=put('version', value=None),
    dropped=put('dropped', value=[dict(blocks={'3':dict(takes=[0,'x',[]], gives=[], rest=[], form='eval')}, lists={})]), dropped_name=put('dropped', value=[dict(blocks={'nowhere':None}, lists={})]), dropped_other=put('dropped', value=3),
    dropped_lists=put('dropped', value=[dict(blocks={'3':None}, lists={'3':[HUGE]})]), dropped_place=put('dropped', value=[dict(blocks={'3':dict(takes=['__class__','x',[]], gives=[], rest=[], form='tensor')}, lists={})]))

def rewritten(path, new, change=None, text=None, tensors=None):
    "A file of the second version, with another plan or other tensors"
    state,table = read_file(path)
    plan = {**table['plan'], 'tied':table.get('tied', {}), 'last':table['last'], 'version':2}
    if change is not None: change(plan)
    if tensors is not None: tensors(state)
    save_file(state, new, metadata={'fasterai.pruned':json.dumps(plan) if text is None else text})
    return new

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp('saved')/'a'
    save_pruned(done(net(), 'fold fc prune'), path)
    return path

@pytest.mark.parametrize('how', TAMPERED)
def test_tampered(how, made, tmp_path):
    unchanged(net(1), rewritten(made, tmp_path/'b', TAMPERED[how]), 'the plan is|the file is|later version|is damaged')

@pytest.mark.parametrize('text', ['', 'x', '[]', '3', '{}', '['*100_000, '{"a":'*100_000, '{"version":2}', '{"kept":'+'9'*10_000+'}', 'null', '{"version":2,"tied":{},"last":[],"kept":[]}'])
def test_tampered_texts(text, made, tmp_path):
    unchanged(net(1), rewritten(made, tmp_path/'b', text=text), 'damaged')

def test_tampered_tensors(made, tmp_path):
    def other(k, f):
        def change(state): state[k] = f(state[k])
        return lambda: rewritten(made, tmp_path/'b', tensors=change)
    for k in ('0.weight','0.bias','4.bias'): unchanged(net(1), other(k, lambda t: t[:1].clone())(), 'another architecture')
    unchanged(net(1), other('0.bias', lambda t: t.to(torch.int64))(), '0.bias is int64 there, float32 here')
    def gone(state): del state['0.bias']
    unchanged(net(1), rewritten(made, tmp_path/'b', tensors=gone), "it has no '0.bias', which")

def test_new_layers_take_no_memory_before_all_fits(made, tmp_path):
    "A terabyte that nobody asks for is never there, and one that is asked for is refused"
    linear = lambda n: dict(kind='Linear', args=dict(in_features=n, out_features=n, bias=False), frozen=[], children={})
    def unused(plan): plan['before'][1]['replaced']['new'] += [linear(2**20)]*100
    model = load_pruned(rewritten(made, tmp_path/'b', unused), net(1))
    assert same(model.state_dict(), done(net(), 'fold fc prune').state_dict())
    def used(plan):
        step = plan['before'][1]['replaced']
        step['new'].append(linear(2**20))
        step['children']['']['11'] = len(step['new'])-1
    unchanged(net(1), rewritten(made, tmp_path/'c', used), 'which this Sequential has')
    plan = json.loads(plan_text(pruned_plan(model)))
    used(plan)
    with pytest.raises(ValueError, match='new layers would have'): cut_to(net(1), plan)

def test_of_an_error_in_the_middle(made, monkeypatch):
    "Whatever goes wrong while tensors are written, the model is as it was"
    tensor,seen = File.tensor,[]
    def fails(self, name):
        seen.append(name)
        if len(seen)==5: raise ValueError('in the middle')
        return tensor(self, name)
    monkeypatch.setattr(File, 'tensor', fails)
    fresh = net(1)
    unchanged(fresh, made, 'in the middle')
    monkeypatch.undo()
    assert len(seen)==5 and equal(load_pruned(made, fresh), done(net(), 'fold fc prune'))

@pytest.mark.parametrize('order', ['','prune','fold','prune fold prune'])
def test_other_architectures(order, tmp_path):
    save_pruned(done(net(), order), tmp_path/'a')
    other = net(1)
    other[5] = nn.Conv2d(8, 13, 3, padding=1)
    other[6],other[8] = nn.BatchNorm2d(13),nn.Conv2d(13, 8, 1)
    unchanged(other, tmp_path/'a', 'another architecture')
    unchanged(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), tmp_path/'a', 'another architecture')

def test_files_of_the_first_version(tmp_path):
    save_pruned(model := done(net(), 'prune drop'), tmp_path/'a')
    def old(plan):
        del plan['last']
        plan['version'] = 1
    assert equal(model, load_pruned(rewritten(tmp_path/'a', tmp_path/'b', old), net(1)))

# --- plans without files

def test_copies_carry_the_plan(tmp_path):
    model = pickle.loads(pickle.dumps(copy.deepcopy(done(net(), 'prune fold fc'))))
    there_and_back(model, net(1), tmp_path)

def test_a_model_that_went_part_of_the_way():
    "A plan goes on from where a model is"
    model,fresh = done(net(), 'fold prune'),BN_Folder().fold(net(1), X)
    assert cut_to(fresh, pruned_plan(model)) and pruned_plan(fresh)==pruned_plan(model) and not cut_to(fresh, pruned_plan(model))
    with pytest.raises(ValueError, match='in another way'): cut_to(done(net(), 'prune'), pruned_plan(model))

def test_names_after_folding():
    "What is left of the original is told by the names that layers have now, and repair goes by it"
    model = done(net(), 'prune fold')
    assert model[3].norm.__class__ is nn.Identity and kept_of(model)['12.weight']==pruned_plan(model)['before'][0]['kept']['14.weight'] and '1.bias' not in kept_of(model)
    table = repair(model, BN_Folder().fold(net(), X), IMAGES, progress=False)
    assert (table.after<=table.before+1e-6).all()

def checkpointed(model): return {k:v for k,v in model.state_dict().items()}

@pytest.mark.parametrize('order', ['prune','fold','prune fold','fold prune','fc prune','drop'])
def test_checkpoints(order, tmp_path):
    "Into a model of the same form they load; a fresh one is cut, or refused in words if an optimizer would lose its parameters"
    learn = learner(done(net(), order))
    fit(learn)
    learn.save(tmp_path/'c')
    for again in (copy.deepcopy(learn.model), load_like(order)):
        other = learner(again)
        other.load(tmp_path/'c')
        assert same(learn.model.state_dict(), other.model.state_dict())
        fit(other)
    other = learner(net(1))
    if order=='prune':
        other.load(tmp_path/'c')
        assert same(learn.model.state_dict(), other.model.state_dict())
    else:
        was = copy.deepcopy(other.model.state_dict())
        with pytest.raises(ValueError, match='load_pruned'): other.load(tmp_path/'c')
        assert same(was, other.model.state_dict())

def load_like(order):
    fresh = net(1)
    cut_to(fresh, pruned_plan(done(net(), order)))
    return fresh

def test_a_network_of_that_form_takes_a_checkpoint(tmp_path):
    "Also one that somebody has built by hand, which knows of no plan"
    model = done(net(), 'fold')
    by_hand = copy.deepcopy(model)
    del by_hand._pruned
    torch.nn.init.zeros_(by_hand[0].weight)
    with carrying(model): state = model.state_dict()
    with receiving(by_hand, {}): by_hand.load_state_dict(state)
    assert same(model.state_dict(), by_hand.state_dict())

def test_lightning_goes_the_whole_way(tmp_path):
    with carrying(model := done(net(), 'prune fold')): state = model.state_dict()
    fresh = net(1)
    with receiving(fresh, {}, replaces=True): fresh.load_state_dict(state)
    assert equal(model, fresh)

# --- bars

@pytest.mark.parametrize('work', ['fold','prune','shrink'])
def test_bars(work, monkeypatch):
    "What takes longer than two seconds shows one bar, which covers the rest of its stages; what does not, none"
    shown = []
    def bar(it, show):
        shown.append((show,len(it)))
        return it
    monkeypatch.setattr(running, 'with_bar', bar)
    def run(show): return dict(fold=lambda: BN_Folder(progress=show).fold(net(), X), prune=lambda: Pruner(net(), 30, example_inputs=X, progress=show).prune_model(), shrink=lambda: Pruner(progress=show).prune_model(net(), X))[work]()
    monkeypatch.setattr(running, 'perf_counter', lambda: 0.)
    run(True)
    assert not shown
    clock = iter(range(10**6))
    monkeypatch.setattr(running, 'perf_counter', lambda: next(clock)*3)
    run(True), run(False)
    assert [o for o,_ in shown]==[True,False] and all(n>1 for _,n in shown)
