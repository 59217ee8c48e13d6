"""Checkpoints compressed in their files: what comes back is every byte of the files, whatever they hold; stopped anywhere, and gone on with; damage is told"""
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from damage import joined, parts
from fasterai.core import shards
from fasterai.core.files import FileError
from fasterai.core.shards import COMPRESSED
from fasterai.quantize import checkpoint as cc, codecs
from fasterai.quantize.all import compress_checkpoint, compression_report, decompress_checkpoint, load_compressed, save_compressed
from fasterai.sparse.all import sparsify_checkpoint
from test_checkpoint import Stop, files, net, put, stop_at
from test_codecs import sparse

ROOT = Path(__file__).parent.parent
DTYPES = [o for o in cc._TYPES.values()]

def there_and_back(source, folder, threads=2):
    "The compressed checkpoint; asserts that the way back gives the same files"
    folder.mkdir()
    table = compress_checkpoint(source, folder/'small', threads=threads, progress=False)
    decompress_checkpoint(folder/'small', folder/'back', threads=threads, progress=False)
    if source.is_dir(): assert files(folder/'back')==files(source)
    else: assert (folder/'back').read_bytes()==source.read_bytes()
    assert {o.tensor for o in table.itertuples()}==set(cc.Checkpoint(source).tensors)
    return folder/'small',table

@pytest.fixture
def tiny(monkeypatch):
    "Blocks of 2,000 words, lanes from 64 symbols on, pieces of 64 bytes"
    for k,v in dict(_SMALL=64, _BLOCK=2000, _CHUNK=2000).items(): monkeypatch.setattr(codecs, k, v)
    for mod in (cc,shards): monkeypatch.setattr(mod, 'PIECE', 64)

def of_type(dtype):
    "Dense, sparse, shared, constant, empty and scalar"
    if dtype is torch.bool: like = lambda t: t!=0
    elif dtype.is_floating_point or dtype.is_complex: like = lambda t: t.to(dtype)
    else: like = lambda t: (t*20).abs().to(dtype)
    found = dict(dense=torch.randn(90, 70), sparse=sparse(80, 60), conv=sparse(30, 20, 3, 3, left=.5), shared=sparse(70, 50, left=.5, values=4), zeros=torch.zeros(64, 100), ones=torch.ones(50, 50), flat=torch.randn(5000),
        empty=torch.zeros(0, 3), scalar=torch.tensor(2.), one=torch.ones(1, 1, 300))
    return {k:like(v) for k,v in found.items()}

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_types(dtype, tmp_path, tiny):
    save_file(of_type(dtype), tmp_path/'a.safetensors', metadata=dict(format='pt', about='ä'))
    small,table = there_and_back(tmp_path/'a.safetensors', tmp_path/'x')
    assert small.stat().st_size<(tmp_path/'a.safetensors').stat().st_size or dtype.itemsize==1
    assert dict(zip(table.tensor, table.bytes))['zeros']<20

@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16,torch.int64], ids=str)
def test_as_save_compressed_writes(dtype, tmp_path, tiny):
    "The same layouts and bytes for each tensor, in a file that a model is filled from; any number of threads gives the same file"
    class Holder(nn.Module):
        def __init__(self, state):
            super().__init__()
            for k,v in state.items(): self.register_buffer(k, v.clone())
    state = of_type(dtype)
    save_file(state, tmp_path/'a.safetensors')
    save_compressed(Holder(state), tmp_path/'model')
    data = set()
    for threads in (1,2,5):
        compress_checkpoint(tmp_path/'a.safetensors', tmp_path/f'small{threads}', threads=threads)
        data.add((tmp_path/f'small{threads}').read_bytes())
    assert len(data)==1
    mine,own = ({k:(e.codec,e.layout) for k,e in cc.reading(tmp_path/o).__enter__().entries.items()} for o in ('small1','model'))
    assert mine==own
    fresh = load_compressed(tmp_path/'small1', Holder({k:torch.zeros_like(v) for k,v in state.items()}))
    assert all(torch.equal(v, state[k]) for k,v in fresh.state_dict().items())
    assert compression_report(tmp_path/'small1').loc['total','bytes']==(tmp_path/'small1').stat().st_size

def raw_file(path, tensors, metadata=None, text=None):
    "A file of the format with types that its Python package may not know: name, (type, shape, bytes)"
    head,at = {} if metadata is None else dict(__metadata__=metadata),0
    for k,(dtype,shape,data) in tensors.items():
        head[k] = dict(dtype=dtype, shape=shape, data_offsets=[at,at+len(data)])
        at += len(data)
    text = json.dumps(head).encode() if text is None else text
    path.write_bytes(len(text).to_bytes(8, 'little')+text+b''.join(o[2] for o in tensors.values()))
    return path

def test_odd_files(tmp_path, tiny):
    "Types that PyTorch has not, spaces in the header, no tensor at all, names in other letters"
    unknown = raw_file(tmp_path/'a', {'a b/é':('F4',[3000],os.urandom(1500)), 'scale':('F8_E8M0',[50],bytes(50)), 'x':('F32',[2],bytes(8))}, dict(format='pt'))
    there_and_back(unknown, tmp_path/'1')
    there_and_back(raw_file(tmp_path/'b', {}), tmp_path/'2')
    there_and_back(raw_file(tmp_path/'c', {'x':('U8',[4],b'abcd')}, text=b'{ "x" : {"shape":[4] ,"dtype":"U8","data_offsets":[0, 4]}}'+b' '*77), tmp_path/'3')

@pytest.mark.parametrize('n', [1,3])
def test_folders(n, tmp_path, tiny):
    "Shards get another name, the index and all other files are carried, and nobody takes the folder for a plain one"
    source = put(net().state_dict(), tmp_path/'source', n)
    (source/'tokenizer').mkdir()
    (source/'tokenizer/vocab.bin').write_bytes(bytes(range(256))*100)
    (source/'model-00001-of-00003.safetensors' if n>1 else source/'model.safetensors').chmod(0o640)
    small,table = there_and_back(source, tmp_path/'x')
    assert set(files(small))=={k+COMPRESSED if k.endswith('.safetensors') else k for k in files(source)}
    assert all((tmp_path/'x/back'/o.name).stat().st_mode==o.stat().st_mode for o in source.iterdir())
    with pytest.raises((ValueError,FileNotFoundError), match='is: use decompress_checkpoint first'): sparsify_checkpoint(small, tmp_path/'y', 50)
    with pytest.raises((ValueError,FileNotFoundError), match='has no files that compress_checkpoint wrote|which is not there'): decompress_checkpoint(source, tmp_path/'y')
    assert not (tmp_path/'y').exists()

def test_of_transformers(tmp_path):
    "A model of transformers, sparsified, compressed and back; the compressed folder is not loaded as if it were empty"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=40, num_key_value_heads=2)).bfloat16()
    model.save_pretrained(tmp_path/'source', max_shard_size='20KB')
    sparsify_checkpoint(tmp_path/'source', tmp_path/'sparse', 90)
    small,_ = there_and_back(tmp_path/'sparse', tmp_path/'x')
    assert all(torch.equal(v, got) for v,got in zip(LlamaForCausalLM.from_pretrained(tmp_path/'sparse').state_dict().values(), LlamaForCausalLM.from_pretrained(tmp_path/'x/back').state_dict().values()))
    with pytest.raises(OSError): LlamaForCausalLM.from_pretrained(small)

def test_aliases(tmp_path):
    "Names that `save_model` keeps in the header are tied in the file, too"
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    save_model(model, tmp_path/'a.safetensors')
    small,_ = there_and_back(tmp_path/'a.safetensors', tmp_path/'x')
    want = model[0].weight.clone()
    nn.init.zeros_(model[0].weight)
    assert torch.equal(load_compressed(small, model)[1].weight, want)

def test_from_save_compressed(tmp_path):
    "A file of a model becomes one that any program reads, with its ties"
    model = net(torch.float16)
    model.other = model.emb
    save_compressed(model, tmp_path/'small')
    decompress_checkpoint(tmp_path/'small', tmp_path/'a.safetensors')
    found = load_file(tmp_path/'a.safetensors')
    assert all(torch.equal(v, found.get(k, found['emb.weight'])) for k,v in model.state_dict().items())
    assert safe_open(tmp_path/'a.safetensors', 'pt').metadata()=={'format':'pt', 'other.weight':'emb.weight'}
    odd = nn.Module()
    odd.register_buffer('z', torch.zeros(3, dtype=torch.complex128))
    save_compressed(odd, tmp_path/'odd')
    with pytest.raises(ValueError, match='safetensors has no such type'): decompress_checkpoint(tmp_path/'odd', tmp_path/'no')

def test_refused(tmp_path):
    source = put(net().state_dict(), tmp_path/'source', 2)
    one = source/'model-00001-of-00002.safetensors'
    compress_checkpoint(one, tmp_path/'small')
    def refused(kind, words, f, *args, **kwargs):
        with pytest.raises(kind, match=words): f(*args, **kwargs)
        assert not (tmp_path/'no').exists()
    refused(ValueError, 'compressed already', compress_checkpoint, tmp_path/'small', tmp_path/'no')
    refused(ValueError, 'threads', compress_checkpoint, source, tmp_path/'no', threads=0)
    refused(ValueError, 'threads', decompress_checkpoint, tmp_path/'small', tmp_path/'no', threads=-1)
    refused(FileError, 'was not written by', decompress_checkpoint, one, tmp_path/'no')
    refused(FileExistsError, 'is there already', decompress_checkpoint, tmp_path/'small', one)
    refused(ValueError, 'neither 0 nor 1', compress_checkpoint, raw_file(tmp_path/'bad', {'x':('BOOL',[3],b'\0\1\2')}), tmp_path/'no')
    refused(ValueError, 'is no name for a tensor', compress_checkpoint, raw_file(tmp_path/'bad2', {'\ud800':('U8',[1],b'\0')}), tmp_path/'no')
    refused(ValueError, 'no dict of texts', compress_checkpoint, raw_file(tmp_path/'bad3', {}, dict(a=1)), tmp_path/'no')
    refused(ValueError, 'does not say where', compress_checkpoint, raw_file(tmp_path/'bad4', {'x':('F32',[-1,-1],bytes(4))}), tmp_path/'no')
    (source/(one.name+COMPRESSED)).write_bytes(b'mine')
    refused(ValueError, 'a shard would be called so', compress_checkpoint, source, tmp_path/'no')

# Damage

def test_each_byte(tmp_path):
    "A bit that is another one, in one of two shards: there is no target then"
    state = {'a.weight':sparse(20, 30), 'b.weight':torch.randn(10)}
    small,_ = there_and_back(put(state, tmp_path/'source', 2), tmp_path/'x')
    file = small/f'model-00002-of-00002.safetensors{COMPRESSED}'
    data = file.read_bytes()
    for i in range(0, len(data), 3):
        file.write_bytes(data[:i]+bytes([data[i]^1<<i%8])+data[i+1:])
        with pytest.raises(FileError): decompress_checkpoint(small, tmp_path/'no', threads=1)
        assert not (tmp_path/'no').exists()
    for n in (0,7,100,len(data)-1):
        file.write_bytes(data[:n])
        with pytest.raises(FileError): decompress_checkpoint(small, tmp_path/'no')

def header_with(**changes):
    "A change of what the table tells of the plain file's header"
    def change(kind, version, head, body, table):
        told = json.loads(table['header'])
        for k,o in changes.items(): told[k] = {**told.get(k, {}), **o} if isinstance(o, dict) else o
        return kind,version,head,body,dict(table, header=json.dumps(told))
    return change

def told(**changes): return lambda kind, version, head, body, table: (kind,version,head,body,{**table, **changes})

FORGED = dict(moved=header_with(a=dict(data_offsets=[4,2404])), longer=header_with(a=dict(shape=[21,30], data_offsets=[0,2520])), turned=header_with(a=dict(shape=[30,20])), typed=header_with(a=dict(dtype='I32')),
    more=header_with(c=dict(dtype='F32', shape=[0], data_offsets=[2400,2400])), no_text=told(header='['), deep=told(header='['*10**5), empty=told(header='{}'), number=header_with(a=3), negative=header_with(a=dict(shape=[-20,-30])),
    fraction=header_with(a=dict(data_offsets=[0.,2400.])), about=header_with(__metadata__=dict(a=[])), tied=told(tied=dict(b='nowhere')))

@pytest.mark.parametrize('name', FORGED)
def test_forged(name, tmp_path):
    "A checksum that fits, and a table that does not"
    save_file(dict(a=sparse(20, 30)), tmp_path/'a.safetensors')
    compress_checkpoint(tmp_path/'a.safetensors', tmp_path/'small')
    (tmp_path/'small').write_bytes(joined(*FORGED[name](*parts((tmp_path/'small').read_bytes()))))
    with pytest.raises(FileError): decompress_checkpoint(tmp_path/'small', tmp_path/'no')
    assert not (tmp_path/'no').exists()

def test_forged_values(tmp_path):
    "Coded bytes that are noise, with a checksum that fits: told, or some tensor of that size"
    save_file(dict(a=sparse(40, 50), b=torch.randn(500)), tmp_path/'a.safetensors')
    compress_checkpoint(tmp_path/'a.safetensors', tmp_path/'small')
    kind,version,head,body,table = parts((tmp_path/'small').read_bytes())
    told = 0
    for i in range(0, len(body), 7):
        (tmp_path/'bad').write_bytes(joined(kind, version, head, body[:i]+bytes([body[i]^0x55])+body[i+1:], table))
        try: decompress_checkpoint(tmp_path/'bad', tmp_path/'some')
        except FileError as e: told += 'a cannot be read' in str(e) or 'b cannot be read' in str(e)
        else:
            assert (tmp_path/'some').stat().st_size==(tmp_path/'a.safetensors').stat().st_size
            (tmp_path/'some').unlink()
    assert told and not (tmp_path/'some').exists()

def test_too_large(tmp_path):
    "What would not fit on the disk is told before anything is written, however few bytes the file has"
    raw_file(tmp_path/'a', {'z':('U8',[3000],bytes(3000))})
    compress_checkpoint(tmp_path/'a', tmp_path/'small')
    kind,version,head,body,table = parts((tmp_path/'small').read_bytes())
    for n,words in ((2**40,'bytes, and its disk has'),(2**47,'is damaged')):
        told = json.dumps(dict(z=dict(dtype='U8', shape=[n], data_offsets=[0,n])))
        blocks = [[[],[],[0]]]*min(2**18, -(-n//codecs._CHUNK))
        data = joined(kind, version, head, body[:0], dict(table, header=told, coded=[['rows',[['z','uint8',[n],*blocks]]]]))
        (tmp_path/'small').write_bytes(data)
        with pytest.raises((OSError,FileError), match=words): decompress_checkpoint(tmp_path/'small', tmp_path/'no')
        assert not (tmp_path/'no').exists()

# Stopped

@pytest.mark.parametrize('back', [False,True], ids=['there','back'])
def test_gone_on_with(back, tmp_path, tiny):
    "Stopped anywhere, and again a little later, until it is done: the same files as in one go"
    source = put(net().state_dict(), tmp_path/'source', 3)
    small,_ = there_and_back(source, tmp_path/'x')
    call = (lambda target: decompress_checkpoint(small, target)) if back else (lambda target: compress_checkpoint(source, target))
    want,total = files(source if back else small),0
    for begin in (0,1,4,9):
        target,n = tmp_path/f'target{begin}',begin
        while True:
            with pytest.MonkeyPatch.context() as m:
                stop_at(m, n, Stop)
                try: call(target)
                except Stop: total,n = total+1,n+3
                else: break
        assert files(target)==want, begin
    assert total>5

def test_done_shards_stay(tmp_path, monkeypatch):
    source = put(net().state_dict(), tmp_path/'source', 3)
    with pytest.MonkeyPatch.context() as m:
        was = shards.os.replace
        def third(a, b): return was(a, b) if 'model-00003' not in str(b) else (_ for _ in ()).throw(Stop())
        m.setattr(shards.os, 'replace', third)
        with pytest.raises(Stop): compress_checkpoint(source, tmp_path/'target')
    done = {p.name:p.stat().st_ino for p in (tmp_path/'target').glob('model*')}
    assert len(done)==2 and not (tmp_path/'target/config.json').exists()
    compress_checkpoint(source, tmp_path/'target')
    assert {n:(tmp_path/'target'/n).stat().st_ino for n in done}==done
    (source/'config.json').write_text('{"other":1}')
    with pytest.raises(FileExistsError, match='has files already'): compress_checkpoint(source, tmp_path/'target')

CALL = '''
import sys
from fasterai.quantize.checkpoint import compress_checkpoint, decompress_checkpoint
print('begins', flush=True)
globals()[sys.argv[1]](sys.argv[2], sys.argv[3], progress=False)
'''

@pytest.mark.parametrize('name', ['compress_checkpoint','decompress_checkpoint'])
def test_killed(name, tmp_path):
    "kill -9 at instants that nobody chose, and again, until a call comes to its end"
    gen = torch.Generator().manual_seed(0)
    source = put({f'{i}.weight':torch.randn(256, 1024, generator=gen) for i in range(12)}, tmp_path/'source', 6)
    compress_checkpoint(source, tmp_path/'small')
    given,want = (source,tmp_path/'small') if name=='compress_checkpoint' else (tmp_path/'small',source)
    rng,kills,target = __import__('random').Random(0),0,tmp_path/'target'
    while True:
        call = subprocess.Popen([sys.executable, '-c', CALL, name, given, target], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert call.stdout.readline()=='begins\n'
        try: assert call.wait(None if kills>5 else rng.uniform(0, .1)*(1+kills))==0
        except subprocess.TimeoutExpired:
            call.send_signal(signal.SIGKILL)
            kills += call.wait()==-9
            if (target/'config.json').exists() and not (target/'.rewriting.journal').exists(): break  # all was done, and Python was about to end
        else: break
    assert kills and files(target)==files(want)

# Memory

MEMORY = r'''
import re, sys, pandas
from fasterai.quantize.checkpoint import compress_checkpoint, decompress_checkpoint
compress_checkpoint(sys.argv[1]+'/tiny.safetensors', sys.argv[1]+'/tiny')  # what is loaded at the first call
decompress_checkpoint(sys.argv[1]+'/tiny', sys.argv[1]+'/tiny.back')
peak = lambda: int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])
before = peak()
compress_checkpoint(sys.argv[1]+'/a.safetensors', sys.argv[1]+'/a', threads=2)
decompress_checkpoint(sys.argv[1]+'/a', sys.argv[1]+'/a.back', threads=2)
print(peak()-before)
'''

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='Linux tells the peak of memory there')
@pytest.mark.parametrize('dtype,left', [(torch.float32,1.),(torch.bfloat16,.5)], ids=['dense','sparse'])
def test_memory(dtype, left, tmp_path):
    "No more than three times the largest tensor"
    w = torch.randn(5000, 4096)
    if left<1: w[w.abs()<.674] = 0
    w = w.to(dtype)
    save_file({f'{i}.weight':w.clone() for i in range(2)}, tmp_path/'a.safetensors')
    save_file({'w':torch.randn(600, 600)}, tmp_path/'tiny.safetensors')
    done = subprocess.run([sys.executable, '-c', MEMORY, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert int(done.stdout)*1024<3*w.numel()*dtype.itemsize, f'{int(done.stdout)/1024:.0f} MiB'
    assert (tmp_path/'a.back').read_bytes()==(tmp_path/'a.safetensors').read_bytes()
