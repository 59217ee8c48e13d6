"Runs that go on from where the last one was certain give the same bits as whole ones"
import pytest, torch
from copy import deepcopy
from torch import nn
from torch.nn import functional as F
from fasterai.core import resumed
from fasterai.core.reads import follow, reads_of
from fasterai.core.resumed import Again, Room, Runs
from fasterai.repair.all import repair

def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()

def images(n=12, seed=0): return F.interpolate(torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), 9, mode='bilinear')

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.norm,self.b,self.c = nn.Conv2d(3, 8, 3, padding=1, bias=False),nn.BatchNorm2d(8),nn.Conv2d(8, 8, 3, padding=1),nn.Conv2d(8, 8, 1)
        self.out,self.shared = nn.Linear(8, 5),nn.Linear(8, 8)
        self.cuts = 0

class Plain(Net):
    def forward(self, x): return self.out(self.c(self.b(self.norm(self.a(x)).relu()).relu()).relu().mean((2,3)))
class Residual(Net):
    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        y = self.c(x)
        return self.out((y+x+self.b(x).relu()).mean((2,3)))
class InPlace(Net):
    "What is read later is written over before, and a view of it after"
    def forward(self, x):
        x = self.norm(self.a(x)).relu_()
        y = self.b(x)
        x[:,:4].mul_(2)
        y.relu_().add_(x)
        z = self.c(y)
        y.view(-1).add_(1)
        x += y
        z.add_(x).sigmoid_()
        return self.out(z.mean((2,3)))
class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers,self.out = nn.ModuleList(nn.Conv2d(3+4*i, 4, 3, padding=1) for i in range(3)),nn.Linear(15, 5)
    def forward(self, x):
        for m in self.layers: x = torch.cat([x,m(x.relu())], 1)
        return self.out(x.mean((2,3)))
class Twice(Net):
    def forward(self, x):
        y = self.norm(self.a(x)).relu().mean((2,3))
        return self.out(self.shared(self.shared(y).relu())+y)
class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.rnn,self.out = nn.Conv2d(3, 6, 3),nn.Conv2d(6, 6, 3),nn.LSTM(6, 5, bidirectional=True, batch_first=True, num_layers=2),nn.Linear(10, 4)
    def forward(self, x): return self.out(self.rnn(self.b(self.a(x).relu()).relu().mean(2).transpose(1, 2))[0])
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside,self.attn,self.out = nn.Linear(9, 8),nn.MultiheadAttention(8, 2, batch_first=True),nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    def forward(self, x):
        y = self.inside(x.flatten(1, 2))
        return self.out(self.layer(y+self.attn(y, y.flip(1), y, need_weights=False)[0]))
class Branches(Net):
    "Values decide on the way, on sizes, and on what is a number of Python"
    def forward(self, x):
        x = self.norm(self.a(x))
        if x.mean()>0: x,y = x.relu(),self.b(x)
        else: x,y = x.sigmoid(),self.b(x.tanh())
        n = int((x[:,0,0]>0).sum())+1
        keep = x[x.flatten(1).sum(1)>x.flatten(1).sum(1).median()]
        y = self.c(y+keep.mean()+n)
        if y.mean()>.1: y = y.exp().clamp(max=3)
        return self.out(y.mean((2,3))*len(keep))
class Looks(Net):
    "Numbers are read past all operations"
    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        top = x.amax((1,2,3))
        y = self.c(self.b(x).relu()).relu()
        return self.out(y.mean((2,3))*float(top.numpy().mean())+sum(top.tolist()))
class Random(Net):
    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        x = self.b(x+torch.rand_like(x)).relu()
        return self.out(self.c(x+torch.rand_like(x)).mean((2,3)))
class Counts(Net):
    "A buffer counts along, and takes part"
    def __init__(self):
        super().__init__()
        self.register_buffer('seen', torch.zeros(()))
    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        self.seen += x.mean()
        return self.out(self.c(self.b(x).relu()*self.seen).mean((2,3)))
class Shapes(Net):
    "A shape changes in place"
    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        y = self.b(x)
        x.transpose_(2, 3)
        return self.out(self.c(x+y).mean((2,3)))
class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Residual()
    def forward(self, image, scale=1.): return dict(out=self.net(image*scale), seen=image)

def bert():
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return transformers.BertModel(config, add_pooling_layer=False)
def texts(n):
    ids = torch.randint(50, (n,12), generator=torch.Generator().manual_seed(0))
    return [dict(input_ids=ids[i:i+4], attention_mask=torch.ones_like(ids[i:i+4])) for i in range(0, n, 4)]

NETS = dict(plain=Plain, residual=Residual, in_place=InPlace, dense=Dense, twice=Twice, reader=Reader, encoder=Encoder, branches=Branches, looks=Looks, random=Random, counts=Counts, shapes=Shapes, named=Named, bert=bert)
WHOLE = 'random','looks','counts','shapes'  # cannot go on in all of their levels

def data_for(kind):
    if kind=='bert': return texts(12)
    return [dict(image=b, scale=2.) for b in images().split(4)] if kind=='named' else [b+i-1 for i,b in enumerate(images().split(4))]

def repaired(kind, data, monkeypatch, goes_on):
    "The state and the table of a network that was repaired, and how many operations were left out"
    teacher,left_out = seeded(NETS[kind]),[0]
    mine = deepcopy(teacher)
    with torch.no_grad():
        for n,p in mine.named_parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))*.1*p.std().nan_to_num())
    with monkeypatch.context() as m:
        again = resumed._Resumed.again
        def counted(*args):
            left_out[0] += 1
            return again(*args)
        m.setattr(resumed._Resumed, 'again', counted)
        if not goes_on: m.setattr(Again, 'same', lambda *args: False)
        table = repair(mine, teacher, data)
    return mine.state_dict(),table,left_out[0]

def check_same(a, b):
    assert a[1].equals(b[1])
    assert all(torch.equal(v, b[0][k]) for k,v in a[0].items())

@pytest.mark.filterwarnings('ignore:not repaired')
@pytest.mark.parametrize('kind', NETS)
def test_same_bits(kind, monkeypatch):
    data = data_for(kind)
    ours,whole = repaired(kind, data, monkeypatch, True),repaired(kind, data, monkeypatch, False)
    check_same(ours, whole)
    assert whole[2]==0 and (ours[2]>0 or kind in WHOLE)

def test_batches_that_are_others_each_time(monkeypatch):
    "A loader that shuffles, and one that fills the same tensor again"
    x = images(16)
    class Shuffled:
        def __init__(self): self.n = 0
        def __len__(self): return 4
        def __iter__(self):
            self.n += 1
            return iter(x[torch.randperm(16, generator=torch.Generator().manual_seed(self.n))].split(4))
    class Filled(Shuffled):
        def __iter__(self):
            buffer = torch.empty_like(x[:4])
            for b in super().__iter__():
                buffer.numpy()[:] = b.numpy()
                yield buffer
    for data in (Shuffled,Filled): check_same(repaired('residual', data(), monkeypatch, True), repaired('residual', data(), monkeypatch, False))

def test_a_loader_that_gives_new_tensors_goes_on(monkeypatch):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(), torch.zeros(12)), batch_size=4)
    ours = repaired('plain', loader, monkeypatch, True)
    check_same(ours, repaired('plain', loader, monkeypatch, False))
    assert ours[2]>0

@pytest.mark.parametrize('room', [0,20_000,60_000])
def test_room(room, monkeypatch):
    "No more is kept than there is room for, and what is not kept is computed again"
    whole,data,most = repaired('dense', data_for('dense'), monkeypatch, False),data_for('dense'),[0]
    run = Runs.follow
    def watched(self, *args):
        run(self, *args)
        most[0] = max(most[0], room-self.room.n)
        assert self.room.n>=0
    monkeypatch.setattr(Runs, 'follow', watched)
    monkeypatch.setattr('fasterai.repair.repair.Room', lambda: Room(room))
    check_same(repaired('dense', data, monkeypatch, True), whole)
    assert (most[0]>0)==(room>0)

def test_each_operation_once():
    "A network whose weights stay runs no operation again"
    net,x,n = seeded(Plain),images(),[0]
    reads,_ = reads_of(net, x)
    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            n[0] += func is torch.ops.aten.convolution.default
            return func(*args, **(kwargs or {}))
    runs = Runs(net, x, Room())
    found = {}
    with Counted():
        for i,o in enumerate(reads): runs.follow(0, x, i>0, [o.key], lambda key, call, y: found.__setitem__(key, y.clone()), [p.key for p in reads[i+1:]])
    assert n[0]==3
    follow(net, x, [o.key for o in reads], lambda key, call, y: torch.testing.assert_close(y, found.pop(key), rtol=0, atol=0))
    assert not found

def test_nothing_is_left_on_a_model():
    "Neither marks on parameters nor tensors without numbers"
    net,x = seeded(InPlace),images()
    mine = deepcopy(net)
    with torch.no_grad(): mine.b.weight.mul_(.9)
    repair(mine, net, x)
    assert not any(hasattr(p, '_source') or hasattr(p, '_is_blank') for o in (mine,net) for p in (*o.parameters(),*o.buffers()))
    assert not hasattr(x, '_source')
