"""The coding of a tensor: each codec gives back every bit, by as many threads as there are, takes no more bytes than it should, and refuses what it did not write"""
import hashlib, json, os, tracemalloc
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings
from fasterai.quantize import codecs
from fasterai.core.files import FileError as CompressedFileError
from test_compressed_file import tensors

@pytest.fixture
def tiny(monkeypatch):
    "All that is for large tensors, in small ones: lanes from 64 symbols on, blocks of 2,000 words"
    for k,v in dict(_SMALL=64, _BLOCK=2000, _CHUNK=2000).items(): monkeypatch.setattr(codecs, k, v)

def written(t):
    "Name, layout as it comes out of a header, bytes"
    name,layout,parts = codecs._write_tensor(t)
    layout = json.loads(json.dumps(layout))
    data = b''.join(parts)
    assert codecs._n_bytes(name, t.dtype, t.shape, *layout)==len(data)
    return name,layout,data

def read(name, layout, data, dtype, shape):
    source = codecs._Source(data)
    return codecs._read_tensor(name, source.take, dtype, shape, *layout)

def raw(t): return t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t.reshape(-1)

def same(t):
    "`t` comes back; its coded form"
    coded = written(t)
    back = read(*coded, t.dtype, t.shape)
    assert back.dtype is t.dtype and back.shape==t.shape and torch.equal(raw(back), raw(t))
    return coded

def sparse(*shape, left=.1, seed=0, values=None, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=gen)
    if values: t = (t*values/4).round()/values+0.  # no -0.
    return torch.where(torch.rand(shape, generator=gen)<left, t, 0).to(dtype)

def outlined(o=64, i=64):
    "Kernels in which neighbours are alike, of inputs that matter more or less"
    gen = torch.Generator().manual_seed(0)
    size = torch.randn(o, i, 1, 1, generator=gen)+.6*torch.randn(1, i, 1, 1, generator=gen)
    t = size+.7*torch.randn(o, i, 3, 3, generator=gen)
    return torch.where(t.abs()<t.abs().flatten().quantile(.8), 0, t)

@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors())
def test_odd_tensors_in_lanes(tiny, t): same(t.resolve_conj())

@pytest.mark.parametrize('shape', [(300,),(1,300),(300,1),(1,1,40,40),(7,5,3,3),(40,9,2),(2,3,4,2,3),(5,400),(400,5),(1,1,1),(3000,2),(2,3000),(100,1,3,3),(3,90,7,7)])
def test_shapes_of_sparse_tensors(shape, tiny):
    for left in (.02,.3): same(sparse(*shape, left=left))
    same(sparse(*shape, left=.3, values=8).int())
    same(torch.complex(sparse(*shape), sparse(*shape, seed=1)))

def test_nothing_and_little(tiny):
    for t in (torch.zeros(500, 3), torch.ones(500, 3), torch.zeros(0, 4), torch.tensor(2.), torch.zeros(300, dtype=torch.bool), torch.arange(5000), torch.full((90,90), -0.)): same(t)
    assert len(same(torch.zeros(100, 100))[2])==0 and len(same(torch.ones(1000))[2])<40

def test_large_tensors():
    "The real sizes: a sparse layer of shared values, a mask, exponents, and many different values"
    n = codecs._SMALL
    name,layout,data = same(sparse(1000, 700, left=.1, values=8))
    assert name=='rows' and layout[0][0][0] and len(data)<1.03*(.48+.0794*1.925)*1000*700/8  # the entropies of a position with its sign, and of a value that is left, in bits
    same(sparse(n//1000, 1100, left=.5).bfloat16())
    same(torch.rand(n+77, generator=torch.Generator().manual_seed(0))<.01)
    same(torch.arange(n+5)%70000)

@pytest.mark.parametrize('make,least', [(lambda gen: torch.randn(1000, 700, generator=gen).bfloat16(), 1.5), (lambda gen: torch.randn(1000, 700, generator=gen), 1.195),
    (lambda gen: torch.randn(1000, 700, generator=gen).bfloat16().float(), 3.), (lambda gen: torch.randint(-3, 4, (1000,700), generator=gen).float(), 10.5)])
def test_lossless_ratio(make, least):
    t = make(torch.Generator().manual_seed(0))
    assert t.nbytes/len(same(t)[2])>least

def test_same_bytes_from_any_number_of_threads(tiny):
    before = torch.get_num_threads()
    for t in (torch.randn(300, 100), sparse(300, 100), sparse(90, 30, 3, 3, values=4)):
        got = []
        for n in (1,3):
            torch.set_num_threads(n)
            try: got.append(same(t))
            finally: torch.set_num_threads(before)
        assert got[0]==got[1] and len(got[0][1])>5

@pytest.mark.parametrize('lanes', [False,True])
def test_positions_take_what_they_should(lanes, monkeypatch):
    "Independent ones take their entropy and little more, alike ones less, and no more than version 1 took but for the lanes"
    if lanes: monkeypatch.setattr(codecs, '_SMALL', 1<<12)
    def size(t): return len(codecs._Rows().write(codecs._bits(t>0)+2*codecs._bits(t<0), tuple(t.shape), True, bytes(1<<16))[1])-(1<<16)
    def entropy(t):
        p = np.bincount((t.sign().long()+1).flatten().numpy())/t.numel()
        return -(p*np.log2(p)).sum()*t.numel()/8
    t = sparse(300, 400)
    assert size(t)<(1.03 if lanes else 1.01)*entropy(t)
    t = outlined()
    first = len(codecs._Columns().write(codecs._bits(t>0)+2*codecs._bits(t<0), tuple(t.shape), True, b'')[1])
    assert size(t)<(1.03 if lanes else .99)*first and size(t)<.9*entropy(t)

def test_lanes_give_back_what_their_states_began_with():
    rng = np.random.default_rng(0)
    for lanes,tail in ((1,b''),(7,b'abc'),(300,rng.bytes(2000)),(512,rng.bytes(700))):
        w,rows = codecs._LaneWriter(lanes),[rng.random(rng.integers(1, lanes+1))<.2 for _ in range(40)]
        for o in rows: w.bits(o, w.shares(np.full(len(o), .2)))
        source = codecs._Source(w.done(tail))
        r = codecs._LaneReader(source, lanes)
        for o in rows: assert (r.bits(None, r.shares(np.full(len(o), .2)))==o).all()
        r.done()
        assert bytes(source.data).rstrip(b'\0')==tail.rstrip(b'\0')

def test_states_of_any_size():
    x = np.array([1<<16, (1<<32)-1, *(1<<np.arange(16, 32)), *np.random.default_rng(0).integers(1<<16, 1<<32, 101)], np.uint32)
    for n in (1,2,len(x)):
        source = codecs._Source(codecs._pack_states(x[:n])+b'next')
        assert (codecs._unpack_states(source, n)==x[:n]).all() and bytes(source.data)==b'next'

def test_powers_are_the_same_everywhere():
    "They decide how a file is read: whole ones are exact, and the others are those of one constant"
    x = np.arange(-200, 60)
    assert (codecs._powers(x[::2])==[2.**i for i in range(-100, 30)]).all() and (codecs._powers(x[1::2])==[2.**i*1.4142135623730951 for i in range(-100, 30)]).all()
    assert (codecs._half_octaves(codecs._powers(x))[::2]==x[::2]).all()

def test_shares_fill_their_table():
    rng = np.random.default_rng(0)
    for counts in ([5],[1,10**9],[0,3,0],[1]*256,[10**7]+[1]*255,rng.integers(0, 9, 256),[64]*128+[1]*128):
        share = codecs._shares(np.array(counts))
        assert share.sum()==1<<codecs._COARSE and ((share>0)==(np.array(counts)>0)).all()

def test_books_are_found():
    rng = np.random.default_rng(0)
    for dtype in (np.uint8,np.uint16,np.uint32,np.uint64):
        for k in (1,2,200,500,700):
            book = np.unique(rng.integers(0, 1<<8*dtype().itemsize-1, k).astype(dtype))
            words = rng.choice(book, 5000)
            got,at = codecs._book_of(words)
            assert (got==np.unique(words)).all() and (got[at]==words).all()

PINNED = ['438f795a676c7755', '3f2d5fdde983233d', 'ef1f26c6c1a261f3', '48e4468d9516b7d3']

def test_lanes_are_pinned():
    "Files stay readable: a change of a single bit needs a codec of another name"
    i = np.arange(1<<19, dtype=np.uint32)*np.uint32(2654435761)
    signs = np.where((i>>np.uint32(28))<2, 1+(i>>np.uint32(20)&np.uint32(1)), 0).astype(np.uint8)
    got = [codecs._Rows().write(signs, shape, True, bytes(range(256))*64) for shape in ((512,1024),(128,128,4,8),(1<<19,))]
    w = codecs._LaneWriter(500)
    w.symbols((i>>np.uint32(28)).astype(np.uint8), codecs._shares(np.bincount(i>>np.uint32(28))))
    got.append(([],w.done()))
    assert [hashlib.sha256(json.dumps(where).encode()+data).hexdigest()[:16] for where,data in got]==PINNED

# --- damage

def numbers(o, path=()):
    if isinstance(o, list):
        for i,v in enumerate(o): yield from numbers(v, (*path,i))
    else: yield path

def damaged(rng, layout, data):
    "One of four ways: bits, a piece of bytes, the end, or numbers of the layout"
    kind,data,layout = rng.integers(4),bytearray(data),json.loads(json.dumps(layout))
    if kind==0:
        for _ in range(rng.integers(1, 9)): data[rng.integers(len(data))] ^= 1<<int(rng.integers(8))
    elif kind==1:
        at = rng.integers(len(data))
        data[at:at+rng.integers(1, 60)] = rng.bytes(rng.integers(0, 60))
    elif kind==2: del data[rng.integers(len(data)):]
    else:
        for _ in range(rng.integers(1, 4)):
            *path,last = list(numbers(layout))[rng.integers(len(list(numbers(layout))))]
            at = layout
            for i in path: at = at[i]
            old = at[last] if type(at[last]) is int else 0
            at[last] = [old+int(rng.integers(-3, 4)), int(rng.integers(-9, 2**20)), 2**31, 2**47, 10**30, -1, 0, old*2, True, 1.5, None, 'x', [], [[]]][rng.integers(14)]
    return layout,bytes(data)

FUZZ = int(os.environ.get('FUZZ', 300))
CASES = dict(columns=lambda: sparse(20, 30, values=4), rows=lambda: outlined(8, 8), lanes=lambda: outlined(16, 16), shared=lambda: sparse(50, 40, left=.3, values=4), dense=lambda: torch.randn(4000, generator=torch.Generator().manual_seed(0)),
    short=lambda: torch.randn(3000, generator=torch.Generator().manual_seed(0)).bfloat16(), mask=lambda: sparse(30, 100)!=0, whole=lambda: (sparse(3000, left=.9)*9).long())

@pytest.mark.parametrize('case', CASES)
def test_damage_is_refused_or_read(case, request):
    "Damaged forms of each codec (FUZZ=5000 in the environment for more): a tensor of that type and shape, or an error in words, in little time and memory"
    if case not in ('columns','rows'): request.getfixturevalue('tiny')
    t,rng,counts = CASES[case](),np.random.default_rng(0),dict(read=0, refused=0)
    name,layout,data = written(t)
    assert case not in codecs._CODECS or name==case
    for i in range(FUZZ):
        bad,bytes_ = damaged(rng, layout, data)
        watched = i%10==0
        if watched: tracemalloc.start()
        try:
            codecs._n_bytes(name, t.dtype, t.shape, *bad)
            back = read(name, bad, bytes_, t.dtype, t.shape)
            assert back.dtype is t.dtype and back.shape==t.shape
            counts['read'] += 1
        except ValueError: counts['refused'] += 1
        if watched:
            assert tracemalloc.get_traced_memory()[1]<5_000_000
            tracemalloc.stop()
    assert counts['refused']>.2*FUZZ, counts

def test_refusals_are_in_words(tiny):
    name,layout,data = written(sparse(50, 40))
    for bad,match in ((data[:40],'cut short'),(data[:-2],'cut short|end where they began'),(data+b'abc','')):
        if match:
            with pytest.raises(CompressedFileError, match=match): read(name, layout, bad, torch.float32, (50,40))
    with pytest.raises(ValueError, match='not told how'): codecs._n_bytes('morse', torch.float32, (50,40), *layout)
    with pytest.raises(ValueError, match='not told how'): codecs._n_bytes(name, torch.float32, (50,41), *layout[:-1])
