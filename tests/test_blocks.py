"Residual blocks: which modules are some, how much they do, and networks without them"
import math, warnings
from copy import deepcopy
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fasterai.analyze.all import block_influence, n_macs, n_params
from fasterai.core.blocks import Block, Influences, at_place, argument, cosines, feature_dim, residual_blocks, units
from fasterai.core.running import call_with, tensors_of, untouched
from fasterai.prune.all import Pruner, drop_blocks, load_pruned, save_pruned
from fasterai.prune.blocks import PassedOn
from tiny import Net, WRAPPERS, same, state, warnings_are

class Body(nn.Module):
    "A `forward` given as a function of the module and its input, and layers by name"
    def __init__(self, run, /, **layers):
        super().__init__()
        self.run = run
        for k,v in layers.items(): setattr(self, k, v)
    def forward(self, x, *args, **kwargs): return self.run(self, x, *args, **kwargs)

def residual(n=8, f=None): return Body(f or (lambda m, x: x+m.down(F.gelu(m.up(x)))), up=nn.Linear(n, 2*n), down=nn.Linear(2*n, n))

def net(n_blocks=4, seed=0, n=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, n), *(residual(n) for _ in range(n_blocks)), nn.Linear(n, 3)).eval()

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
def out(model, x):
    with untouched(model): return [t for t in tensors_of(call_with(model, x)) if t.is_floating_point()]
def equal(a, b, x): return all(torch.equal(s, t) for s,t in zip(out(a, x), out(b, x)))
def unit_names(model, x): return [n for n,b in residual_blocks(model, x).blocks.items() if b.unit]

ADDS = dict(
    plain=lambda m, x: x+m.f(x), other_side=lambda m, x: m.f(x)+x, in_place=lambda m, x: m.f(x).add_(x), onto_itself=lambda m, x: x.clone().add_(m.f(x)),
    less=lambda m, x: x-m.f(x), scaled=lambda m, x: x+.5*m.f(x), halved=lambda m, x: (x+m.f(x))*.5**.5, alpha=lambda m, x: torch.add(x, m.f(x), alpha=.1),
    fused=lambda m, x: torch.addcmul(x, m.f(x), torch.tensor(.5)), viewed=lambda m, x: (x.flatten()+m.f(x).flatten()).view_as(x),
    turned=lambda m, x: (x.mT+m.f(x).mT).mT, post_norm=lambda m, x: F.layer_norm(x+m.f(x), (8,)), activated=lambda m, x: (x+m.f(x)).relu(),
    twice=lambda m, x: (y:=x+m.f(x))+m.f(y), in_parts=lambda m, x: x+m.f(torch.cat([o.relu() for o in x.chunk(2, 1)], 1)), masked=lambda m, x: (x+m.f(x)).masked_fill(torch.zeros_like(x).bool(), 0), dropped_out=lambda m, x: x+F.dropout(m.f(x), .5, m.training),
    manual_norm=lambda m, x: ((y:=x+m.f(x))-y.mean(-1, keepdim=True))/(y.var(-1, keepdim=True)+1e-5).sqrt())

@pytest.mark.parametrize('f', ADDS.values(), ids=ADDS)
def test_added(f):
    "However the input is added, it is"
    model = nn.Sequential(nn.Linear(5, 8), Body(f, f=nn.Linear(8, 8)), nn.Linear(8, 3))
    assert unit_names(model, X)==['1']

OTHERS = dict(
    function=lambda m, x: m.f(x), gate=lambda m, x: x*m.f(x).sigmoid(), normed=lambda m, x: F.layer_norm(x, (8,), m.f.bias),
    manual_norm=lambda m, x: m.f.bias*(x-x.mean(-1, keepdim=True))/x.std(-1, keepdim=True), biased=lambda m, x: x+m.f.bias, tanh_gelu=lambda m, x: m.f(.5*x*(1+torch.tanh(.8*(x+.04*x**3)))),
    projected=lambda m, x: m.f(x)+m.f(x).relu(), joined=lambda m, x: torch.cat([x[:,:4],m.f(x)[:,4:]], 1), largest=lambda m, x: torch.maximum(x, m.f(x)), of_one_part=lambda m, x: x[:,:1]+m.f(x))

@pytest.mark.parametrize('f', OTHERS.values(), ids=OTHERS)
def test_not_added(f):
    "What only gates, scales, shifts or replaces its input is no block"
    model = nn.Sequential(nn.Linear(5, 8), Body(f, f=nn.Linear(8, 8)), nn.Linear(8, 3))
    blocks,why,_ = residual_blocks(model, X)
    assert not blocks and 'not added' in why['1'] and 'has no' not in why['1']
    with pytest.raises(ValueError, match='no residual block'): block_influence(model, X)

def conv_net():
    conv = lambda i, o, s=1: nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    block = lambda i, o, s=1: Body(lambda m, x: (m.skip(x)+m.f(x)).relu(), f=conv(i, o, s), skip=nn.Identity() if i==o and s==1 else nn.Conv2d(i, o, 1, s))
    return nn.Sequential(conv(3, 8), nn.Sequential(block(8, 8), block(8, 8)), nn.Sequential(block(8, 12), block(12, 12)), block(12, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)).eval()
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

def test_width_and_stride_stay():
    model = conv_net()
    blocks,why,_ = residual_blocks(model, IMAGES)
    assert [n for n,b in blocks.items() if b.unit]==['1.0','1.1','2.1'] and {b.dim for b in blocks.values()}=={1}
    assert 'from [4, 8, 8, 8] to [4, 12, 8, 8]' in why['2.0'] and 'changes shape' in why['3']

def encoder(n=3, **kwargs): return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **kwargs), n, enable_nested_tensor=False).eval()

@pytest.mark.parametrize('norm_first', [False,True])
def test_encoder(norm_first):
    model,x = nn.Sequential(nn.Linear(5, 8), encoder(norm_first=norm_first), nn.Linear(8, 3)).eval(),torch.randn(2, 6, 5)
    df = block_influence(model, x)
    assert list(df.block)==[f'1.layers.{i}' for i in range(3)]
    assert df.params.nunique()==1 and df.macs_share.sum()<1 and df.macs.sum()+6*8*8==n_macs(model, x)
    drop_blocks(model, ['1.layers.1'], x)
    assert list(block_influence(model, x).block)==['1.layers.0','1.layers.2']

def test_units_are_told_by_what_they_hold():
    "Pure logic: largest that are no chains"
    def b(name, kind, params): return name,Block(name, kind, params, 0, (0,'x',()), (), (), 'tensor', -1)
    A,B,C,D = (type(o, (nn.Module,), {}) for o in 'ABCD')
    found = dict([b('enc', D, 100), b('enc.0', C, 40), b('enc.0.att', A, 20), b('enc.0.mlp', B, 20), b('enc.1', C, 40), b('enc.1.att', A, 20), b('enc.1.mlp', B, 20)])
    assert units(found)==['enc.0','enc.1']
    assert units({k:v for k,v in found.items() if not k.startswith('enc.1')})==['enc']  # it has parameters beside its only layer
    assert units(dict([b('stage', nn.Sequential, 50), b('stage.0', A, 20)]))==['stage.0']
    assert units(dict([b('wrap', D, 20), b('wrap.m', A, 20)]))==['wrap.m']
    assert units(dict([b('layer', D, 100), b('layer.pos1', A, 2), b('layer.pos2', A, 2)]))==['layer']
    assert units(dict([b('ab', A, 9), b('abc', A, 9)]))==['ab','abc']  # a name that begins alike is not inside

def test_influence_is_the_mean_of_cosines():
    model = net()
    df,seen = block_influence(model, [X[:40],X[40:]]),[]
    model[2].register_forward_hook(lambda m, xs, y: seen.append((xs[0],y)))
    model(X)
    (x,y), = seen
    assert math.isclose(df.influence[1], 1-F.cosine_similarity(x.double(), y.double()).mean().item(), abs_tol=1e-12)

def test_influence_of_nothing_is_zero():
    model = net()
    for p in model[3].down.parameters(): nn.init.zeros_(p)
    df = block_influence(model, X)
    assert df.influence[2]==0 and (df.influence[[0,1,3]]>0).all()
    y = out(model, X)[0]
    assert drop_blocks(model, 1, X)==['3'] and torch.equal(out(model, X)[0], y)

def test_sorted_and_nested():
    df = block_influence(net(), X, sort=True)
    assert df.influence.is_monotonic_increasing and math.isclose(df.params_share.sum(), 4*n_params(residual())/n_params(net()))
    model = nn.Sequential(nn.Linear(5, 8), encoder(2))
    assert list(block_influence(model, torch.randn(2, 6, 5), nested=True).block)==['1','1.layers.0','1.layers.1']

def test_padding_does_not_count():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.block = nn.Embedding(9, 8),residual()
        def forward(self, input_ids, attention_mask=None): return self.block(self.emb(input_ids))
    model,ids = Words(),torch.tensor([[1,2,3],[4,0,0]])
    got = block_influence(model, dict(input_ids=ids, attention_mask=torch.tensor([[1,1,1],[1,0,0]]))).influence[0]
    seen = [block_influence(model, ids[:1,i:i+1]).influence[0] for i in range(3)]+[block_influence(model, ids[1:,:1]).influence[0]]
    assert math.isclose(got, sum(seen)/4, abs_tol=1e-9)

def test_feature_dim():
    assert feature_dim((2,8,4,4), (2,8,4,4), 1)==1 and feature_dim((2,5,8), (10,8), -1)==-1
    assert feature_dim((2,8,4,4), (2,4,4,8), -1)==1 and feature_dim((2,4,4,8), (2,8,4,4), 1)==-1

def test_cosines_of_zeros():
    z,o = torch.zeros(1, 3),torch.ones(1, 3)
    assert cosines(z, z, -1)==1 and cosines(z, o, -1)==0 and cosines(o, -o, -1)==-1

@pytest.mark.parametrize('wrapped', WRAPPERS)
def test_wrapped(wrapped):
    model = WRAPPERS[wrapped](net())
    assert list(block_influence(model, X).block)==list('1234')

def test_nothing_is_left_behind():
    model = net().train()
    model[1].register_forward_hook(lambda *args: None)
    was = state(model)
    hooks = [len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules()]
    block_influence(model, X)
    assert same(was, state(model)) and model.training and [len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules()]==hooks

class Told(nn.Module):
    "A block that gives its state in a tuple, with what it got and what it made"
    def __init__(self, makes=False):
        super().__init__()
        self.f,self.makes = nn.Linear(8, 8),makes
    def forward(self, h, mask=None, *, bias=None):
        if self.makes: bias = self.f.weight.sum()*torch.ones_like(h)
        return h+self.f(h)*mask, bias, None

def told_net(makes):
    layers = nn.ModuleList(Told(i==0 and makes) for i in range(3))
    def run(m, x):
        h,bias = m.emb(x),torch.zeros(8)
        for o in m.layers: h,bias,_ = o(h, torch.ones(8), bias=bias)
        return h+bias
    return Net(run, emb=nn.Linear(5, 8), layers=layers)

def test_what_is_passed_on_is_passed_on():
    model = told_net(False)
    nn.init.zeros_(model.layers[1].f.weight), nn.init.zeros_(model.layers[1].f.bias)
    y = model(X).detach()
    assert drop_blocks(model, 1, X)==['layers.1'] and isinstance(model.layers[1], PassedOn) and torch.equal(model(X).detach(), y)

def test_what_is_needed_later_stays():
    model = told_net(True)
    assert list(block_influence(model, X).block)==['layers.1','layers.2']
    with pytest.raises(ValueError, match='layers.0 cannot be dropped: something later reads what it gives beside'): drop_blocks(model, ['layers.0'], X)
    assert isinstance(model.layers[0], Told)

def test_keywords_and_places():
    assert argument((0,'h',()), (1,), {})==argument((0,'h',()), (), dict(h=1))==argument((0,'h',(1,)), ((0,1),), {})==1
    assert at_place(dict(a=[1,2]), ('a',1))==2
    model = Net(lambda m, x: m.b(h=m.a(x), mask=torch.ones(8))[0], a=nn.Linear(5, 8), b=Told())
    drop_blocks(model, ['b'], X)
    assert torch.equal(model(X), model.a(X))

@pytest.mark.parametrize('repair', [False,True])
def test_names_make_it_again(repair, tmp_path):
    model = net()
    names = drop_blocks(model, 2, X, repair=repair)
    assert len(names)==2 and all(isinstance(model.get_submodule(o), nn.Identity) for o in names)
    fresh = net(seed=1)
    assert drop_blocks(fresh, names)==names
    fresh.load_state_dict(model.state_dict())
    save_pruned(model, tmp_path/'net')
    assert equal(model, fresh, X) and equal(model, load_pruned(tmp_path/'net', net(seed=2)), X)

def test_before_and_after_cuts(tmp_path):
    torch.manual_seed(0)
    model = conv_net()
    for step in (lambda: Pruner(model, 25, example_inputs=IMAGES).prune_model(), lambda: drop_blocks(model, ['1.0'], IMAGES), lambda: Pruner(model, 25, example_inputs=IMAGES).prune_model(),
                 lambda: drop_blocks(model, ['2.1'], IMAGES)):
        with warnings_are('ignore'): step()
        save_pruned(model, tmp_path/'net')
        assert equal(model, load_pruned(tmp_path/'net', conv_net()), IMAGES)
    with pytest.raises(ValueError, match='another architecture'): load_pruned(tmp_path/'net', other:=net())
    assert same(state(other), state(net()))

def test_a_file_of_another_leaves_the_model(tmp_path):
    "What was dropped comes back where the names do not fit"
    model = net()
    drop_blocks(model, ['1'])
    save_pruned(model, tmp_path/'net')
    other = net(2)
    with pytest.raises(ValueError, match='another architecture'): load_pruned(tmp_path/'net', other)
    assert isinstance(other[1], Body) and not hasattr(other, '_pruned')

def test_repaired():
    "What a block did, the last layer can do as well: there is no nonlinearity in between"
    torch.manual_seed(0)
    linear = lambda: Body(lambda m, x: x+m.f(x), f=nn.Linear(8, 8))
    make = lambda: nn.Sequential(nn.Linear(8, 8), linear(), linear(), nn.Linear(8, 3))
    model,x = make(),torch.randn(400, 8)
    teacher,y = deepcopy(model),out(model, x)[0]
    bare = deepcopy(model)
    drop_blocks(bare, ['2'], x)
    drop_blocks(model, ['2'], x, repair=True)
    error = lambda m: ((out(m, x)[0]-y).square().sum()/y.square().sum()).item()
    assert error(bare)>.01 and error(model)<1e-6*error(bare)

def test_the_next_block_makes_up():
    "Its last weight is fitted to the sum that the network had there, not to what it added itself"
    torch.manual_seed(0)
    linear = lambda: Body(lambda m, x: x+m.down(m.up(x)), up=nn.Linear(8, 16), down=nn.Linear(16, 8))
    model,x = nn.Sequential(linear(), linear()),torch.randn(400, 8)
    y = out(model, x)[0]
    drop_blocks(model, ['0'], x, repair=True)
    assert ((out(model, x)[0]-y).square().sum()/y.square().sum()).item()<1e-9

REFUSED = {'did you mean .1.':(['1.'],{}), 'no block .nothing':(['nothing'],{}), '5 cannot be dropped: it changes shape':(['5'],{}), '1.down cannot be dropped: it changes':(['1.down'],{}),
    'number from 1 to 4':(9,dict(data=X)), 'number from 1 to 4, of those that can be dropped: 1, 2, 3, 4; not 0':(0,dict(data=X)), 'pass some as .data':(2,{}), 'whole number, or names of blocks, not 1.5':(1.5,dict(data=X)),
    'whole number, or names of blocks, not True':(True,dict(data=X)), 'no block to drop':([],{}), 'data has no batch':(1,dict(data=[])), 'repair needs inputs':(['1'],dict(repair=True)),
    'does not run with':(1,dict(data=torch.randn(2, 7)))}

@pytest.mark.parametrize('message', REFUSED)
def test_refused(message):
    blocks,kwargs = REFUSED[message]
    model,was = net(),state(net())
    with pytest.raises(ValueError, match=message): drop_blocks(model, blocks, **kwargs)
    assert same(was, state(model)) and all(isinstance(model[i], Body) for i in range(1, 5)) and not hasattr(model, '_pruned')

def test_a_part_of_what_goes_is_not_named():
    model = nn.Sequential(nn.Linear(5, 8), encoder(2))
    with pytest.raises(ValueError, match='1.layers.0 is a part of 1: name one'): drop_blocks(model, ['1','1.layers.0'], torch.randn(2, 6, 5))

def test_held_elsewhere():
    "A block that runs from a plain list as well"
    model = Net(lambda m, x: m.plain[0](m.a(x)), a=nn.Linear(5, 8), b=residual())
    model.plain = [model.b]
    with pytest.raises(ValueError, match='holds it outside'): drop_blocks(model, ['b'], X)
    assert isinstance(model.b, Body)

def test_modules_are_named():
    model = net()
    assert drop_blocks(model, model[2])==['2'] and drop_blocks(model, [model[1],'3'])==['1','3']

def test_a_block_under_two_names():
    block = residual()
    model = nn.Sequential(nn.Linear(5, 8), block, nn.ReLU(), block).eval()
    df = block_influence(model, X)
    assert list(df.block)==['1'] and df.macs[0]==2*2*8*16
    drop_blocks(model, ['1'])
    assert not any(isinstance(m, Body) for m in model.modules())

# models of transformers count their layers

def transformer(kind):
    tr = pytest.importorskip('transformers')
    small = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    halves = dict(d_model=8, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids = torch.tensor([[3,4,5,6],[7,8,9,3]])
    torch.manual_seed(0)
    makes = dict(
        wav2vec=lambda: (tr.Wav2Vec2Model(tr.Wav2Vec2Config(**small, conv_dim=(8,8,8), conv_stride=(5,2,2), conv_kernel=(10,3,3), num_feat_extract_layers=3, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)),
            dict(input_values=torch.randn(2, 300)), ['encoder.layers.1']),
        bert=lambda: (tr.BertModel(tr.BertConfig(**small)), dict(input_ids=ids, attention_mask=torch.ones_like(ids)), ['encoder.layer.0','encoder.layer.2']),
        gpt2=lambda: (tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=20, **ends)), ids, ['transformer.h.0']),
        llama=lambda: (tr.LlamaForCausalLM(tr.LlamaConfig(**small, num_key_value_heads=1, **ends)), ids, ['model.layers.0','model.layers.1']),
        qwen3=lambda: (tr.Qwen3ForCausalLM(tr.Qwen3Config(**small, num_key_value_heads=1, head_dim=4, layer_types=['sliding_attention','full_attention','full_attention'], sliding_window=3, use_sliding_window=True, **ends)),
            ids, ['model.layers.1']),
        t5=lambda: (tr.T5ForConditionalGeneration(tr.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2, vocab_size=20, decoder_start_token_id=0)), dict(input_ids=ids, decoder_input_ids=ids), ['encoder.block.1','decoder.block.1','decoder.block.2']),
        bart=lambda: (tr.BartModel(tr.BartConfig(**halves, vocab_size=20, forced_eos_token_id=2, **ends)), dict(input_ids=ids, decoder_input_ids=ids), ['encoder.layers.0','decoder.layers.2']))
    return makes[kind]()

@pytest.mark.parametrize('kind', ['bert','gpt2','llama','qwen3','t5','bart','wav2vec'])
def test_config_counts_the_rest(kind, tmp_path):
    model,x,names = transformer(kind)
    model.eval()
    stay,fresh,other = deepcopy(model),deepcopy(model),deepcopy(model)
    for n in names: # the same, by hand
        m = stay.get_submodule(n)
        m.forward = (lambda h, mask=None, bias=None, *args, **kwargs: (h,kwargs.get('position_bias', bias),kwargs.get('encoder_decoder_position_bias'))) if kind=='t5' else (lambda h, *args, **kwargs: h)
    with warnings_are('error'):
        assert drop_blocks(model, names, x)==names
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(out(model, x)[:1], out(stay, x)[:1]))
    model.save_pretrained(tmp_path)
    assert equal(model, type(model).from_pretrained(tmp_path).eval(), x)
    drop_blocks(fresh, names, x)
    fresh.load_state_dict(model.state_dict())
    save_pruned(model, tmp_path/'net')
    assert equal(model, fresh, x) and equal(model, load_pruned(tmp_path/'net', other), x)
    if hasattr(model, 'lm_head') and kind!='t5':  # places in the cache are those of the layers that are left
        made = [model.generate(x, max_new_tokens=4, do_sample=False, use_cache=o, pad_token_id=0, eos_token_id=None) for o in (True,False)]
        assert torch.equal(*made)

def test_config_that_cannot_tell_is_told():
    tr = pytest.importorskip('transformers')
    model = tr.AlbertModel(tr.AlbertConfig(hidden_size=8, embedding_size=4, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=20)).eval()
    n, = block_influence(model, ids:=torch.tensor([[3,4,5]])).block
    with pytest.warns(UserWarning, match='config does not record'): drop_blocks(model, [n], ids)

def test_numbers_of_the_influence():
    "Of batches that do not fit, or are not finite, no block is told"
    model = net()
    good,bad,nan = X[:3],X[:3,:4],X[:3]*torch.nan
    for f in (lambda data: block_influence(model, data, progress=False), lambda data: drop_blocks(model, 1, data, progress=False), lambda data: drop_blocks(model, 1, data, repair=True, progress=False)):
        was = state(model)
        with pytest.raises(ValueError, match='does not run with data'): f([good,bad])
        with pytest.raises(ValueError, match='not finite'): f([good,nan])
        assert same(was, state(model))
