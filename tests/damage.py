"Files of each kind, and ways to damage them: a checksum that no longer fits, or one that was made to fit"
import copy, hashlib, importlib, json, resource, time, warnings, zlib
import numpy as np, torch
from torch import nn
from fasterai.core.files import FileError
from fasterai.core.plan import pruned_plan
from fasterai.core.saved import save_model
from fasterai.misc.all import BN_Folder, FC_Decomposer
from fasterai.prune.all import Pruner, load_pruned, save_pruned
from fasterai.quantize.all import Quantizer, load_compressed, save_compressed
from fasterai.sparse.sparsifier import Sparsifier

sens = importlib.import_module('fasterai.analyze.sensitivity')
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))

class Tied(nn.Module):
    "Two heads with one weight, and a norm with statistics"
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a,self.norm,self.b = nn.Conv2d(3, 8, 3, padding=1),nn.BatchNorm2d(8),nn.Conv2d(8, 6, 3, padding=1)
        self.fc,self.head,self.other = nn.Linear(6, 16),nn.Linear(16, 4),nn.Linear(16, 4)
        self.other.weight = self.head.weight
        self.norm.running_mean.normal_(), self.norm.running_var.uniform_(.5, 2)
        self.register_buffer('mask', torch.rand(9)<.5)
        self.eval()
    def forward(self, x):
        x = self.b(self.norm(self.a(x)).relu()).relu().mean((2,3))
        x = self.fc(x).relu()
        return self.head(x)+self.other(x)

def pruned(path): save_pruned(Pruner(Tied(), 40, example_inputs=X).prune_model(), path)
def folded(path): save_pruned(FC_Decomposer().decompose(BN_Folder().fold(Pruner(Tied(), 30, example_inputs=X).prune_model(), X), .5, example_inputs=X), path)
def int8(path): save_pruned(Quantizer('weight_only', measure=False).quantize(BN_Folder().fold(Tied(), X)), path)
def compressed(path):
    model = Pruner(Tied(), 30, example_inputs=X).prune_model()
    Sparsifier(model, 'weight', layer_type=(nn.Conv2d,nn.Linear)).sparsify_model(70)
    with torch.no_grad(): model.fc.weight.copy_((model.fc.weight*8).round()/8)
    save_compressed(model, path)
def ticket(path): save_model(Tied(), path, 'ticket', 'the model')
def total(m): return float(m(X).double().abs().sum())
def scan(path): sens.sensitivity(Tied(), total, [50,90], progress=False).to_csv(path)

KINDS = dict(pruned=(pruned,load_pruned), folded=(folded,load_pruned), int8=(int8,load_pruned), compressed=(compressed,load_compressed), ticket=(ticket,load_pruned), scan=(scan,None))

# --- files with a checksum that fits

KEY,CODED = 'fasterai','.fasterai'

def parts(data):
    "What a file consists of: kind, version, entries, bytes of tensors, table"
    n = int.from_bytes(data[:8], 'little')
    head,body = json.loads(data[8:8+n]),data[8+n:]
    kind,version,_,told = head.pop('__metadata__')[KEY].split(' ', 3)
    if CODED not in head: return kind,version,head,body,json.loads(told)
    return kind,version,head,body[:-int(told)],json.loads(zlib.decompress(body[-int(told):]))

def packing(table, most=32):
    "`table`, packed as a writer does: not at all if it would be more than `most` times shorter"
    packed = zlib.compress(table)
    return packed if len(packed)*most>=len(table) else zlib.compress(table, 0)

def joined(kind, version, head, body, table, packed=None, text=None):
    "A file of these parts, with a checksum that fits; `text` in place of that of the header, if it is given"
    table = table if isinstance(table, str) else json.dumps(table, separators=(',',':'))
    if CODED in head:
        packed = packing(table.encode()) if packed is None else packed
        if isinstance(head[CODED], dict) and isinstance(head[CODED].get('data_offsets'), list) and head[CODED]['data_offsets']:
            a = head[CODED]['data_offsets'][0]
            if isinstance(a, int): head = {**head, CODED:dict(head[CODED], shape=[len(body)+len(packed)-a], data_offsets=[a,len(body)+len(packed)])}
        body,table = body+packed,str(len(packed))
    told = json.dumps({'__metadata__':{KEY:f'{kind} {version} {"0"*16} {table}'}, **head}, separators=(',',':')) if text is None else text(f'{kind} {version} {"0"*16} {table}', head)
    told = told.encode('utf-8', 'surrogatepass')
    told = told.ljust(-(-len(told)//8)*8)
    start = len(told).to_bytes(8, 'little')+told
    return start.replace(b'0'*16, hashlib.blake2b(body+start, digest_size=8).hexdigest().encode(), 1)+body

def at(o, path):
    for k in path: o = o[k]
    return o
def places(o, path=()):
    "Where something is in lists and dicts"
    if path: yield path
    for k,v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else (): yield from places(v, (*path,k))

DEEP = []
for _ in range(400): DEEP = [DEEP]
STRANGE = [0, 1, -1, 7, 2**31, 2**62, 10**30, 1e9, .5, True, None, '', 'x', '0', '0-999999999999', '0-1,1-2', '-1', [], {}, [[]], {'0':'0'}, {'a':1}, DEEP, ['0']*50, 'forward', '__dict__', '__class__', 'training', 'eps', 'os.system', 'int64', 'F64']

def changed(o, rng):
    "A copy of `o` in which something is another"
    o = copy.deepcopy(o)
    for _ in range(rng.integers(1, 4)):
        every = list(places(o))
        if not every: return o
        *path,k = every[rng.integers(len(every))]
        where,how = at(o, path),rng.integers(7)
        v = where[k]
        if how==0: where[k] = copy.deepcopy(STRANGE[rng.integers(len(STRANGE))])
        elif how==1: del where[k]
        elif how==2 and isinstance(where, dict): where[str(STRANGE[rng.integers(len(STRANGE))])[:20]] = v
        elif how==2: where.insert(int(rng.integers(len(where)+1)), copy.deepcopy(v))
        elif how==3 and type(v) is int: where[k] = v+int(rng.integers(-3, 4))
        elif how==4 and type(v) is str and v:
            i = rng.integers(len(v))
            where[k] = v[:i]+chr(int(rng.integers(32, 126)))+v[i+rng.integers(2):]
        elif how==5: where[k] = copy.deepcopy(at(o, every[rng.integers(len(every))]))
        elif how==6 and isinstance(v, (list,dict)) and len(v)>1:
            items = list(v.items()) if isinstance(v, dict) else v
            items = [items[i] for i in rng.permutation(len(items))]
            where[k] = dict(items) if isinstance(v, dict) else items
    return o

TRICKS = [lambda s: s.replace('{', '{"a":1,"a":2,', 1), lambda s: s.replace(':', ':NaN,"b":', 1), lambda s: s.replace(':', ':1e999,"b":', 1), lambda s: s.replace('"', '"\\ud800', 1), lambda s: '['*5000+s, lambda s: s[:len(s)//2],
    lambda s: s+s, lambda s: s.replace('1', '9'*500, 1), lambda s: s.replace('{', '{"x":'+'[0,'*2000+'0'+']'*2000+',', 1), lambda s: s.replace(',', ',,', 1), lambda s: s[::-1], lambda s: 'null', lambda s: '3', lambda s: '"x"', lambda s: '']

def structural(data, rng):
    "A file that was tampered with by somebody who knows its form"
    kind,version,head,body,table = parts(data)
    how = rng.integers(9)
    if how<3: return joined(kind, version, head, body, changed(table, rng))
    if how==3: return joined(kind, version, changed(head, rng), body, table)
    if how==4: return joined(kind, version, head, flipped(body, rng), table)
    if how==5: return joined(kind, version, head, body, TRICKS[rng.integers(len(TRICKS))](json.dumps(table)))
    if how==6: return joined(kind, version, head, body, table, text=lambda told, head: TRICKS[rng.integers(len(TRICKS))](json.dumps({'__metadata__':{KEY:told}, **head})))
    if how==7 and CODED in head: return joined(kind, version, head, body, table, packed=flipped(zlib.compress(json.dumps(table).encode()), rng))
    words = [str(STRANGE[rng.integers(13)])[:30],kind],[version,str(STRANGE[rng.integers(13)])[:30]]
    return joined(words[0][rng.integers(2)], words[1][rng.integers(2)], head, cut(body, rng), table)

def flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        if data: data[rng.integers(len(data))] ^= 1<<int(rng.integers(8))
    return bytes(data)
def cut(data, rng):
    a,b = sorted(rng.integers(len(data)+1, size=2).tolist())
    return data[:a]+data[b:] if rng.random()<.5 else data[:a]+rng.bytes(int(rng.integers(40)))+data[a:]

def structural_rows(data, rng):
    "Rows with other fields, and checksums that fit"
    head,*rows = [o.split(',') for o in data.decode().split('\r\n')[:-1]]
    for _ in range(rng.integers(1, 3)):
        i = int(rng.integers(len(rows)))
        row,j = rows[i][:-1],int(rng.integers(4))
        row[j] = [str(STRANGE[rng.integers(len(STRANGE)-1)])[:200],row[j][::-1],row[j]+'0','nan','inf','-inf','1e400','1_0','stem'][rng.integers(9)]
        rows[i] = sens._row(*row)
    if rng.random()<.3: rows.append(rows[rng.integers(len(rows))])
    return ''.join(map(sens._line, [head,*rows])).encode()

def damaged(data, rng, rows=False):
    "One of many ways to damage a file, and whether the checksum was made to fit"
    if rng.random()<.5: return (flipped if rng.random()<.5 else cut)(data, rng),False
    return (structural_rows if rows else structural)(data, rng),True

# --- what comes of it

def snap(model): return [(k,v.dtype,v.shape,v.stride(),v.detach().reshape(-1).view(torch.uint8).clone() if v.numel() else v) for k,v in model.state_dict().items()]
def same(a, b): return len(a)==len(b) and all(x[:4]==y[:4] and torch.equal(x[4], y[4]) for x,y in zip(a, b))
def attributes(model): return [{k:v for k,v in vars(m).items() if not k.startswith('_')} for m in model.modules()]

class Trial:
    "Reads damaged files of one kind, and counts what comes of them"
    def __init__(self, name, folder):
        (make,self.load),self.path,self.rows = KINDS[name],folder/'damaged',name=='scan'
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            make(folder/'whole')
        self.data = (folder/'whole').read_bytes()
        self.counts,self.wrong,self.time,self.memory = dict(same=0, refused=0, other=0, wrong=0, slow=0),[],0.,0
        if self.rows: self.layers,self.setting = [n for n,m in Tied().named_modules() if hasattr(m, 'weight')],self.data.decode().split('\r\n')[1].split(',')[0]
        self.right = self.read(folder/'whole')
        self.fresh()

    def fresh(self):
        if self.rows: return
        self.model = Tied(1)
        self.was,self.words,self.attrs = snap(self.model),str(self.model),attributes(self.model)
    def read(self, path):
        if self.rows: return sens._read(path, self.setting, self.layers)
        model = Tied(1)
        self.load(path, model)
        return snap(model),str(model),json.dumps(pruned_plan(model), sort_keys=True)
    def untouched(self): return self.rows or same(snap(self.model), self.was) and str(self.model)==self.words and attributes(self.model)==self.attrs and '_pruned' not in vars(self.model)
    def is_right(self):
        if self.rows: return all(o in self.right for o in self.got)
        return same(snap(self.model), self.right[0]) and (str(self.model),json.dumps(pruned_plan(self.model), sort_keys=True))==self.right[1:]

    def one(self, data, fits):
        self.path.write_bytes(data)
        before,start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,time.process_time()
        try:
            if self.rows: self.got = sens._read(self.path, self.setting, self.layers)
            else: self.load(self.path, self.model)
            what = 'read'
        except FileError: what = 'refused' if self.untouched() else 'wrong'
        except Exception as e: what = f'wrong: {type(e).__name__}: {e}'
        took = time.process_time()-start
        self.time,self.memory = max(self.time, took),max(self.memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)
        if what=='read':
            what = 'same' if self.is_right() else 'other' if fits else 'wrong'
            self.fresh()
        if what.startswith('wrong'):
            self.wrong.append((what,data))
            self.fresh()
        self.counts[what.split(':')[0]] += 1
        self.counts['slow'] += took>2

    def run(self, n, seed=0):
        rng = np.random.default_rng(seed)
        for _ in range(n): self.one(*damaged(self.data, rng, self.rows))
        return self.counts
