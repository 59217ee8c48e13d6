"""The compressed file: every bit comes back, whatever the tensors are; and whatever happened to a file, it is refused or read, never worse"""
import hashlib, json, os, tracemalloc, zlib
import numpy as np, pytest, torch, torchvision
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune
from fasterai.core import files
from fasterai.core.running import innermost
from fasterai.prune.pruner import Pruner
from fasterai.quantize import codecs, compressed_file as cf
from fasterai.quantize.compressed_file import CompressedFileError, compression_report, load_compressed, save_compressed
from fasterai.sparse.sparsifier import Sparsifier
from damage import joined, parts
from tiny import WRAPPERS

def bits(t): return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if t.numel() else torch.zeros(0, dtype=torch.uint8)
def snap(model): return {k:(v.dtype,v.shape,bits(v).clone()) for k,v in model.state_dict().items()}
def same(a, b):
    assert list(a)==list(b)
    for k in a: assert a[k][:2]==b[k][:2] and torch.equal(a[k][2], b[k][2]), k

def scrambled(model):
    "Other values everywhere"
    gen = torch.Generator().manual_seed(1)
    for v in model.state_dict().values():
        if v.numel(): v.copy_((torch.rand(v.shape, generator=gen)*100).to(v.dtype) if v.dtype is not torch.bool else torch.rand(v.shape, generator=gen)>.5)
    return model

def round_trip(model, fresh, path):
    "`model` through a file into `fresh`; the report"
    before = snap(model)
    save_compressed(model, path)
    same(snap(model), before)
    assert load_compressed(path, scrambled(fresh)) is fresh
    same(snap(fresh), before)
    df = compression_report(path)
    size = os.path.getsize(path)
    parts = df.drop(['header','total'])
    assert df.loc['total', 'bytes']==size==df['bytes'].drop('total').sum() and (parts['bytes']==parts.positions+parts.code_book+parts['values']).all()
    assert df.loc['total', 'before']==sum(v.numel()*v.element_size() for v in {id(v):v for v in model.state_dict(keep_vars=True).values()}.values())
    return df

@torch.no_grad()
def share(model, n=16):
    "Few values in each large tensor: the nearest of `n` quantiles; zeros stay"
    for p in model.parameters():
        if p.dim()>1 and (p!=0).sum()>4*n:
            nz = p[p!=0]
            book = nz.float().quantile(torch.linspace(.01, .99, n)) if nz.numel()<2**20 else nz[:2**20].float().quantile(torch.linspace(.01, .99, n))
            p[p!=0] = book[torch.bucketize(nz.float(), (book[1:]+book[:-1])/2)].to(p.dtype)
    return model

FAMILIES = ['alexnet','convnext_tiny','densenet121','efficientnet_b0','googlenet','maxvit_t','mnasnet0_5','mobilenet_v2','mobilenet_v3_small','regnet_x_400mf','regnet_y_400mf','resnet18','resnext50_32x4d',
            'shufflenet_v2_x0_5','squeezenet1_1','swin_t','swin_v2_t','vgg11_bn','vit_b_32','inception_v3']
KINDS = ['dense','sparse','shared','both','bfloat16','float16']

def family(name):
    kw = dict(init_weights=False) if name in ('googlenet','inception_v3') else {}
    model = getattr(torchvision.models, name)(**kw)
    for p in model.parameters():  # what a file does not know of is left out: more of the same
        if p.numel()>2**13: p.data = p.data[:max(1, 2**13*len(p)//p.numel())].clone()
    return model

@pytest.mark.parametrize('i,name', list(enumerate(FAMILIES)))
def test_torchvision(i, name, tmp_path):
    torch.manual_seed(i)
    kind,model,fresh = KINDS[i%len(KINDS)],family(name),family(name)
    if kind in ('bfloat16','float16'): model,fresh = (o.to(getattr(torch, kind)) for o in (model,fresh))
    if kind in ('sparse','both','bfloat16'): Sparsifier(model, 'weight', 'local', layer_type=(nn.Conv2d,nn.Linear)).sparsify_model(90)
    if kind in ('shared','both','float16'): share(model)
    df = round_trip(model, fresh, tmp_path/'m')
    assert df.loc['total', 'ratio']>{'dense':1.1, 'sparse':3, 'shared':2, 'both':4, 'bfloat16':2, 'float16':1.5}[kind]

# --- odd tensors

class Bag(nn.Module):
    "Tensors as they are: floats that can be learnt as parameters, the others as buffers"
    def __init__(self, *tensors):
        super().__init__()
        for i,t in enumerate(tensors):
            if t.is_floating_point(): self.register_parameter(f't{i}', nn.Parameter(t))
            else: self.register_buffer(f't{i}', t)

DTYPES = [torch.float32,torch.float16,torch.bfloat16,torch.float64,torch.float8_e4m3fn,torch.float8_e5m2,torch.uint8,torch.int8,torch.int16,torch.int32,torch.int64,torch.uint16,torch.uint32,torch.uint64,
          torch.bool,torch.complex64,torch.complex128]

@st.composite
def tensors(draw):
    "Random bit patterns: dense or mostly zero, many or few different ones"
    dtype,shape = draw(st.sampled_from(DTYPES)),draw(st.lists(st.sampled_from([0,1,2,3,5,17,40]), max_size=3))
    rng,n = np.random.default_rng(draw(st.integers(0, 2**32))),int(np.prod(shape))*dtype.itemsize
    raw = rng.integers(0, 2 if dtype is torch.bool else 256, n, dtype=np.uint8).reshape(-1, dtype.itemsize)
    if len(raw) and draw(st.booleans()): raw = raw[rng.integers(0, min(len(raw), draw(st.integers(1, 300))), len(raw))]
    if len(raw): raw = raw*(rng.random((len(raw),1))<draw(st.sampled_from([0,.02,.5,.9,1])))
    t = torch.from_numpy(raw.astype(np.uint8).reshape(-1).copy()).view(dtype).reshape(shape) if raw.size else torch.zeros(shape, dtype=dtype)
    return t.clone().transpose(0, -1) if len(shape)>1 and draw(st.booleans()) else t

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(tensors(), max_size=3))
def test_odd_tensors(tmp_path, ts):
    blank = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).zero_() for t in ts]
    save_compressed(Bag(*ts), tmp_path/'m')
    got = load_compressed(tmp_path/'m', model := Bag(*blank))
    same(snap(got), snap(Bag(*ts)))
    assert compression_report(tmp_path/'m').loc['total', 'bytes']==os.path.getsize(tmp_path/'m')

@pytest.mark.parametrize('dtype,size', [(torch.float32,4),(torch.float64,8),(torch.float16,2),(torch.bfloat16,2)])
def test_special_values(dtype, size, tmp_path):
    "Signed zeros, infinities, quiet and signalling NaNs with payloads, subnormals: by their bits, dense and sparse, contiguous and not"
    ints = {2:torch.int16, 4:torch.int32, 8:torch.int64}[size]
    top = torch.tensor([1], dtype=ints)<<(8*size-1)
    inf = torch.tensor([float('inf')], dtype=dtype).view(ints)
    odd = torch.cat([top, inf, inf|top, inf|1, inf|top|5, inf|(inf>>1&~inf), torch.tensor([1,2], dtype=ints), top|3]).view(dtype)
    sparse = torch.zeros(40, 60, dtype=dtype)
    sparse.view(ints).view(-1)[torch.randperm(2400)[:200]] = odd.view(ints).repeat(30)[:200]
    model = Bag(odd, sparse, sparse.t(), sparse[::2,::3])
    fresh = Bag(*(torch.zeros_like(o) for o in (odd, sparse)), torch.zeros(40, 60, dtype=dtype).t(), torch.zeros(40, 60, dtype=dtype)[::2,::3])
    round_trip(model, fresh, tmp_path/'m')

def tied_net():
    net = nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 20), nn.Linear(20, 50))
    net[2].weight = net[0].weight
    return net

def test_tied_weights(tmp_path):
    net,fresh = tied_net(),tied_net()
    df = round_trip(net, fresh, tmp_path/'m')
    assert fresh[2].weight is fresh[0].weight and df.loc['2.weight = 0.weight', 'bytes']==0
    apart = nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 20), nn.Linear(20, 50))
    same(snap(load_compressed(tmp_path/'m', apart)), snap(net))
    save_compressed(scrambled(apart), tmp_path/'apart')
    before = snap(fresh)
    with pytest.raises(CompressedFileError, match='ties'): load_compressed(tmp_path/'apart', fresh)
    same(snap(fresh), before)

def test_models_of_every_state(tmp_path):
    "Pruned ones, ones without a tensor, masked ones by `torch.nn.utils.prune`"
    net = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8*16, 4))
    cut = lambda: Pruner(net(), 50, example_inputs=torch.zeros(1, 3, 8, 8)).prune_model()
    round_trip(model := cut(), cut(), tmp_path/'m')
    same(snap(load_compressed(tmp_path/'m', fresh := net())), snap(model)), round_trip(fresh, cut(), tmp_path/'n')
    round_trip(nn.ReLU(), nn.ReLU(), tmp_path/'m')
    model,fresh = net(),net()
    for o in (model,fresh): prune.l1_unstructured(o[3], 'weight', .8)
    round_trip(model, fresh, tmp_path/'m')

@pytest.mark.parametrize('wrap', [*WRAPPERS.values(),torch.jit.script], ids=[*WRAPPERS,'scripted'])
def test_wrappers_are_not_in_the_file(wrap, tmp_path):
    net = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model,fresh = net(),net()
    save_compressed(model, tmp_path/'m')
    save_compressed(wrap(model), tmp_path/'w')
    assert (tmp_path/'w').read_bytes()==(tmp_path/'m').read_bytes()
    wrapped = wrap(fresh)
    assert load_compressed(tmp_path/'m', wrapped) is wrapped
    same(snap(innermost(wrapped)), snap(model))

def test_same_bytes_from_any_memory_format(tmp_path):
    "What is written depends on the values alone"
    model = nn.Conv2d(20, 30, 3)
    save_compressed(model, tmp_path/'a')
    save_compressed(model.to(memory_format=torch.channels_last), tmp_path/'b')
    assert (tmp_path/'a').read_bytes()==(tmp_path/'b').read_bytes()

# --- wrong models, foreign files, failed writes

def test_refuses_another_model(tmp_path):
    save_compressed(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), tmp_path/'m')
    def refused(model, match):
        before = snap(model)
        with pytest.raises(CompressedFileError, match=match): load_compressed(tmp_path/'m', model)
        same(snap(model), before)
    refused(nn.Sequential(nn.Linear(4, 5)), "it has '1.weight', which this Sequential has not.*did you mean '0.weight'")
    refused(nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)), "it has '0.bias', which this Sequential has not")
    refused(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)), "it has no '2.weight', which this Sequential has")
    refused(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)), r'0.weight has shape \(5, 4\) there, \(6, 4\) here')
    refused(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).half(), '0.weight is float32 there, float16 here; convert the model first')
    expanded = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    expanded[1].running_mean = torch.zeros(1).expand(5)
    with pytest.raises(ValueError, match='1.running_mean is an expanded view'): load_compressed(tmp_path/'m', expanded)

class Extra(nn.Linear):
    def get_extra_state(self): return dict(a=1)
    def set_extra_state(self, o): pass

def test_refuses_what_is_no_plain_tensor(tmp_path):
    (tmp_path/'m').write_bytes(b'old')
    for model,match in ((Extra(2, 2), '_extra_state'), (nn.LazyLinear(3), 'weight has no shape yet'), (nn.Linear(2, 2, device='meta'), 'meta device'),
                        (Bag(torch.eye(3).to_sparse()), 'make it dense first')):
        with pytest.raises(ValueError, match=match): save_compressed(model, tmp_path/'m')
    with pytest.raises(TypeError, match='the model is an nn.Module, not a dict: a state dict is no model'): save_compressed({'a':torch.zeros(2)}, tmp_path/'m')
    assert [o.name for o in tmp_path.iterdir()]==['m'] and (tmp_path/'m').read_bytes()==b'old'

def test_refuses_foreign_files(tmp_path):
    net = nn.Linear(3, 3)
    torch.save(net.state_dict(), tmp_path/'torch')
    (tmp_path/'empty').touch()
    (tmp_path/'text').write_text('hello')
    for o in ('torch','empty','text'):
        for f in (lambda p: load_compressed(p, net), compression_report):
            with pytest.raises(CompressedFileError, match='was not written by save_'): f(tmp_path/o)
    save_compressed(net, tmp_path/'m')
    (tmp_path/'later').write_bytes((tmp_path/'m').read_bytes().replace(b'compressed 3 ', b'compressed 4 '))
    with pytest.raises(CompressedFileError, match='version 4, this library reads 3 and earlier ones'): load_compressed(tmp_path/'later', net)
    with pytest.raises(FileNotFoundError): load_compressed(tmp_path/'nowhere', net)

def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    net = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    save_compressed(net, tmp_path/'m')
    old,write,seen = (tmp_path/'m').read_bytes(),cf._write_tensor,[]
    def fails(t):
        seen.append(t)
        if len(seen)==3: raise OSError('no space left')
        return write(t)
    monkeypatch.setattr(cf, '_write_tensor', fails)
    with pytest.raises(OSError, match='no space'): save_compressed(scrambled(net), tmp_path/'m')
    assert [o.name for o in tmp_path.iterdir()]==['m'] and (tmp_path/'m').read_bytes()==old
    monkeypatch.undo()
    (tmp_path/'link').symlink_to(tmp_path/'m')
    save_compressed(net, tmp_path/'link')
    assert (tmp_path/'link').is_symlink() and (tmp_path/'m').read_bytes()!=old
    with pytest.raises(OSError): save_compressed(net, tmp_path/'nowhere'/'m')
    with pytest.raises(IsADirectoryError, match='a file is asked for'): save_compressed(net, tmp_path)

# --- damaged files

def small_net(seed=0):
    "Every kind of part: sparse and shared, sparse alone, dense and shared, dense, tied, integers, a 16-bit layer"
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(9, 20), nn.Linear(6, 12, bias=False), nn.Linear(12, 16), nn.BatchNorm1d(16, affine=False), nn.Linear(9, 20), nn.Linear(32, 16, bias=False, dtype=torch.bfloat16))
    with torch.no_grad():
        for i in (0,1): net[i].weight[torch.rand(net[i].weight.shape)<.8] = 0
        share(net[0], 5), share(net[2], 4)
    net[4].weight = net[0].weight
    net.register_buffer('mask', torch.rand(40)<.3)
    net.register_buffer('index', torch.arange(60)%17)
    return net

def numbers(o, path=()):
    "Where the whole numbers of the header are"
    if isinstance(o, list):
        for i,v in enumerate(o): yield from numbers(v, (*path,i))
    elif type(o) is int: yield path

def damaged(data, rng):
    "One of many ways to damage a file, and whether its checksum fits"
    kind,b = rng.integers(8),bytearray(data)
    *about,head,body,table = parts(data)
    runs = table['coded']
    run = rng.integers(len(runs))
    entries = runs[run][1]
    def sealed(body, entries, packed=None): return joined(*about, head, body, {**table, 'coded':[[c,entries if i==run else o] for i,(c,o) in enumerate(runs)]}, packed),True
    if kind==0: return bytes(b[:rng.integers(len(b))]),False
    if kind==1:
        for _ in range(rng.integers(1, 9)): b[rng.integers(len(b))] ^= 1<<int(rng.integers(8))
        return bytes(b),bytes(b)==data
    if kind==2: return bytes(b)+rng.bytes(rng.integers(1, 40)),False
    if kind==3:  # bits of what is coded
        body = bytearray(body)
        for _ in range(rng.integers(1, 9)): body[rng.integers(len(body))] ^= 1<<int(rng.integers(8))
        return sealed(bytes(body), entries)
    if kind==4:  # bits of the packed table
        packed = bytearray(zlib.compress(json.dumps(table).encode()))
        for _ in range(rng.integers(1, 4)): packed[rng.integers(len(packed))] ^= 1<<int(rng.integers(8))
        return sealed(body, entries, bytes(packed))
    if kind==5:  # numbers that lie
        for _ in range(rng.integers(1, 4)):
            *path,last = list(numbers(entries))[rng.integers(len(list(numbers(entries))))]
            at = entries
            for i in path: at = at[i]
            at[last] = [at[last]+int(rng.integers(-3, 4)), int(rng.integers(-9, 2**20)), 2**31, 2**62, 10**30, -1, 0, at[last]*2, True, 1.5, None, 'x', [], [[[]]]][rng.integers(14)]
        return sealed(body, entries)
    if kind==6:  # bytes move from one part to the next: all lengths still add up
        blocks = [o for e in entries for o in e[3:]]
        sizes = [(o[0],0) for o in blocks if o[0]]+[(o,i) for block in blocks for o in block[2::2] for i in range(len(o))]
        (a,i),(c,j) = (sizes[k] for k in rng.integers(len(sizes), size=2))
        n = int(rng.integers(0, 9))
        a[i],c[j] = a[i]+n,c[j]-n
        return sealed(body, entries)
    rng.shuffle(entries)  # another order, doubled or missing entries, other dtypes
    if rng.random()<.5: entries[rng.integers(len(entries))] = entries[rng.integers(len(entries))]
    if rng.random()<.5: entries[rng.integers(len(entries))][1] = str(rng.choice(['float32','bool','bfloat16','qint8','complex64','int8','mask','0.weight','x']))
    return sealed(body, entries)

def pinned_net():
    "The same bits on every machine"
    i = np.arange(2000, dtype=np.uint32)*np.uint32(2654435761)
    w = np.where((i>>np.uint32(28))<2, (i>>np.uint32(20)&np.uint32(7)).astype(np.float32)-3.5, np.float32(0)).reshape(40, 50)
    return Bag(torch.from_numpy(w), torch.from_numpy(i[:300].astype(np.float32)/2**32), torch.arange(100)%7)

FIRST = [["t0", "float32", [40, 50], [92, 0, 10, 124, 127], [4, 4, 4, 4, 4], [32], [4, 4, 4, 4, 4], [32]], ["t1", "float32", [300], [], [], [300, 300, 300, 112]], ["t2", "int64", [100], [16, 1, 0, 85, 0], [], [56, 0, 0, 0, 0, 0, 0, 0], [], []]]
DIGEST = '8e84904c5cc53fbca70945df5ad3e139838a0057ea9a399d0d635ef5cf3a7469'

def test_format_is_pinned(tmp_path):
    "Files of this version are the same everywhere and stay readable: a change of a single bit needs another version or codec"
    save_compressed(pinned_net(), tmp_path/'m')
    *_,body,table = parts((tmp_path/'m').read_bytes())
    assert table=={'coded':[['columns',[[*o[:3],o[3:]] for o in FIRST]]]} and hashlib.sha256(files.FIRST+b'\x02'+body).hexdigest()==DIGEST

def test_rare_values(tmp_path):
    "A code book is complete, however late its last value comes"
    v = torch.arange(200_000)%50
    v[torch.arange(60_000, 200_000, 13)] = torch.arange(10_770)+100
    round_trip(Bag(v), Bag(torch.zeros_like(v)), tmp_path/'m')

@pytest.mark.parametrize('sparsity', [0,50,99])
def test_wrong_at_the_very_end(sparsity, tmp_path, monkeypatch):
    "A tensor that cannot be decoded leaves the model as it was, though others were written before it"
    net = nn.Sequential(*(nn.Linear(30, 30) for _ in range(4)))
    if sparsity: Sparsifier(net, 'weight', 'local', layer_type=nn.Linear).sparsify_model(sparsity)
    round_trip(net, fresh := nn.Sequential(*(nn.Linear(30, 30) for _ in range(4))), tmp_path/'m')
    codec,before,seen = files.codecs['columns'],snap(fresh),[]
    def fails(*args):
        seen.append(1)
        if len(seen)==8: raise CompressedFileError('at the end')
        return codec.read(*args)
    monkeypatch.setitem(files.codecs, 'columns', codec._replace(read=fails))
    save_compressed(scrambled(net), tmp_path/'m')
    with pytest.raises(CompressedFileError, match='3.bias cannot be read .at the end'): load_compressed(tmp_path/'m', fresh)
    same(snap(fresh), before)

def test_ten_thousand_damaged_files(tmp_path):
    """Every file is refused with a `CompressedFileError` and the model stays as it was, or it is read: unchanged if its checksum was not made to fit. Neither time nor memory
    that the file and the model do not justify"""
    model = small_net()
    save_compressed(model, tmp_path/'m')
    data,right,rng,counts = (tmp_path/'m').read_bytes(),snap(model),np.random.default_rng(0),dict(refused=0, read=0)
    small = small_net(1)
    load_compressed(tmp_path/'m', small)
    values = model.state_dict()
    for i in range(10_000):
        bad,fits = damaged(data, rng)
        (tmp_path/'bad').write_bytes(bad)
        watched = i%8==0
        if watched: tracemalloc.start()
        try:
            load_compressed(tmp_path/'bad', small)
            counts['read'] += 1
            if not fits or bad==data: same(snap(small), right)
            else:
                for k,v in small.state_dict().items(): v.copy_(values[k])
        except CompressedFileError:
            counts['refused'] += 1
            if watched: same(snap(small), right)
        if watched:
            assert tracemalloc.get_traced_memory()[1]<3_000_000, (i, bad)
            tracemalloc.stop()
    same(snap(small), right)
    assert sum(counts.values())==10_000 and counts['refused']>7_000 and counts['read']>100, counts
