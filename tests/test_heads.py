"Heads of attention, neurons and the hidden size of transformers: found by the flow of data, removed as asked, told by the configuration"
import copy, warnings
import pytest, torch, torchvision
import torch.nn.functional as F
import transformers as tr
from torch import nn
from fasterai.analyze.all import n_params
from fasterai.core.all import *
from fasterai.core.attention import HeadAttention, own_attention
from fasterai.core.graph import ChannelGraph
from fasterai.core.plan import pruned_plan
from fasterai.prune.all import *
from fasterai.prune.configs import follow_config
from fasterai.prune.kinds import Kinds
from fasterai.sparse.all import *
from tiny import Net, state, warnings_are

IDS = torch.arange(1, 9)[None]
SIZE = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(SIZE, num_key_value_heads=2)
DECODERS = dict(
    llama=lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED)),
    mistral=lambda: tr.MistralForCausalLM(tr.MistralConfig(**GROUPED)),
    qwen2=lambda: tr.Qwen2ForCausalLM(tr.Qwen2Config(**GROUPED)),
    qwen3=lambda: tr.Qwen3ForCausalLM(tr.Qwen3Config(**GROUPED, head_dim=8)),
    gemma2=lambda: tr.Gemma2ForCausalLM(tr.Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=16)),
    phi3=lambda: tr.Phi3ForCausalLM(tr.Phi3Config(**GROUPED)),
    neox=lambda: tr.GPTNeoXForCausalLM(tr.GPTNeoXConfig(**SIZE)),
    olmo=lambda: tr.OlmoForCausalLM(tr.OlmoConfig(**GROUPED)),
    gpt2=lambda: tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)))

def made(name):
    torch.manual_seed(0)
    return DECODERS[name]().eval()

def beside_embeddings(m):
    tables = {id(o.weight) for o in m.modules() if isinstance(o, nn.Embedding)}|{id(m.get_output_embeddings().weight)}
    return sum(p.numel() for p in m.parameters() if id(p) not in tables)

def saved_and_read(m, path):
    m.save_pretrained(path)
    return type(m).from_pretrained(path).eval()

def tokens(m, **kwargs): return m.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False, **kwargs)

def same_shapes(a, b): return {n:p.shape for n,p in a.named_parameters()}=={n:p.shape for n,p in b.named_parameters()}

@pytest.mark.parametrize('name', DECODERS)
def test_half_of_a_decoder(name, tmp_path):
    m = made(name)
    n = beside_embeddings(m)
    with warnings_are('error'): Pruner(m, 50, example_inputs=dict(input_ids=IDS)).prune_model()
    assert beside_embeddings(m)<.45*n and not same_shapes(m, made(name))
    assert torch.equal(tokens(m, use_cache=True), tokens(m, use_cache=False))
    y = m(IDS).logits
    again = saved_and_read(m, tmp_path)
    assert torch.equal(again(IDS).logits, y)
    save_pruned(m, tmp_path/'cut.safetensors')
    assert torch.equal(load_pruned(tmp_path/'cut.safetensors', made(name))(IDS).logits, y)
    m.set_attn_implementation('eager')
    torch.testing.assert_close(m(IDS).logits, y, atol=1e-4, rtol=1e-4)

WIDTHS = dict(heads={'q_proj':0, 'k_proj':0, 'v_proj':0, 'o_proj':1}, neurons={'gate_proj':0, 'up_proj':0, 'down_proj':1})
@pytest.mark.parametrize('kind', ['heads','neurons','hidden'])
def test_one_kind_alone(kind, tmp_path):
    m,was = made('llama'),dict(made('llama').named_parameters())
    Pruner(m, {kind:50}, example_inputs=dict(input_ids=IDS)).prune_model()
    for n,p in m.named_parameters():
        layer = n.split('.')[-2]
        inner = next((w[layer] for w in WIDTHS.values() if layer in w), None)  # the dimension that is not the hidden size
        for d,(a,b) in enumerate(zip(was[n].shape, p.shape)):
            mine = kind if inner==d and layer in WIDTHS.get(kind, {}) else 'hidden' if inner!=d and a==32 else None
            assert b==(a//2 if mine==kind else a), (n, d)
    assert torch.equal(saved_and_read(m, tmp_path)(IDS).logits, m(IDS).logits)

def test_nothing_at_zero():
    m,was = made('llama'),state(made('llama'))
    Pruner(m, 0, example_inputs=dict(input_ids=IDS)).prune_model()
    Pruner(m, dict(heads=0, neurons=0, hidden=0), example_inputs=dict(input_ids=IDS)).prune_model()
    assert m.config.to_dict()==made('llama').config.to_dict() and all(torch.equal(v, was[k]) for k,v in m.state_dict().items())

def test_one_head_of_keys_serves_all():
    m = tr.FalconForCausalLM(tr.FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, multi_query=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    Pruner(m, dict(heads=50), example_inputs=dict(input_ids=IDS)).prune_model()
    assert m.transformer.h[0].self_attention.query_key_value.weight.shape==(2*8+2*8, 32)

# by hand: heads in all forms
class Attention(nn.Module):
    "`how` queries, keys and values are made, and how they are multiplied"
    def __init__(self, how, by, dim=12, heads=3, size=4, bias=True):
        super().__init__()
        self.how,self.by,self.heads,self.size = how,by,heads,size
        n = heads*size
        if how=='fused': self.mix = nn.Linear(dim, 3*n, bias)
        else: self.ask,self.look,self.give = (nn.Linear(dim, n, bias) for _ in range(3))
        self.out = nn.Linear(n, dim)
        if by=='places': self.register_buffer('turn', torch.randn(size, dtype=torch.float64))
    def forward(self, x):
        if self.how=='fused': q,k,v = self.mix(x).unflatten(-1, (3,self.heads,self.size)).permute(2, 0, 3, 1, 4)
        else: q,k,v = (o(x).unflatten(-1, (self.heads,self.size)).transpose(1, 2) for o in (self.ask,self.look,self.give))
        if self.by=='places': q,k = q*self.turn,k*self.turn
        if self.by=='bmm':
            q,k,v = (o.flatten(0, 1) for o in (q,k,v))
            y = (torch.bmm(q, k.transpose(1, 2))*self.size**-.5).softmax(-1).bmm(v).unflatten(0, (-1,self.heads))
        elif self.by=='matmul': y = (q@k.transpose(-1, -2)*self.size**-.5).softmax(-1)@v
        else: y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.embed,self.attention,self.up,self.down,self.head = nn.Linear(5, 12),attention,nn.Linear(12, 10),nn.Linear(10, 12),nn.Linear(12, 2)
    def forward(self, x):
        x = self.embed(x)
        x = x+self.attention(x)
        return self.head(x+self.down(self.up(x).relu()))

def block(how='apart', by='sdpa', **kwargs):
    torch.manual_seed(0)
    return Block(Attention(how, by, **kwargs)).double().eval()

X = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FORMS = [(how,by) for how in ('fused','apart') for by in ('sdpa','matmul','places')]

@pytest.mark.parametrize('how,by', FORMS)
def test_zeroed_heads_go(how, by):
    m = block(how, by)
    Sparsifier(m, 'head', example_inputs=X).sparsify_model(34)
    y = m(X)
    new = Pruner(example_inputs=X).prune_model(m)
    torch.testing.assert_close(new(X), y, atol=1e-6, rtol=1e-6)
    made = new.attention.mix.weight if how=='fused' else torch.cat([o.weight for o in (new.attention.ask,new.attention.look,new.attention.give)])
    assert made.shape==(3*2*4, 12) and new.attention.out.weight.shape==(12, 8) and new.attention.heads==2 and new.attention.size==4

@pytest.mark.parametrize('how,by', FORMS)
def test_heads_by_ratio(how, by):
    m = block(how, by)
    with warnings_are('error'): Pruner(m, dict(heads=34), example_inputs=X).prune_model()
    assert m.attention.heads==2 and m.attention.out.weight.shape==(12, 8) and m.embed.weight.shape==(12, 5) and m.up.weight.shape==(10, 12)

def test_unread_heads_go():
    m = block()
    m.attention.out.weight.data[:,4:8] = 0
    y,new = m(X),Pruner(example_inputs=X).prune_model(m)
    torch.testing.assert_close(new(X), y, atol=1e-6, rtol=1e-6)
    assert new.attention.heads==2 and new.attention.ask.weight.shape==(8, 12)

def test_keys_of_zero_alone_go_nowhere():
    "A head whose queries and keys are zero still gives the mean of its values"
    m = block()
    for o in (m.attention.ask,m.attention.look): o.weight.data[:4],o.bias.data[:4] = 0,0
    with warnings_are('ignore'): new = Pruner(example_inputs=X).prune_model(m)
    assert new.attention.heads==3
    torch.testing.assert_close(new(X), m(X), atol=1e-6, rtol=1e-6)

def test_heads_that_the_code_counts():
    "Slopes of a fixed number of heads keep them, and the reason is given"
    class Sloped(Attention):
        def forward(self, x):
            q,k,v = (o(x).unflatten(-1, (self.heads,self.size)).transpose(1, 2) for o in (self.ask,self.look,self.give))
            slopes = torch.tensor([1.,.5,.25], dtype=x.dtype).view(3, 1, 1)
            return self.out(((q@k.transpose(-1, -2)+slopes).softmax(-1)@v).transpose(1, 2).flatten(2))
    m = Block(Sloped('apart', 'matmul')).double().eval()
    with pytest.raises(ValueError, match='no heads of this Block can be removed: .*fixed size'): Pruner(m, dict(heads=50), example_inputs=X).prune_model()
    assert m.attention.out.weight.shape==(12, 12)

def test_a_bias_for_each_head_goes_with_it():
    class Biased(Attention):
        def __init__(self):
            super().__init__('apart', 'matmul')
            self.table = nn.Embedding(9, 3)
        def forward(self, x):
            q,k,v = (o(x).unflatten(-1, (self.heads,self.size)).transpose(1, 2) for o in (self.ask,self.look,self.give))
            at = torch.arange(x.shape[1])
            bias = self.table((at[:,None]-at).abs()).permute(2, 0, 1)
            return self.out(((q@k.transpose(-1, -2)+bias).softmax(-1)@v).transpose(1, 2).flatten(2))
    m = Block(Biased()).double().eval()
    Pruner(m, dict(heads=34), example_inputs=X).prune_model()
    assert m.attention.table.weight.shape==(9, 2) and m.attention.heads==2

# nn.MultiheadAttention
def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True, dropout=0.)
    return nn.Sequential(nn.Linear(5, 12), layer, nn.Linear(12, 2)).double().eval()

def test_heads_of_torch(tmp_path):
    m = encoder()
    Sparsifier(m, 'head').sparsify_model(34)
    y,new = m(X),Pruner(example_inputs=X).prune_model(m)
    torch.testing.assert_close(new(X), y, atol=1e-6, rtol=1e-6)
    att = new[1].self_attn
    assert isinstance(att, HeadAttention) and att.in_proj_weight.shape==(24, 12) and att.num_heads==2 and type(m[1].self_attn) is nn.MultiheadAttention
    save_pruned(new, tmp_path/'a.safetensors')
    assert torch.equal(load_pruned(tmp_path/'a.safetensors', encoder())(X), new(X))

def test_heads_of_torch_by_ratio():
    m = encoder()
    Pruner(m, dict(heads=34, hidden=25), example_inputs=X).prune_model()
    att = m[1].self_attn
    assert att.in_proj_weight.shape==(24, 9) and att.out_proj.weight.shape==(9, 8) and m[0].weight.shape==(9, 5) and m[1].linear1.weight.shape==(10, 9)
    m(X).sum().backward()
    assert all(p.grad is not None for p in m.parameters())

# what may be asked for
def test_names_and_types_come_first():
    m = block()
    m.heads,forward = nn.Linear(2, 2).double(),type(m).forward
    with pytest.raises(ValueError, match="'heads' can be removed"): Pruner(m, dict(heads=50), example_inputs=X).prune_model()  # a layer of that name, which did not run
    m = block()
    Pruner(m, {nn.Linear:50, 'up':20}, example_inputs=X).prune_model()
    assert m.up.weight.shape[0]==8 and m.embed.weight.shape[0]==6
    m = block()
    Pruner(m, {'up':40, 'neurons':20, 'hidden':50}, example_inputs=X).prune_model()
    assert m.up.weight.shape==(6, 6) and m.attention.out.weight.shape==(6, 12)

def test_a_module_that_only_contains_layers_is_no_layer():
    "The classifier of torchvision's transformer is called `heads`"
    m = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64).eval()
    Pruner(m, dict(heads=50), example_inputs=torch.randn(2,3,32,32)).prune_model()
    assert [(o.self_attention.num_heads,o.mlp[0].out_features) for o in m.encoder.layers]==[(2,64)]*2 and m.conv_proj.out_channels==32

def test_heads_as_wide_as_the_hidden_size_by_the_code():
    "They are not removed alone, and the message says what removes them"
    m = torchvision.models.SwinTransformer([2,2], 16, [2], [2], [4,4]).eval()
    x,before = torch.randn(2,3,32,32),n_params(m)
    with pytest.raises(ValueError, match='no heads .* as wide as the hidden size .* ask for hidden'): Pruner(m, dict(heads=50), example_inputs=x).prune_model()
    assert n_params(m)==before
    Pruner(m, dict(hidden=50), example_inputs=x).prune_model()
    assert n_params(m)<.6*before and m(x).shape==(2,1000)

def test_words():
    m,was = block(),state(block())
    with pytest.raises(ValueError, match='heads'): Pruner(m, dict(haeds=50))
    with pytest.raises(ValueError, match='no channel of Conv2d'): Pruner(m, {nn.Conv2d:50}, example_inputs=X).prune_model()
    with pytest.raises(ValueError, match='no heads of this Sequential can be removed'): Pruner(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), dict(heads=50)).prune_model()
    assert all(torch.equal(v, was[k]) for k,v in m.state_dict().items())

def test_uneven_widths_are_told(tmp_path):
    m,config = made('llama'),made('llama').config.to_dict()
    with pytest.warns(UserWarning, match='save_pruned'): Pruner(m, {'model.layers.0.mlp.up_proj':50}, example_inputs=dict(input_ids=IDS)).prune_model()
    assert m.config.to_dict()==config
    save_pruned(m, tmp_path/'a.safetensors')
    assert torch.equal(load_pruned(tmp_path/'a.safetensors', made('llama'))(IDS).logits, m(IDS).logits)

def test_lossless_and_its_configuration(tmp_path):
    m = made('llama')
    with torch.no_grad():
        for o in m.model.layers: o.mlp.down_proj.weight[:,:8] = 0
    Sparsifier(m, 'head', example_inputs=dict(input_ids=IDS)).sparsify_model(50)
    new = Pruner(example_inputs=dict(input_ids=IDS)).prune_model(m)
    torch.testing.assert_close(new(IDS).logits, m(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (new.config.num_attention_heads,new.config.num_key_value_heads,new.config.intermediate_size)==(2, 1, 40) and m.config.num_attention_heads==4
    assert torch.equal(saved_and_read(new, tmp_path)(IDS).logits, new(IDS).logits)

TEXT = dict(
    bert=lambda: tr.BertModel(tr.BertConfig(**SIZE)),
    t5=lambda: tr.T5EncoderModel(tr.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
    gpt2=lambda: tr.GPT2Model(tr.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32)))

@pytest.mark.parametrize('name', TEXT)
def test_zeroed_heads_of_transformers_go(name):
    torch.manual_seed(0)
    m = TEXT[name]().eval().double()
    Sparsifier(m, 'head', example_inputs=dict(input_ids=IDS)).sparsify_model(50)
    with warnings_are('ignore'): new = Pruner(example_inputs=dict(input_ids=IDS)).prune_model(m)
    torch.testing.assert_close(new(input_ids=IDS)[0], m(input_ids=IDS)[0], atol=1e-6, rtol=1e-6)
    gone = sum(p.numel() for p in m.parameters())-sum(p.numel() for p in new.parameters())
    assert gone>=2*.5*4*32*32-500  # half of each attention

def test_an_error_changes_nothing():
    m = encoder()
    names = [n for n,_ in m.named_modules()]
    with pytest.raises(ValueError, match='no neurons'): Pruner(m, dict(heads=34, neurons=50), ignored_layers=['1.linear1'], example_inputs=X).prune_model()
    assert type(m[1].self_attn) is nn.MultiheadAttention and [n for n,_ in m.named_modules()]==names and '_pruned' not in vars(m)

@pytest.mark.parametrize('name', ['llama','phi3'])
def test_models_of_one_configuration(name):
    "Another model that shares the configuration stays as it is"
    m = made(name)
    other = type(m)(m.config).eval()
    y = other(IDS).logits
    Pruner(m, 50, example_inputs=dict(input_ids=IDS)).prune_model()
    assert torch.equal(other(IDS).logits, y) and other.config.num_attention_heads==4 and m.config.num_attention_heads==2
