"""Checkpoints in files: the zeros that a Sparsifier gives in memory, bit for bit; all other bytes as they were; stopped anywhere, and gone on with"""
import errno, json, os, shutil, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D
from fasterai.core import shards
from fasterai.core.criteria import Criteria, pointwise
from fasterai.core.granularity import axes_of
from fasterai.core.shards import Checkpoint
from fasterai.sparse import checkpoint as ck
from fasterai.sparse.checkpoint import sparsify_checkpoint
from fasterai.sparse.sparsifier import Sparsifier

ROOT = Path(__file__).parent.parent
TYPES = nn.Linear,nn.Conv2d,nn.ConvTranspose2d,Conv1D

class Net(nn.Module):
    "Convolutions and matrices, some with sizes that no tile or group fits"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Conv2d(3, 8, 3),nn.Conv2d(8, 12, 3, bias=False)
        self.c,self.d,self.emb = nn.Linear(48, 24),nn.Linear(24, 10),nn.Embedding(7, 5)
    def forward(self, x): return self.d(self.c(self.b(self.a(x).relu()).relu().flatten(1)).relu())

X = torch.randn(1, 3, 6, 6)

def net(dtype=torch.float32, coarse=False):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            if coarse: p.copy_((p*8).round()/8)  # many equals
    if dtype=='mixed':
        for layer,t in zip(model.children(), (torch.float32,torch.bfloat16,torch.float16,torch.float32)): layer.to(t)
    elif dtype.itemsize==1:
        for p in model.parameters(): p.data = p.data.to(dtype)
    else: model.to(dtype)
    return model

def put(state, folder, n=1):
    "`state` in a folder of `n` shards"
    folder.mkdir()
    names,where = list(state),{}
    for i in range(n):
        file = f'model-{i+1:05}-of-{n:05}.safetensors' if n>1 else 'model.safetensors'
        part = {k:state[k].contiguous() for k in names[i::n]}
        save_file(part, folder/file, metadata=dict(format='pt', part=str(i)))
        where |= dict.fromkeys(part, file)
    if n>1: (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=where), indent=2))
    (folder/'config.json').write_text('{"model_type": "none"}')
    return folder

def got(folder): return {k:v for f in sorted(folder.glob('*.safetensors')) for k,v in load_file(f).items()}
def bits(t): return t.detach().contiguous().reshape(-1).view(torch.uint8)
def files(folder): return {p.relative_to(folder).as_posix():p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def check(model, found, table):
    want = model.state_dict()
    assert want.keys()==found.keys()
    for k,v in want.items(): assert torch.equal(bits(v), bits(found[k])), k
    for o in table.itertuples():
        if not o.copied: assert o.zeros==int((want[o.tensor].float()==0).sum()) and o.sparsity==pytest.approx(100*o.zeros/o.weights)

@pytest.fixture
def pieces(monkeypatch):
    "Pieces of a few numbers, and no scores that are kept"
    monkeypatch.setattr(ck, 'PIECE', 64)
    monkeypatch.setattr(shards, 'PIECE', 64)
    monkeypatch.setattr(shards, '_PART', 100)
    monkeypatch.setattr(ck, '_CHUNK', 40)

DTYPES = [torch.float32,torch.bfloat16,torch.float16,torch.float64,torch.float8_e4m3fn,torch.float8_e5m2,'mixed']

@pytest.mark.parametrize('context', ['local','global','isomorphic','erk','uniform_plus','lamp'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_weights(dtype, context, tmp_path, pieces):
    "Weight by weight, equals by position, whatever the type; and the last one of a layer stays"
    for i,(sparsity,criteria) in enumerate(((50,'large_final'),(73.3,'small_final'),(100,'large_final'),(40,'squared_final'))):
        model = net(dtype, coarse=i%2==0)
        source = put(model.state_dict(), tmp_path/f'source{i}', 1+i%3)
        table = sparsify_checkpoint(source, tmp_path/f'target{i}', sparsity, 'weight', context, criteria, order=list(model.state_dict()))
        Sparsifier(model, 'weight', context, criteria, layer_type=TYPES).sparsify_model(sparsity)
        check(model, got(tmp_path/f'target{i}'), table)

@pytest.mark.parametrize('kept', [True,False], ids=['kept','counted'])
@pytest.mark.parametrize('granularity,sparsity', [('2:4',50),('2:4',20),('1:4',75),('3:5',30),('block(4,4)',60),('block(3,2)',50),('filter',50),('row',40),('column',50),('kernel',70),('channel',50),
    ('layer',50),('o i',30),('shared_weight',50)])
def test_granularities(granularity, sparsity, kept, tmp_path, monkeypatch, pieces):
    if not kept: monkeypatch.setattr(ck, '_FEW', 0)
    for i,(dtype,context) in enumerate(((torch.float32,'local'),(torch.bfloat16,'global'),(torch.float16,'erk'))):
        model = net(dtype, coarse=i==1)
        source = put(model.state_dict(), tmp_path/f'source{i}', 2)
        table = sparsify_checkpoint(source, tmp_path/f'target{i}', sparsity, granularity, context, order=list(model.state_dict()))
        Sparsifier(model, granularity, context, layer_type=TYPES, example_inputs=X.to(dtype)).sparsify_model(sparsity)
        check(model, got(tmp_path/f'target{i}'), table)

@settings(max_examples=25)
@given(rows=st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=12), min_size=1, max_size=5), sparsity=st.floats(0, 100), context=st.sampled_from(['local','global']),
    dtype=st.sampled_from([torch.float32,torch.bfloat16,torch.float64]), threads=st.integers(1, 3))
def test_equals(rows, sparsity, context, dtype, threads, tmp_path_factory):
    "Few different numbers: most are equals"
    tmp_path = tmp_path_factory.mktemp('equals')
    model = nn.Sequential(*[nn.Linear(len(r), 1, bias=False) for r in rows]).to(dtype)
    with torch.no_grad():
        for layer,r in zip(model, rows): layer.weight.copy_(torch.tensor([r]))
    if 0<sparsity<=1: sparsity = 0
    put(model.state_dict(), tmp_path/'source', min(2, len(rows)))
    table = sparsify_checkpoint(tmp_path/'source', tmp_path/'target', sparsity, 'weight', context, threads=threads)
    Sparsifier(model, 'weight', context, layer_type=nn.Linear).sparsify_model(sparsity)
    check(model, got(tmp_path/'target'), table)

def test_normalizer_and_own(tmp_path, pieces):
    "A criteria with a normalizer, one of a user's own, and a context of a user's own"
    @pointwise
    def cubed(w): return w.abs()**3
    def first_alone(sizes, sparsity):
        first,*rest = sizes
        return {first: sizes[first]//4, tuple(rest): int(sum(sizes[o] for o in rest)*sparsity/100)}
    for i,(granularity,context,criteria) in enumerate((('weight','global',Criteria('large_final', normalizer='mean')), ('row','global',Criteria('large_final','max',normalizer='max')), ('weight',first_alone,cubed), ('block(2,2)',first_alone,Criteria(cubed, 'sum')))):
        model = net()
        put(model.state_dict(), tmp_path/f'source{i}')
        table = sparsify_checkpoint(tmp_path/f'source{i}', tmp_path/f'target{i}', 50, granularity, context, criteria, order=list(model.state_dict()))
        Sparsifier(model, granularity, context, criteria, layer_type=TYPES, example_inputs=X).sparsify_model(50)
        check(model, got(tmp_path/f'target{i}'), table)

def test_all_else_is_copied(tmp_path):
    "Headers, other tensors, and all other files are the same bytes; a folder of one file and of three get the same zeros"
    model = net()
    state = dict(model.state_dict(), steps=torch.arange(5), flags=torch.tensor([True,False]), empty=torch.zeros(0, 3), scalar=torch.tensor(2.))
    for n in (1,3):
        source = put(state, tmp_path/f'source{n}', n)
        (source/'tokenizer').mkdir()
        (source/'tokenizer/vocab.bin').write_bytes(bytes(range(256))*100)
        sparsify_checkpoint(source, tmp_path/f'target{n}', 50, context='global')
        old,new = files(source),files(tmp_path/f'target{n}')
        assert old.keys()==new.keys()
        for k in old:
            head = 8+int.from_bytes(old[k][:8], 'little') if k.endswith('.safetensors') else len(old[k])
            assert old[k][:head]==new[k][:head] and len(old[k])==len(new[k])
        assert safe_open(tmp_path/f'target{n}'/list(new)[1], 'pt').metadata()==safe_open(source/list(new)[1], 'pt').metadata()
        assert files(source)==old
    a,b = got(tmp_path/'target1'),got(tmp_path/'target3')
    assert all(torch.equal(a[k], b[k]) for k in a) and torch.equal(a['steps'], state['steps']) and torch.equal(a['emb.weight'], state['emb.weight'])

def test_a_file(tmp_path):
    model = net()
    save_file(model.state_dict(), tmp_path/'a.safetensors')
    table = sparsify_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', 50)
    Sparsifier(model, layer_type=TYPES).sparsify_model(50)
    check(model, load_file(tmp_path/'b.safetensors'), table)
    assert {p.name for p in tmp_path.iterdir()}=={'a.safetensors','b.safetensors'}
    why = dict(zip(table.tensor, table.copied))
    assert why['emb.weight']=='named as an embedding' and why['a.bias']=='one axis' and why['a.weight']=='' and table[table.copied!=''].zeros.isna().all()

# Which tensors

small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
MODELS = dict(llama=lambda: LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2)), bert=lambda: BertModel(BertConfig(**small, max_position_embeddings=16)),
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)),
    t5=lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40)))

@pytest.mark.parametrize('name', MODELS)
def test_of_transformers(name, tmp_path):
    "As `save_pretrained` writes them, in several shards: linear layers are found by name, tied ones are where they are kept, and the axes are those of the layers"
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path/'source', max_shard_size='12KB')
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    wanted = {n+'.weight':m for n,m in model.named_modules() if isinstance(m, TYPES) and id(m.weight) not in tied}
    table = sparsify_checkpoint(tmp_path/'source', tmp_path/'target', 50, 'column', order=[n for n,_ in model.named_parameters()])
    taken = table[table.copied=='']
    assert dict(zip(taken.tensor, taken['axes']))=={n:axes_of(m) for n,m in wanted.items()} and table.file.nunique()>1
    new = type(model).from_pretrained(tmp_path/'target').state_dict()
    old = {n:v.clone() for n,v in model.state_dict().items()}
    for n,m in wanted.items(): Sparsifier(m, 'column', layer_type=TYPES).sparsify_model(50)
    assert all(torch.equal(v, new[n]) for n,v in model.state_dict().items()) and any(not torch.equal(v, new[n]) for n,v in old.items())

def test_largest_numbers_go(tmp_path, pieces):
    "A type of one byte that has no infinity: all but the last of its largest"
    for i,dtype in enumerate((torch.float8_e4m3fnuz,torch.float8_e4m3fn,torch.float8_e5m2fnuz)):
        w = torch.full((10, 10), torch.finfo(dtype).max).to(dtype)
        put({'a.weight':w}, tmp_path/f'source{i}')
        sparsify_checkpoint(tmp_path/f'source{i}', tmp_path/f'target{i}', 100)
        assert got(tmp_path/f'target{i}')['a.weight'].float().flatten().nonzero().tolist()==[[99]]

def test_stopped_at_the_end(tmp_path):
    "A file that was there already when its journal should have gone"
    model = net()
    save_file(model.state_dict(), tmp_path/'a.safetensors')
    for n in (2,3,4):
        with pytest.MonkeyPatch.context() as m:
            stop_at(m, 99, Stop)
            m.setattr(shards.Path, 'unlink', lambda self, missing_ok=False: (_ for _ in ()).throw(Stop()))
            with pytest.raises(Stop): sparsify_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', 50)
        assert (tmp_path/'b.safetensors').exists() and (tmp_path/'.b.safetensors.journal').exists()
        sparsify_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', 50)
        assert {p.name for p in tmp_path.iterdir()}=={'a.safetensors','b.safetensors'}
        (tmp_path/'b.safetensors').unlink()

def test_aliases(tmp_path):
    "`save_model` keeps one of two names of a tensor, and says so in the header: both may be asked for"
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    save_model(model, tmp_path/'a.safetensors')
    there = set(load_file(tmp_path/'a.safetensors'))
    other = ({'0.weight','1.weight'}-there).pop()
    table = sparsify_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', 50, layers=other)
    assert table.zeros.tolist()==[18]

def test_transposed_convolution(tmp_path, pieces):
    model = nn.Sequential(nn.ConvTranspose2d(8, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2))
    put(model.state_dict(), tmp_path/'source')
    table = sparsify_checkpoint(tmp_path/'source', tmp_path/'target', 50, 'block(2,4)', axes={'2':'iohw'})
    assert table[table.copied=='']['axes'].tolist()==['iohw','iohw']
    Sparsifier(model, 'block(2,4)', layer_type=TYPES).sparsify_model(50)
    check(model, got(tmp_path/'target'), table)
    with pytest.raises(ValueError, match='in some order'): sparsify_checkpoint(tmp_path/'source', tmp_path/'no', 50, axes={'2':'oi'})
    with pytest.raises(ValueError, match="called '3': the closest"): sparsify_checkpoint(tmp_path/'source', tmp_path/'no', 50, axes={'3':'iohw'})

def test_layers_and_levels(tmp_path):
    model = net()
    put(model.state_dict(), tmp_path/'source')
    table = sparsify_checkpoint(tmp_path/'source', tmp_path/'target', {'a':50, 'c.weight':80, '[ad]':30}, layers=['[acd]','emb'])
    zeros = {o.tensor:o.zeros for o in table.itertuples() if not o.copied}
    assert zeros=={'a.weight':108, 'c.weight':921, 'd.weight':72, 'emb.weight':0}
    levels = dict(a=50, c=80, d=30)
    Sparsifier(model, layer_type=(nn.Linear,nn.Conv2d)).sparsify_model(levels)
    check(model, got(tmp_path/'target'), table)
    assert table[table.tensor=='b.weight'].copied.item()=='not in layers'

REFUSED = [(dict(layers='a.wieght'), ValueError, "no weight is called 'a.wieght': the closest are a.weight"), (dict(layers=['*.bias']), ValueError, 'a.bias has one axis'), (dict(layers=[3]), TypeError, 'patterns'),
    (dict(sparsity={'zz':50}), ValueError, "no weight is called 'zz'"), (dict(sparsity={'a':50}, context='global'), ValueError, 'leaves nothing to share'), (dict(sparsity=101), ValueError, 'from 0 to 100'),
    (dict(granularity='2:4', sparsity=60), ValueError, 'cannot be reached'), (dict(granularity='head'), ValueError, 'use a Sparsifier'), (dict(granularity='filtre'), ValueError, "did you mean 'filter'"),
    (dict(granularity='shared_channel'), ValueError, "c, whose weight has the axes 'o i', has no granularity 'shared_channel'"), (dict(granularity=type('Own', (), dict(bind=lambda *a: None))()), ValueError, 'granularity of your own'),
    (dict(context='globl'), ValueError, "did you mean 'global'"), (dict(criteria='wanda'), ValueError, 'needs act'), (dict(criteria='movement'), ValueError, 'needs w0'), (dict(criteria='random'), ValueError, 'pointwise'),
    (dict(criteria=lambda w: w.norm()+w), ValueError, 'pointwise'), (dict(order=['a.weight']), ValueError, 'order lacks b.weight'), (dict(order='a.weight'), TypeError, 'order is a list'), (dict(axes=['oi']), TypeError, 'axes are a dict'),
    (dict(threads=0), ValueError, 'threads')]

@pytest.mark.parametrize('change,kind,words', REFUSED, ids=range(len(REFUSED)))
def test_refused(change, kind, words, tmp_path):
    "Before anything is written"
    put(net().state_dict(), tmp_path/'source')
    args = dict(source=tmp_path/'source', target=tmp_path/'new/target', sparsity=50) | change
    with pytest.raises(kind, match=words.replace('(','.')): sparsify_checkpoint(**args)
    assert not (tmp_path/'new').exists()

def test_places(tmp_path):
    "Where source and target may be"
    source = put(net().state_dict(), tmp_path/'source', 2)
    before = files(source)
    def refused(kind, words, *args):
        with pytest.raises(kind, match=words): sparsify_checkpoint(*args, 50)
    refused(ValueError, 'the same', source, source)
    refused(ValueError, 'inside of each other', source, source/'target')
    refused(ValueError, 'inside of each other', source, tmp_path)
    (tmp_path/'link').symlink_to(source)
    refused(ValueError, 'the same', source, tmp_path/'link')
    (tmp_path/'full').mkdir()
    (tmp_path/'full/a').write_text('mine')
    refused(FileExistsError, 'has files already', source, tmp_path/'full')
    one = source/'model-00001-of-00002.safetensors'
    refused(ValueError, 'the same', one, one)
    refused(IsADirectoryError, 'name a file', one, tmp_path/'full')
    refused(FileExistsError, 'is there already', one, tmp_path/'full/a')
    refused(FileNotFoundError, 'needs a folder', one, tmp_path/'nowhere/b.safetensors')
    refused(FileExistsError, 'is a file', source, tmp_path/'full/a')
    refused(FileNotFoundError, 'is not there', tmp_path/'nowhere', tmp_path/'b')
    (tmp_path/'pipe').mkdir()
    shutil.copytree(source, tmp_path/'pipe/unet')
    refused(ValueError, 'pass one of its folders unet', tmp_path/'pipe', tmp_path/'b')
    (tmp_path/'old').mkdir()
    (tmp_path/'old/pytorch_model.bin').write_bytes(b'x')
    refused(ValueError, 'pytorch_model.bin is no such file', tmp_path/'old', tmp_path/'b')
    assert files(source)==before and not (tmp_path/'b').exists()

def test_damaged(tmp_path):
    source = put(net().state_dict(), tmp_path/'source')
    file = source/'model.safetensors'
    data = file.read_bytes()
    n = int.from_bytes(data[:8], 'little')
    head = json.loads(data[8:8+n])
    def with_header(h):
        h = json.dumps(h).encode()
        return len(h).to_bytes(8, 'little')+h+data[8+n:]
    moved = {k:dict(v, data_offsets=[o+8 for o in v['data_offsets']]) if k=='a.weight' else v for k,v in head.items()}
    for bad,words in ((data[:-1],'damaged'),(data+b'x','damaged'),(data[:20],'no safetensors file'),(b'','no safetensors file'),(b'version https://git-lfs','no safetensors file'),
        ((5).to_bytes(8, 'little')+b'{"a":'+data,'no JSON'),((2).to_bytes(8, 'little')+b'[]','no dict'),(with_header(moved),'not where it should be'),(with_header(dict(head, a=3)),'does not say where')):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=words): sparsify_checkpoint(source, tmp_path/'b', 50)
    file.write_bytes(data)
    index = source/'model.safetensors.index.json'
    for text,kind,words in (('{}',ValueError,'no weight_map'),('{"weight_map": {"a": "../model.safetensors"}}',ValueError,'not beside it'),('{"weight_map": {"a": "gone.safetensors"}}',FileNotFoundError,'not there')):
        index.write_text(text)
        with pytest.raises(kind, match=words): sparsify_checkpoint(source, tmp_path/'b', 50)
    assert not (tmp_path/'b').exists()

def test_two_checkpoints_in_a_folder(tmp_path):
    "What the index does not name is copied; of two indexes one is passed"
    source = put(net().state_dict(), tmp_path/'source', 2)
    save_file(net().state_dict(), source/'consolidated.safetensors')
    sparsify_checkpoint(source, tmp_path/'a', 50)
    assert (tmp_path/'a/consolidated.safetensors').read_bytes()==(source/'consolidated.safetensors').read_bytes()
    index = (source/'model.safetensors.index.json').read_text()
    (source/'model.fp16.safetensors.index.json').write_text(index)
    with pytest.raises(ValueError, match='2 checkpoints'): sparsify_checkpoint(source, tmp_path/'b', 50)
    sparsify_checkpoint(source/'model.safetensors.index.json', tmp_path/'b', 50)
    assert {k:v for k,v in files(tmp_path/'b').items() if 'fp16' not in k}==files(tmp_path/'a')

@pytest.mark.parametrize('dtype', DTYPES[:-1]+[torch.float8_e4m3fnuz,torch.float8_e5m2fnuz], ids=str)
@pytest.mark.parametrize('how', [('weight','local'),('weight','global'),('2:4','local'),('row','local'),('block(2,2)','global')], ids=str)
def test_not_finite(dtype, how, tmp_path, monkeypatch, pieces):
    "Refused by name, with nothing left behind"
    monkeypatch.setattr(ck, '_FEW', 0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    state = {k:v.to(dtype) for k,v in model.state_dict().items()}
    if dtype.itemsize==1: state['1.weight'].view(torch.uint8)[3,4] = 0x80 if 'fnuz' in str(dtype) else 0x7f
    else: state['1.weight'][3,4] = float('nan' if how[1]=='local' else 'inf')
    put(state, tmp_path/'source', 2)
    with pytest.raises(ValueError, match='1.weight in .* nan or infinite'): sparsify_checkpoint(tmp_path/'source', tmp_path/'target', 50, *how)
    assert not (tmp_path/'target').exists()

def test_warnings(tmp_path):
    def told(state, words, *args):
        put(state, tmp_path/words[:5])
        with pytest.warns(UserWarning, match=words): sparsify_checkpoint(tmp_path/words[:5], tmp_path/(words[:5]+'.new'), *args)
    told({'a.weight':torch.randn(8, 8).to(torch.float8_e4m3fn), 'a.weight_scale_inv':torch.ones(1, 1)}, 'a.weight has scales beside', 50)
    told(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict(), 'which normalization follows', 50, 'filter')
    told({'a.weight':torch.randn(8, 5, 3, 3), 'b.weight':torch.randn(8, 2)}, 'less is zero than was asked for', 50, '2:4')
    with pytest.raises(ValueError, match='percent .as a fraction.'): sparsify_checkpoint(tmp_path/'which', tmp_path/'no', .5)
    put(net().state_dict(), tmp_path/'plain')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparsify_checkpoint(tmp_path/'plain', tmp_path/'new', 50)

# Stopped

class Stop(BaseException): "The power went"

def stop_at(monkeypatch, n, error):
    "Each write, renaming and record counts; at the `n`-th, `error` comes"
    left = [n]
    def counted(f):
        def g(*args, **kwargs):
            left[0] -= 1
            if left[0]<0: raise error
            return f(*args, **kwargs)
        return g
    for mod,name in ((shards,'write_at'),(ck,'write_at'),(shards.os,'replace'),(shards.Journal,'put'),(shards.shutil,'copyfile')): monkeypatch.setattr(mod, name, counted(getattr(mod, name)))
    leave = shards.Rewriting._leave
    if error is Stop: monkeypatch.setattr(shards.Rewriting, '_leave', lambda self, kind: self.journal.close() if kind else leave(self, kind))  # nobody clears up
    return left

@pytest.mark.parametrize('error', [Stop,OSError(errno.ENOSPC, 'full')], ids=['stopped','full'])
@pytest.mark.parametrize('context,dtype', [('global',torch.float32),('local',torch.bfloat16)])
def test_gone_on_with(context, dtype, error, tmp_path, pieces):
    "Stopped anywhere, and again a little later, until it is done: the same files as in one go, and the source is as it was"
    source = put(net(dtype).state_dict(), tmp_path/'source', 3)
    args = dict(sparsity=60, context=context, threads=2)
    whole = sparsify_checkpoint(source, tmp_path/'whole', **args)
    for begin in (0,2,5,14,40,75):
        target,stops,n = tmp_path/f'target{begin}',0,begin
        while True:
            with pytest.MonkeyPatch.context() as m:
                stop_at(m, n, error)
                try: table = sparsify_checkpoint(source, target, **args)
                except (Stop,OSError): stops,n = stops+1,n+17
                else: break
            if error is not Stop: assert not list(target.glob('.*.part'))
        assert files(target)==files(tmp_path/'whole') and table.equals(whole), begin
        assert stops or begin>60

def test_done_shards_stay(tmp_path, pieces, monkeypatch):
    source = put(net().state_dict(), tmp_path/'source', 3)
    with pytest.MonkeyPatch.context() as m:
        was = shards.os.replace
        def third(a, b): return was(a, b) if 'model-00003' not in str(b) else (_ for _ in ()).throw(Stop())
        m.setattr(shards.os, 'replace', third)
        with pytest.raises(Stop): sparsify_checkpoint(source, tmp_path/'target', 50, context='global', threads=1)
    done = {p.name:p.stat().st_ino for p in (tmp_path/'target').glob('model*')}
    assert len(done)==2 and not (tmp_path/'target/config.json').exists()
    def nothing(*args): raise AssertionError('counted again')
    monkeypatch.setattr(ck, '_count', nothing)
    with pytest.raises(ValueError, match='other settings'): sparsify_checkpoint(source, tmp_path/'target', 60, context='global')
    for change in (dict(criteria='squared_final'),dict(layers=['a']),dict(order=['d.weight','c.weight','b.weight','a.weight']),dict(granularity='2:4')):
        with pytest.raises(ValueError, match='other settings'): sparsify_checkpoint(source, tmp_path/'target', **dict(sparsity=50, context='global') | change)
    assert {p.name:p.stat().st_ino for p in (tmp_path/'target').glob('model*')}==done
    sparsify_checkpoint(source, tmp_path/'target', 50, context='global')
    assert {n:(tmp_path/'target'/n).stat().st_ino for n in done}==done
    assert {p.name for p in (tmp_path/'target').iterdir()}=={p.name for p in source.iterdir()}

def test_changed_source(tmp_path):
    "What was begun from files that have changed since is not gone on with"
    source = put(net().state_dict(), tmp_path/'source', 2)
    with pytest.MonkeyPatch.context() as m:
        stop_at(m, 6, Stop)
        with pytest.raises(Stop): sparsify_checkpoint(source, tmp_path/'target', 50)
    (source/'config.json').write_text('{"another": 1}')
    with pytest.raises(ValueError, match='have changed since'): sparsify_checkpoint(source, tmp_path/'target', 50)

KILLED = '''
import os, signal, sys
from fasterai.core import shards
from fasterai.sparse.checkpoint import sparsify_checkpoint
was,left = shards.os.replace,[1]
def replace(a, b):
    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    was(a, b)
shards.os.replace = replace
sparsify_checkpoint(sys.argv[1], sys.argv[2], 50, context='global')
'''

def test_killed(tmp_path):
    "No handler runs at kill -9"
    source = put(net().state_dict(), tmp_path/'source', 3)
    done = subprocess.run([sys.executable, '-c', KILLED, source, tmp_path/'target'], cwd=ROOT)
    assert done.returncode==-9 and (tmp_path/'target/.rewriting.journal').exists() and list((tmp_path/'target').glob('.*.part'))
    sparsify_checkpoint(source, tmp_path/'target', 50, context='global')
    sparsify_checkpoint(source, tmp_path/'whole', 50, context='global')
    assert files(tmp_path/'target')==files(tmp_path/'whole')

def test_too_full(tmp_path, monkeypatch):
    "A disk without room is told before anything is written"
    source = put(net().state_dict(), tmp_path/'source')
    monkeypatch.setattr(shards.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match='0 free'): sparsify_checkpoint(source, tmp_path/'target', 50)
    assert not (tmp_path/'target').exists()

def test_without_ranges(tmp_path, monkeypatch):
    "Where the system copies no ranges, gives no advice and locks no files, as on Windows"
    for o in ('copy_file_range','posix_fadvise'): monkeypatch.delattr(shards.os, o, raising=False)
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    model = net()
    put(dict(model.state_dict(), steps=torch.arange(5)), tmp_path/'source')
    sparsify_checkpoint(tmp_path/'source', tmp_path/'target', 50)
    Sparsifier(model, layer_type=TYPES).sparsify_model(50)
    found = got(tmp_path/'target')
    assert torch.equal(found.pop('steps'), torch.arange(5)) and all(torch.equal(v, found[k]) for k,v in model.state_dict().items())

MEMORY = r'''
import re, sys, pandas
from fasterai.sparse.checkpoint import sparsify_checkpoint
sparsify_checkpoint(sys.argv[1]+'/tiny.safetensors', sys.argv[2]+'tiny', 50, 'column', layers='w')  # what is loaded at the first call
peak = lambda: int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])  # ru_maxrss begins with that of the process that called
before = peak()
for how in (('weight','global'),('2:4','local'),('column','local')): sparsify_checkpoint(sys.argv[1], sys.argv[2]+how[0].replace(':','_'), 50, *how)
print(peak()-before)
'''

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='Linux tells the peak of memory there')
def test_memory(tmp_path):
    "Tensors of 32 MiB take no more than three times that, buffers and all"
    w = torch.randn(4096, 4096).bfloat16()
    put({f'{i}.weight':w for i in range(3)}, tmp_path/'source', 3)
    save_file({'w':torch.randn(8, 8).bfloat16()}, tmp_path/'source/tiny.safetensors')  # beside
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', MEMORY, tmp_path/'source', tmp_path/'target'], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert int(done.stdout)/1024<3*32, f'{int(done.stdout)/1024:.0f} MiB'
    assert sum(int((load_file(f)[f'{i}.weight']==0).sum()) for i,f in enumerate(sorted((tmp_path/'targetweight').glob('model*.safetensors'))))==3*w.numel()//2
