"Files are written whole or not at all, and read the same or refused in words, whoever wrote them; files of earlier versions are still read"
import errno, hashlib, json, os, resource, socket, stat, subprocess, sys, time
from pathlib import Path
import pytest, safetensors.torch, torch
from torch import nn
import damage
from conformance import files as conformance
from fasterai.core import files, running, saved
from fasterai.core.files import FileError, checked_path, read_file, read_json, reading, replacing, replacing_from, sealed, unsealed, write_file
from fasterai.core.plan import carrying, pruned_plan, receiving, steps_of
from fasterai.misc.all import BN_Folder, FC_Decomposer
from fasterai.prune.all import Pruner, load_pruned, save_pruned
from fasterai.quantize.all import CompressedFileError, Quantizer, compression_report, load_compressed, save_compressed
from fasterai.sparse.training import Sparsify
from damage import Tied, X, same, snap

pytestmark = pytest.mark.filterwarnings('ignore')
OLD = Path(__file__).parent/'files'

# --- files of earlier versions

def old_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3,6,3,padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6,6,3,padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,12), nn.ReLU(), nn.Linear(12,3))
    return net.eval()

def digest(m):
    h = hashlib.blake2b(digest_size=16)
    for k,v in m.state_dict().items(): h.update(f'{k} {v.dtype} {tuple(v.shape)}'.encode()+v.detach().contiguous().numpy().tobytes())
    return h.hexdigest()
DIGESTS = json.loads((OLD/'digests.json').read_text())

@pytest.mark.parametrize('name', ['pruned_1.safetensors','pruned_2.safetensors','folded_2.safetensors','int8_2.safetensors','compressed_1'])
@pytest.mark.parametrize('load', [load_pruned,load_compressed])
def test_earlier_versions(name, load):
    "Either loader reads them all"
    assert digest(load(OLD/name, old_net(1)))==DIGESTS[name]

def test_earlier_compressed_files_of_cut_networks():
    "They tell no plan, and load into a network of that form"
    model = load_pruned(OLD/'pruned_2.safetensors', old_net(1))
    nn.init.zeros_(model[0].weight)
    assert digest(load_compressed(OLD/'compressed_cut_1', model))==DIGESTS['compressed_cut_1'] and compression_report(OLD/'compressed_cut_1').loc['total', 'bytes']==(OLD/'compressed_cut_1').stat().st_size
    with pytest.raises(FileError, match='another architecture'): load_compressed(OLD/'compressed_cut_1', old_net(1))

def test_earlier_tickets_and_checkpoints():
    model = old_net(1)
    safetensors.torch.load_model(model, OLD/'ticket_0.safetensors')
    assert digest(model)==DIGESTS['ticket_0.safetensors'] and list(read_file(OLD/'ticket_0.safetensors', plain=True)[0])
    fresh,found = old_net(1),{}
    with receiving(fresh, found): fresh.load_state_dict(torch.load(OLD/'checkpoint_0.pth'))
    assert digest(fresh)==DIGESTS['checkpoint_0.pth'] and int(found['some']['pace.last'])==3

# --- one container

FORMS = dict(pruned=lambda m: Pruner(m, 40, example_inputs=X).prune_model(), folded=lambda m: BN_Folder().fold(m, X), decomposed=lambda m: FC_Decomposer().decompose(m, .5, example_inputs=X),
    all=lambda m: FC_Decomposer().decompose(BN_Folder().fold(Pruner(m, 30, example_inputs=X).prune_model(), X), .5, example_inputs=X), int8=lambda m: Quantizer('weight_only', measure=False).quantize(m), plain=lambda m: m)

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('load', [load_pruned,load_compressed])
@pytest.mark.parametrize('save', [save_pruned,save_compressed])
def test_either_reads_either(save, load, form, tmp_path):
    "A fresh network is made and filled; one of that form is filled; and what is written again is the same"
    model = FORMS[form](Tied())
    save(model, tmp_path/'a')
    fresh = load(tmp_path/'a', Tied(1))
    assert str(fresh)==str(model) and same(snap(model), snap(fresh)) and pruned_plan(fresh)==pruned_plan(model) and torch.equal(model(X), fresh(X))
    save(fresh, tmp_path/'b')
    assert (tmp_path/'a').read_bytes()==(tmp_path/'b').read_bytes()
    for p in fresh.parameters(): p.data.zero_()
    assert same(snap(model), snap(load(tmp_path/'a', fresh)))
    assert fresh.other.weight is fresh.head.weight or form in ('decomposed','all','int8')

def test_a_network_of_that_form_by_other_ways(tmp_path):
    "One that was cut elsewhere takes the values, and knows from then on of the plan of the file"
    model,other = FORMS['pruned'](Tied()),FORMS['pruned'](Tied(3))
    save_compressed(model, tmp_path/'a')
    load_compressed(tmp_path/'a', other)
    assert same(snap(model), snap(other)) and pruned_plan(other)==pruned_plan(model)
    by_hand = FORMS['pruned'](Tied())
    del by_hand._pruned
    for p in by_hand.parameters(): p.data.zero_()
    assert same(snap(model), snap(load_compressed(tmp_path/'a', by_hand))) and pruned_plan(by_hand)==pruned_plan(model)

def test_other_readers(tmp_path):
    "Whoever reads safetensors opens what is written as it is"
    model = FORMS['pruned'](Tied())
    save_pruned(model, tmp_path/'a')
    state = safetensors.torch.load_file(tmp_path/'a')
    assert state.keys()==model.state_dict().keys()-{'other.weight'} and all(torch.equal(v, model.state_dict()[k]) for k,v in state.items())
    with safetensors.safe_open(tmp_path/'a', 'pt') as f: assert list(f.metadata())==['fasterai'] and f.metadata()['fasterai'].startswith('pruned 3 ')
    save_compressed(model, tmp_path/'b')
    assert list(safetensors.torch.load_file(tmp_path/'b'))==['.fasterai']

DTYPES = [o for o in vars(torch).values() if isinstance(o, torch.dtype) and not str(o).startswith(('torch.q','torch.bits')) and o.itemsize and 'x2' not in str(o) and not any(c in str(o) for c in ('int1','int2','int3','int4','int5','int6','int7')) or o in (torch.int16,torch.int32)]

@pytest.mark.parametrize('dtype', dict.fromkeys(DTYPES), ids=str)
def test_types(dtype, tmp_path):
    "Every type, also one without a name in safetensors; empty tensors, and scalars"
    g = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (24*dtype.itemsize,), dtype=torch.uint8, generator=g)
    tensors = dict(a=raw.view(dtype), b=raw.view(dtype).reshape(2,3,4).transpose(0, 2), c=raw.view(dtype)[:0], d=raw.view(dtype)[5])
    write_file(tmp_path/'a', 'example', tensors)
    found,_ = read_file(tmp_path/'a', 'example')
    bits = lambda t: bytes(files._bytes_of(t))
    assert all(found[k].shape==v.shape and found[k].dtype==dtype and bits(found[k])==bits(v) for k,v in tensors.items())

@pytest.mark.parametrize('kind,tensors', [('', {}), ('Net', {}), ('0'*16, {}), ('net', {'.fasterai':torch.ones(1)}), ('net', {'__metadata__':torch.ones(1)}), ('net', {'\ud800':torch.ones(1)}), ('net', {3:torch.ones(1)}), ('net', {'a':3})])
def test_what_has_no_place_in_a_file(kind, tensors, tmp_path):
    with pytest.raises(ValueError): write_file(tmp_path/'a', kind, tensors)
    assert not list(tmp_path.iterdir())

def test_small_files_stay_small(tmp_path):
    "The outer form takes about a hundred bytes more than that of version 1 did"
    model = load_compressed(OLD/'compressed_1', old_net(1))
    save_compressed(model, tmp_path/'a')
    assert (tmp_path/'a').stat().st_size<(OLD/'compressed_1').stat().st_size+150
    told = write_file(tmp_path/'b', 'example', {}) or (tmp_path/'b').stat().st_size
    assert told<=72

def test_types_and_sizes_are_the_models(tmp_path):
    for save,load in ((save_pruned,load_pruned),(save_compressed,load_compressed)):
        for make in (lambda m: m, FORMS['pruned']):
            save(make(Tied()).double(), tmp_path/'a')
            other = Tied(1)
            before = snap(other)
            with pytest.raises(FileError, match='convert the model first'): load(tmp_path/'a', other)
            assert same(before, snap(other)) and same(snap(load(tmp_path/'a', other.double())), snap(make(Tied()).double()))
            head = Tied()
            head.head,head.other = nn.Linear(16, 5),nn.Linear(16, 5)
            before = snap(head)
            with pytest.raises(FileError, match='another architecture'): load(tmp_path/'a', head.double())
            assert [o[0] for o in before]==[o[0] for o in snap(head)] and '_pruned' not in vars(head)

def test_an_error_while_it_is_read(tmp_path, monkeypatch):
    "Whatever it is, and whenever: numbers, memory layouts, ties and gradients are as they were"
    save_pruned(FORMS['all'](Tied()), tmp_path/'a')
    save_compressed(Tied(), tmp_path/'b')
    read = files.File._decoded
    for path in (tmp_path/'a',tmp_path/'b'):
        for at in range(6):
            left = [at]
            def fails(self, name, data):
                left[0] -= 1
                if left[0]<0: raise KeyboardInterrupt
                return read(self, name, data)
            model = Tied(1).to(memory_format=torch.channels_last)
            model(X).sum().backward()
            before,grads,params = snap(model),[p.grad.clone() for p in model.parameters()],[*model.parameters()]
            monkeypatch.setattr(files.File, '_decoded', fails)
            with pytest.raises(KeyboardInterrupt): load_pruned(path, model)
            monkeypatch.undo()
            assert same(before, snap(model)) and all(a is b for a,b in zip(params, model.parameters())) and all(torch.equal(p.grad, g) for p,g in zip(params, grads)) and model.other.weight is model.head.weight

@pytest.mark.parametrize('at', range(0, 16, 3))
def test_an_interrupt_while_numbers_change_places(tmp_path, monkeypatch, at):
    "In the middle of a tensor, too, what was there comes back"
    save_compressed(Tied(), tmp_path/'a')
    monkeypatch.setattr(saved, '_PART', 5)
    copy,left = torch.Tensor.copy_,[at]
    def fails(self, *args, **kwargs):
        left[0] -= 1
        if left[0]==-1: raise KeyboardInterrupt
        return copy(self, *args, **kwargs)
    model = Tied(1)
    before = snap(model)
    monkeypatch.setattr(torch.Tensor, 'copy_', fails)
    with pytest.raises(KeyboardInterrupt): load_compressed(tmp_path/'a', model)
    monkeypatch.undo()
    assert left[0]<-1 and same(before, snap(model))

# --- text of strangers

@pytest.mark.parametrize('text', ['{"a":1,"a":1}', '[1e999]', '[-1e999]', '[Infinity]', '[NaN]', '"\\ud800"', '{"\\udc00":1}', '['*26+']'*26, '['*10**5, '{"a":'*10**5, '[1,]', '9'*5000, 'é', b'\xff', b'\x00'])
def test_json(text):
    start = time.process_time()
    with pytest.raises(ValueError): read_json(text)
    assert time.process_time()-start<1 and read_json('["\\ud83d\\ude00", 1.5, {"a":null}]')==['😀',1.5,{'a':None}]

@pytest.mark.parametrize('kind', damage.KINDS)
def test_damaged(kind, tmp_path):
    "Read the same, or refused in words and soon; `tests/conformance/files.py` tries more of them"
    trial = damage.Trial(kind, tmp_path)
    counts = trial.run(300, seed=1)
    assert not trial.wrong and not counts['slow'] and counts['refused']>200 and trial.memory<2**17, (counts, trial.wrong[:3])

def test_any_bit(tmp_path):
    "of a file with a checksum is noticed"
    for name in ('pruned','compressed'):
        trial = damage.Trial(name, tmp_path)
        for i in range(0, 8*len(trial.data), 7):
            trial.one(trial.data[:i//8]+bytes([trial.data[i//8]^1<<i%8])+trial.data[i//8+1:], False)
        assert not trial.wrong and not trial.counts['same'] and trial.counts['refused']

def test_large_numbers_take_neither_time_nor_memory(tmp_path):
    "Lengths, shapes and ranges that a stranger has written are not believed"
    save_pruned(FORMS['pruned'](Tied()), tmp_path/'a')
    kind,version,head,body,table = damage.parts((tmp_path/'a').read_bytes())
    name = next(iter(table['plan']['kept']))
    def forged(**new): (tmp_path/'b').write_bytes(damage.joined(*{**dict(kind=kind, version=version, head=head, body=body, table=table), **new}.values()))
    def plan(**new): return {**table, 'plan':{**table['plan'], **new}}
    for new in (dict(table=plan(kept={name:{'0':'0-999999999999'}})), dict(table=plan(sizes={name:[10**12]})), dict(table=plan(before=[{'unsaved':''}]*600)), dict(table=plan(attrs={'a':{'out_channels':3}})), dict(table=plan(attrs={'a':{'stride':[2,2]}})),
                dict(table=plan(attrs={'norm':{'eps':1e9}})), dict(table=plan(attrs={'norm':{'forward':1}})), dict(table=plan(attrs={'a':{'__dict__':{}}})), dict(head={**head, 'a.bias':dict(dtype='F32', shape=[2**40], data_offsets=[0,2**42])}),
                dict(table={**table, 'x':'y'*2**22}), dict(table={**table, 'last':[0]}), dict(table={**table, 'tied':{'a.bias':'a.bias'}})):
        forged(**new)
        model,start = Tied(1),time.process_time()
        before = snap(model)
        with pytest.raises(FileError): load_pruned(tmp_path/'b', model)
        assert time.process_time()-start<2 and same(before, snap(model)), list(new)

def test_no_file(tmp_path):
    "What is none is told"
    os.mkfifo(tmp_path/'pipe')
    for load in (load_pruned,load_compressed):
        with pytest.raises(FileError, match='is a pipe: a file is asked for'): load(tmp_path/'pipe', Tied())
        with pytest.raises(FileError, match='is a device'): load('/dev/zero', Tied())
        with pytest.raises(FileNotFoundError): load(tmp_path/'none', Tied())
        with pytest.raises(IsADirectoryError): load(tmp_path, Tied())
        with pytest.raises(TypeError): load(tmp_path/'none', {})

# --- written whole or not at all

def test_what_cannot_be_written_to(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path/'socket'))
        for save in (save_pruned, save_compressed, lambda m, p: write_file(p, 'x', {})):
            for path,kind in ((tmp_path/'pipe','a pipe'),(tmp_path/'socket','a socket'),('/dev/null','a device')):
                with pytest.raises(ValueError, match=f'is {kind}: a file is asked for'): save(Tied(), path)
            with pytest.raises(IsADirectoryError, match='a file is asked for'): save(Tied(), tmp_path)
            with pytest.raises(FileNotFoundError, match='there is no folder .*nowhere to write a into'): save(Tied(), tmp_path/'nowhere'/'a')
    assert sorted(o.name for o in tmp_path.iterdir())==['pipe','socket'] and stat.S_ISCHR(os.stat('/dev/null').st_mode)

def test_permissions(tmp_path):
    "Those of the file that was there, or of any new one"
    was = os.umask(0o027)
    try: save_pruned(Tied(), tmp_path/'a')
    finally: os.umask(was)
    assert stat.S_IMODE((tmp_path/'a').stat().st_mode)==0o640
    for mode in (0o600,0o755,0o666):
        (tmp_path/'a').chmod(mode)
        save_compressed(Tied(), tmp_path/'a')
        assert stat.S_IMODE((tmp_path/'a').stat().st_mode)==mode

def test_links(tmp_path):
    "are followed, and stay links; also one to a file that is not there yet"
    (tmp_path/'folder').mkdir()
    for name in ('there','not'):
        (tmp_path/name).symlink_to(tmp_path/'folder'/name)
        for _ in range(2): save_pruned(Tied(), tmp_path/name)
        assert (tmp_path/name).is_symlink() and load_pruned(tmp_path/'folder'/name, Tied(1)) and [o.name for o in (tmp_path/'folder').iterdir() if o.name.startswith('.')]==[]
    (tmp_path/'round').symlink_to(tmp_path/'round')
    with pytest.raises(OSError): save_pruned(Tied(), tmp_path/'round')

@pytest.mark.parametrize('name', ['x'*255, 'é'*120, '[a]*?', ' a\n', '.hidden'])
def test_names(name, tmp_path):
    "Of any length, and with any characters"
    for _ in range(2): save_pruned(Tied(), tmp_path/name)
    assert [o.name for o in tmp_path.iterdir()]==[name]

def test_debris(tmp_path):
    "What a dead writer has left goes with the next write to the same path; what a living one is writing stays, and so do files of others"
    ours = ['.a.0123abcd.part','.a.00000000.part']
    for o in (*ours,'.a.0123abcd.parts','.a.part','.ab.0123abcd.part','.a.xyz.part'): (tmp_path/o).write_bytes(b'x')
    (tmp_path/'.a.11111111.part').mkdir()
    (tmp_path/'.a.11111111.part'/'a').write_bytes(b'x')
    with replacing(tmp_path/'a') as f:
        f.write(b'first')
        assert len(list(tmp_path.glob('.a.????????.part')))==1
        with replacing(tmp_path/'a') as g: g.write(b'second')
        assert (tmp_path/'a').read_bytes()==b'second' and len(list(tmp_path.glob('.a.????????.part')))==1
    assert (tmp_path/'a').read_bytes()==b'first' and sorted(o.name for o in tmp_path.iterdir())==['.a.0123abcd.parts','.a.part','.a.xyz.part','.ab.0123abcd.part','a']

class Full:
    "A disk with room for `n` bytes"
    def __init__(self, f, n): self.f,self.n = f,n
    def write(self, b):
        self.n -= len(b)
        if self.n<0: raise OSError(errno.ENOSPC, 'No space left on device')
        return self.f.write(b)
    def __getattr__(self, name): return getattr(self.f, name)

@pytest.mark.parametrize('room', [0,100,2000])
def test_full_disk(room, tmp_path, monkeypatch):
    save_pruned(Tied(), tmp_path/'a')
    old,fdopen = (tmp_path/'a').read_bytes(),os.fdopen
    monkeypatch.setattr(files.os, 'fdopen', lambda *args: Full(fdopen(*args), room))
    for save in (save_pruned, lambda m, p: write_file(p, 'x', dict(w=torch.zeros(1000)))):
        with pytest.raises(OSError, match='No space left on device') as e: save(Tied(3), tmp_path/'a')
        assert e.value.errno==errno.ENOSPC and e.value.filename==str(tmp_path/'a')
    assert (tmp_path/'a').read_bytes()==old and len(list(tmp_path.iterdir()))==1

LIMITED = '''
import resource, signal, sys, torch
from fasterai.core.files import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try: write_file(sys.argv[1], 'x', dict(w=torch.zeros(100_000)))
except OSError as e: print(e.errno, e.filename)
'''
def test_limit_of_the_system(tmp_path):
    (tmp_path/'a').write_bytes(b'old')
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', LIMITED, tmp_path/'a'], capture_output=True, text=True, check=True).stdout
    assert out.split()==[str(errno.EFBIG),str(tmp_path/'a')] and (tmp_path/'a').read_bytes()==b'old' and len(list(tmp_path.iterdir()))==1

def test_killed(tmp_path):
    "The file is whole, and the next write clears up; `tests/conformance/files.py` kills more of them"
    assert conformance.killed(tmp_path/'a', 8)[1]==0

def test_files_of_other_programs(tmp_path):
    "take their places together, the one that was asked for last; none after an error"
    (tmp_path/'net').write_bytes(b'old')
    (tmp_path/'net').chmod(0o604)
    def write(fails):
        with replacing_from(tmp_path/'net') as folder:
            for o in ('net','net.data','other'): (folder/o).write_bytes(o.encode())
            if fails: raise ValueError
    with pytest.raises(ValueError): write(True)
    assert [o.name for o in tmp_path.iterdir()]==['net']
    write(False)
    assert sorted(o.name for o in tmp_path.iterdir())==['net','net.data'] and (tmp_path/'net').read_bytes()==b'net' and stat.S_IMODE((tmp_path/'net').stat().st_mode)==0o604

# --- states of trainings

def test_states_have_a_checksum(tmp_path):
    "A bit that is another one in what we put into a checkpoint is refused"
    model = FORMS['pruned'](Tied())
    states = dict(sparsify={'pace.last':torch.tensor(3), 'masks':torch.rand(20)<.5})
    with carrying(model, states): state = model.state_dict()
    found = {}
    with receiving(Tied(1), found) : pass
    def received(state):
        fresh,found = Tied(1),{}
        with receiving(fresh, found): fresh.load_state_dict(state)
        return fresh,found
    fresh,found = received(state)
    assert same(snap(model), snap(fresh)) and torch.equal(found['sparsify']['masks'], states['sparsify']['masks']) and 'checksum' not in found
    ours = state._metadata['']['fasterai']
    for t in (ours['plan'],ours['sparsify']['pace.last'],ours['sparsify']['masks'],ours['checksum']):
        raw = t.view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)
        raw[0] ^= 1
        with pytest.raises(FileError, match='checksum differs'): received(state)
        raw[0] ^= 1
    for k in ('plan','sparsify','checksum'):
        del (other := dict(ours))[k]
        state._metadata['']['fasterai'] = other
        if k!='checksum':
            with pytest.raises(FileError, match='checksum differs'): received(state)
        else: assert same(snap(model), snap(received(state)[0]))  # as earlier versions wrote it

def test_states_of_techniques():
    "Whoever keeps them, they are refused if they are sealed and damaged, and if they are no tensors by name"
    technique = Sparsify(50)
    state = {'pace.last':torch.tensor(3)}
    technique.load_state_dict(state), technique.load_state_dict(sealed(state))
    for bad in ({**sealed(state), 'pace.last':torch.tensor(2)}, {**state, 'checksum':torch.zeros(8, dtype=torch.uint8)}, {**state, 'checksum':3}, {3:torch.tensor(3)}, {'pace.last':[3]}):
        with pytest.raises(FileError): technique.load_state_dict(bad)
    assert unsealed({})=={} and sealed({})=={}

# --- bars

def test_bars(tmp_path, monkeypatch):
    "What takes longer than two seconds shows a bar, if it is wanted; what does not, none"
    shown = []
    def bar(it, show):
        shown.append(show)
        return it
    monkeypatch.setattr(running, 'with_bar', bar)
    do = dict(save_pruned=lambda o: save_pruned(Tied(), tmp_path/'a', progress=o), load_pruned=lambda o: load_pruned(tmp_path/'a', Tied(), progress=o),
        save_compressed=lambda o: save_compressed(Tied(), tmp_path/'b', progress=o), load_compressed=lambda o: load_compressed(tmp_path/'b', Tied(), progress=o))
    for f in do.values(): f(True)
    assert not shown
    clock = iter(range(10**6))
    monkeypatch.setattr(running, 'perf_counter', lambda: next(clock)*3)
    for f in do.values():
        shown.clear()
        f(True)
        assert shown and all(shown)
        shown.clear()
        f(False)
        assert shown and not any(shown)

def test_one_error(): assert CompressedFileError is FileError and issubclass(FileError, ValueError)
