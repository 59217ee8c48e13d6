"Hidden units of recurrent layers: removed by ratio, and where they can change nothing"
import copy,random,warnings
import pytest,torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence,pad_packed_sequence
from fasterai.analyze.all import sensitivity
from fasterai.core.graph import ChannelGraph
from fasterai.core.proof import difference
from fasterai.core.recurrent import begin_anew,by_layers,gates_of,remembering
from fasterai.prune.all import Pruner,load_pruned,save_pruned

INPUTS,HIDDEN,OUT = 5,8,3
X,LONGER = torch.randn(3, 5, INPUTS, dtype=torch.float64),torch.randn(2, 9, INPUTS, dtype=torch.float64)
FORMS = 'all packed zeros learned last view mean step directions handed'.split()

class Net(nn.Module):
    "A recurrent layer whose outputs or states are read in one of `FORMS`"
    def __init__(self, kind=nn.LSTM, form='all', layers=1, both=False, proj=0, bias=True, batch_first=True):
        super().__init__()
        how = dict(num_layers=layers, bidirectional=both, bias=bias, batch_first=batch_first, dropout=.1 if layers>1 else 0., **({'proj_size':proj} if proj else {}))
        self.form,self.hidden,self.layers,self.n_dirs,self.proj = form,HIDDEN,layers,1+both,proj
        self.rnn,self.fc = kind(INPUTS, HIDDEN, **how),nn.Linear((proj or HIDDEN)*self.n_dirs, OUT)
        if form=='learned': self.h,self.c = nn.Parameter(torch.randn(layers*self.n_dirs, 1, proj or HIDDEN)),nn.Parameter(torch.randn(layers*self.n_dirs, 1, HIDDEN))
        if form=='handed': self.start,self.decoder = nn.Linear(INPUTS, OUT),kind(OUT, HIDDEN, **{**how, 'batch_first':True})
    def given(self, x, n):
        "A state that the code of the model makes"
        if self.form=='zeros': return torch.zeros(self.layers*self.n_dirs, n, self.proj or self.hidden, dtype=x.dtype),x.new_zeros(self.layers*self.n_dirs, n, self.hidden)
        if self.form=='learned': return self.h.expand(-1, n, -1).contiguous(),self.c.repeat(1, n, 1)
    def forward(self, x): # [batch, time, inputs]
        n,lstm,first = len(x),isinstance(self.rnn, nn.LSTM),self.rnn.batch_first
        y = x if first else x.transpose(0, 1)
        state = self.given(x, n)
        if self.form=='packed':
            y,_ = self.rnn(pack_padded_sequence(y, torch.tensor([x.shape[1],*[2]*(n-1)]), batch_first=first))
            return self.fc(pad_packed_sequence(y, batch_first=first)[0])
        y,state = self.rnn(y) if state is None else self.rnn(y, state if lstm else state[0])
        h = state[0] if lstm else state
        if not first: y = y.transpose(0, 1)
        if self.form=='last': return self.fc(torch.cat([*h[-self.n_dirs:]], -1))
        if self.form=='view': return self.fc(h.view(self.layers, self.n_dirs, n, -1)[-1].transpose(0, 1).reshape(n, -1))
        if self.form=='mean': return self.fc(y.mean(1))
        if self.form=='step': return self.fc(y[:,-1])
        if self.form=='directions':
            y = y.reshape(*y.shape[:2], self.n_dirs, self.proj or self.hidden)
            return self.fc(torch.cat(y.unbind(2), -1))
        if self.form!='handed': return self.fc(y)
        token,res = self.start(x[:,-1:]),[]
        for _ in range(3):
            y,state = self.decoder(token, state)
            token = self.fc(y)
            res.append(token)
        return torch.cat(res, 1)

class Cells(nn.Module):
    "Cells in a loop, whose states the code makes"
    def __init__(self, kind=nn.LSTMCell, n=1, bias=True):
        super().__init__()
        self.cells,self.hidden,self.fc = nn.ModuleList([kind(HIDDEN if i else INPUTS, HIDDEN, bias=bias) for i in range(n)]),HIDDEN,nn.Linear(HIDDEN, OUT)
    def forward(self, x):
        zeros = lambda: torch.zeros(len(x), self.hidden, dtype=x.dtype)
        states,res = [(zeros(),zeros()) if isinstance(o, nn.LSTMCell) else zeros() for o in self.cells],[]
        for y in x.unbind(1):
            for i,cell in enumerate(self.cells):
                states[i] = cell(y, states[i])
                y = states[i][0] if isinstance(cell, nn.LSTMCell) else states[i]
            res.append(y)
        return self.fc(torch.stack(res, 1))

def sizes(m): return {n:(o.hidden_size,getattr(o, 'proj_size', 0)) for n,o in m.named_modules() if gates_of(o)}
def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        return f(*args, **kwargs)

@torch.no_grad()
def silence(m, units):
    "Zero hidden units of each layer and direction of `m`: `units` gives them; the fewest of a layer, and of its projections"
    least,projected = HIDDEN,HIDDEN
    for end in [n.removeprefix('weight_ih') for n,_ in m.named_parameters() if n.startswith('weight_ih')]:
        dead = units(HIDDEN, 5)
        least = min(least, len(dead))
        for k in ('weight_ih','weight_hh','bias_ih','bias_hh'):
            if hasattr(m, k+end): getattr(m, k+end).view(gates_of(m), HIDDEN, -1)[:,dead] = 0.
        if hasattr(m, f'weight_hr{end}'):
            w = getattr(m, f'weight_hr{end}')
            dead = units(len(w), 2)
            projected,w[dead] = min(projected, len(dead)),0.
    return least,projected

def lossless(net):
    small = Pruner().prune_model(net, X)
    for x in (X,LONGER,LONGER[:,:1]):
        if net.__dict__.get('form')=='packed' and x.shape[1]<2: continue
        assert (small(x)-net(x)).abs().max()<1e-6
    return small

def random_net(r):
    if r.random()<.2: return Cells(r.choice([nn.LSTMCell,nn.GRUCell,nn.RNNCell]), r.choice([1,2]), r.random()<.7)
    kind = r.choice([nn.LSTM,nn.GRU,nn.RNN])
    return Net(kind, r.choice(FORMS), r.choice([1,1,2,3]), r.random()<.5, 4 if kind is nn.LSTM and r.random()<.4 else 0, r.random()<.7, r.random()<.5)

@pytest.mark.parametrize('seed', range(24))
def test_random_networks(seed):
    "Half of the units go, for sequences of any length; those that are silent change nothing"
    torch.manual_seed(seed)
    r = random.Random(seed)
    net = random_net(r).double().eval()
    half = copy.deepcopy(net)
    Pruner(half, 50, example_inputs=X).prune_model()
    assert sizes(half)=={n:(h//2,p//2) for n,(h,p) in sizes(net).items()}
    assert half(LONGER).shape==net(LONGER).shape
    least = {n:silence(m, lambda n, most: r.sample(range(n), r.randint(1, most))) for n,m in net.named_modules() if gates_of(m)}
    small = lossless(net)
    if getattr(net, 'form', '') in ('handed','learned'): return  # units that are tied to others, or begin with a number
    fewest = min(least.values()) if isinstance(net, Cells) else None  # one attribute counts those of all cells
    for n,(h,p) in sizes(small).items():
        least_h,least_p = fewest or least[n]
        assert h<=HIDDEN-least_h and (not p or p<=4-least_p)

@pytest.mark.parametrize('layers,both,proj', [(1,False,0),(2,True,0),(2,True,4),(1,True,4)])
def test_other_units_in_each_layer_and_direction(layers, both, proj):
    net,r = Net(layers=layers, both=both, proj=proj).double(),random.Random(0)
    silence(net.rnn, lambda n, most: r.sample(range(n), 2))
    small = quiet(lossless, net.eval())
    assert sizes(small)=={'rnn':(HIDDEN-2,proj and proj-2)} and small.fc.in_features==((proj-2) or 4 if proj else HIDDEN-2)*(1+both)
    rows = [small._pruned['kept'][n][0] for n in small._pruned['kept'] if 'weight_ih' in n]
    assert len({tuple(o) for o in rows})>1 or len(rows)==1

def test_who_is_read_by_nobody_goes():
    net = Net().double().eval()
    with torch.no_grad():
        for w in (net.rnn.weight_hh_l0,net.fc.weight): w[:,[1,4]] = 0.
    assert sizes(lossless(net))=={'rnn':(6,0)}

def test_who_reads_itself_alone_goes_and_who_reads_others_stays():
    net = Net(nn.GRU).double().eval()
    silence(net.rnn, lambda n, most: [2,5])
    with torch.no_grad():
        net.rnn.weight_hh_l0[[2,10,18],2] = 1.   # a state that begins with zero
        net.rnn.weight_hh_l0[[5,13,21],0] = 1.   # and one that hears of another, from the second step on
    for x in (X,X[:,:1]): assert sizes(Pruner().prune_model(net, x))=={'rnn':(7,0)}

def test_one_step_tells_nothing_of_the_next():
    "A unit that reads another's state is zero after one step, and is not after two"
    net = Net(nn.RNN).double().eval()
    with torch.no_grad():
        for p in (net.rnn.weight_ih_l0,net.rnn.bias_ih_l0,net.rnn.bias_hh_l0): p[3] = 0.
        net.fc.weight[:,3] = 0.
    with pytest.warns(UserWarning, match='nothing to remove'): small = Pruner().prune_model(net, X[:,:1])
    assert sizes(small)==sizes(net) and difference(net, small, LONGER)[0]<1e-12

def test_a_constant_goes_into_the_bias():
    net = Net(nn.RNN).double().eval()
    with torch.no_grad():
        for p in (net.rnn.weight_ih_l0,net.rnn.weight_hh_l0): p[3] = 0.
        net.rnn.weight_hh_l0[:,3] = 0.
    small = lossless(net)
    assert sizes(small)=={'rnn':(7,0)} and not torch.equal(small.fc.bias, net.fc.bias)

def test_a_state_that_comes_in_stays():
    class Given(Net):
        def forward(self, x, h): return self.fc(self.rnn(x, (h,h))[0])
    net,h = Given().double().eval(),torch.zeros(1, 3, HIDDEN, dtype=torch.float64)
    was = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match='meets a tensor of fixed size, a given state'): Pruner(net, 50, example_inputs=(X,h)).prune_model()
    assert all(torch.equal(v, was[k]) for k,v in net.state_dict().items())

def test_a_size_in_the_code_stays():
    class Fixed(Net):
        def given(self, x, n): return x.new_zeros(1, n, 8),x.new_zeros(1, n, 8)
    with pytest.raises(ValueError, match='a given state'): Pruner(Fixed().double(), 50, example_inputs=X).prune_model()

def test_states_that_the_code_makes_for_nothing():
    class Idle(Net):
        def forward(self, x):
            torch.zeros(1, len(x), self.hidden)
            return super().forward(x)
    net = Idle().double()
    quiet(Pruner(net, 50, example_inputs=X).prune_model)
    assert sizes(net)=={'rnn':(4,0)}

class Remembers(nn.Module):
    "Keeps its state for the next call, as fastai's language models do"
    def __init__(self):
        super().__init__()
        self.n_hid,self.n_dirs,self.batch = HIDDEN,1,3
        self.rnn,self.fc = nn.LSTM(INPUTS, HIDDEN, batch_first=True),nn.Linear(HIDDEN, OUT)
        self.reset()
    def reset(self): self.state = tuple(self.fc.weight.new_zeros(1, self.batch, self.n_hid//self.n_dirs) for _ in range(2))
    def forward(self, x):
        if len(x)>self.batch:  # a state for more samples begins with zeros
            self.state = tuple(torch.cat([o,o.new_zeros(1, len(x)-self.batch, self.n_hid//self.n_dirs)], 1) for o in self.state)
        if len(x)<self.batch: self.state = tuple(o[:,:len(x)].contiguous() for o in self.state)
        self.batch = len(x)
        y,state = self.rnn(x, self.state)
        self.state = tuple(o.detach() for o in state)
        return self.fc(y)

@pytest.mark.parametrize('batch', [1,3,6])
def test_a_state_that_is_kept(batch):
    net = Remembers().double().eval()
    net.reset()
    net(X)
    assert remembering(net)==[net]
    silence(net.rnn, lambda n, most: [0,3])
    small = Pruner().prune_model(net, X)
    begin_anew(net)
    assert small.n_hid==6 and all((small(X)-net(X)).abs().max()<1e-6 for _ in range(2))  # the second goes on where the first ended
    x = X if batch==3 else torch.cat([X,X]) if batch==6 else X[:1]
    quiet(Pruner(net, 50, example_inputs=x).prune_model)
    assert net.n_hid==net.rnn.hidden_size==4 and net.n_dirs==1 and net(X).shape==(3,5,OUT)

@pytest.mark.parametrize('how', [dict(kind=nn.LSTM, layers=2, both=True, proj=4),dict(kind=nn.GRU, form='zeros')])
def test_saved_and_loaded(how, tmp_path):
    net = Net(**how).double().eval()
    fresh = copy.deepcopy(net)
    Pruner(net, 50, example_inputs=X).prune_model()
    save_pruned(net, tmp_path/'m.safetensors')
    load_pruned(tmp_path/'m.safetensors', fresh)
    assert torch.equal(fresh(X), net(X)) and sizes(fresh)==sizes(net) and fresh.hidden==net.hidden

def test_training_goes_on():
    net = Net(layers=2, both=True)
    opt,x = torch.optim.Adam(net.parameters()),X.float()
    def step():
        net.train()(x).square().mean().backward()
        opt.step(),opt.zero_grad()
    step()
    quiet(Pruner(net, 50, example_inputs=x).prune_model, optimizer=opt)
    step()
    assert opt.state[net.rnn.weight_hh_l1_reverse]['exp_avg'].shape==(16,4)

def test_macs_follow():
    net = Net(layers=2, both=True)
    macs = lambda: sum(ChannelGraph(net, X.float()).macs().values())
    count = lambda h: 5*(2*4*h*(INPUTS+h)+2*4*h*(2*h+h)+2*h*OUT)
    assert macs()==count(HIDDEN)
    Pruner(net, 50, example_inputs=X.float()).prune_model()
    assert macs()==count(HIDDEN//2)

def test_a_ratio_for_a_layer_and_all_that_is_read():
    net = nn.ModuleDict(dict(a=nn.Linear(INPUTS, 6), rnn=nn.LSTM(6, HIDDEN, batch_first=True), b=nn.GRU(HIDDEN, HIDDEN, batch_first=True), fc=nn.Linear(HIDDEN, OUT)))
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = net
        def forward(self, x): return net.fc(net.b(net.rnn(net.a(x))[0])[0])
    chain = Chain()
    quiet(Pruner(chain, {'parts.rnn':50}, example_inputs=X.float()).prune_model)
    assert sizes(chain)=={'parts.rnn':(4,0),'parts.b':(8,0)} and net.b.input_size==4 and net.rnn.input_size==6

@pytest.mark.parametrize('kind', [nn.LSTM,nn.GRU])
def test_obs_and_repair(kind):
    "What a unit gives is read by the next layer and at the next step: both count. What makes states is told not to be repaired"
    torch.manual_seed(0)
    net,x = Net(kind, layers=2, both=True).eval(),torch.randn(24, 6, INPUTS)
    teacher,plain = copy.deepcopy(net),copy.deepcopy(net)
    pruner = Pruner(net, 25, example_inputs=x[:2], data=[(x,)], criteria='obs', repair=True)
    with pytest.warns(UserWarning, match='not repaired: rnn.weight_hh_l0.* makes a state from the last'): pruner.prune_model()
    Pruner(plain, 25, example_inputs=x[:2]).prune_model()
    assert sizes(net)=={'rnn':(6,0)} and difference(teacher, net, x)[0]<difference(teacher, plain, x)[0]
    assert {o for o,why in zip(pruner.repaired.weight, pruner.repaired.why) if 'state from the last' in why}=={n for n,_ in net.rnn.named_parameters() if n.startswith('weight_hh')}

def test_criteria_of_activations_leave_recurrent_layers():
    def loud(w, act): return w.abs()*act
    class Both(Net):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(HIDDEN, 6)
            self.fc = nn.Linear(6, OUT)
        def forward(self, x): return self.fc(self.inner(self.rnn(x)[0]).relu())
    net = Both()
    with pytest.warns(UserWarning, match='activations, which are not found for recurrent layers'): Pruner(net, 50, criteria=loud, data=[(X.float(),)], example_inputs=X.float()).prune_model()
    assert sizes(net)=={'rnn':(8,0)} and net.inner.out_features==3

@pytest.mark.parametrize('context', ['local','global'])
def test_layers_and_directions_lose_equally_many(context):
    "Also where some of them matter less"
    torch.manual_seed(0)
    net,x = Net(layers=2, both=True),X.float()
    with torch.no_grad():
        for n,p in net.rnn.named_parameters(): p.mul_(1+('l1' in n))
    quiet(Pruner(net, 50, context, example_inputs=x).prune_model)
    assert 0<net.rnn.hidden_size<HIDDEN and net(x).shape==(3,5,OUT)

@pytest.mark.parametrize('what', ['params','macs'])
def test_a_target_is_met(what):
    torch.manual_seed(0)
    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.rnn,self.fc = nn.LSTM(INPUTS, 96, 2, bidirectional=True, batch_first=True),nn.Linear(192, OUT)
    net = Wide()
    pruner = Pruner(net, example_inputs=X.float(), **{what:'50%'})
    quiet(pruner.prune_model)
    assert .95*pruner.met['asked']<pruner.met['left']<=pruner.met['asked'] and net.rnn.hidden_size<80

def test_sensitivity_lists_them():
    net = Net(layers=2, both=True)
    scan = sensitivity(net, lambda m: m(X.float()).square().sum().item(), [25,50], kind='pruning', example_inputs=X.float(), progress=False)
    assert set(scan.to_df().layer)=={'rnn'} and (scan.to_df().damage!=0).all() and sizes(net)=={'rnn':(HIDDEN,0)}
    macs = sum(ChannelGraph(net, X.float()).macs().values())
    half = copy.deepcopy(net)
    Pruner(half, 50, example_inputs=X.float()).prune_model()
    half_macs = sum(ChannelGraph(half, X.float()).macs().values())
    assert scan.targets(macs=half_macs)=={'rnn':50} and half_macs<.5*macs

@pytest.mark.parametrize('how', ['written','listed','reshaped'])
def test_states_that_are_put_together(how):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden,self.cell,self.fc = HIDDEN,nn.GRUCell(INPUTS, HIDDEN),nn.Linear(HIDDEN, OUT)
        def forward(self, x):
            n,t = x.shape[:2]
            h,outs,found = x.new_zeros(n, self.hidden),torch.zeros(n, t, self.hidden, dtype=x.dtype),[]
            for i in range(t):
                h = self.cell(x[:,i], h)
                outs[:,i] = h
                found.append(h)
            if how=='reshaped': return self.fc(torch.stack(found, 1).view(-1, self.hidden)).view(n, t, -1)
            return self.fc(outs if how=='written' else torch.stack(found, 1))
    net = Steps().double().eval()
    silence(net.cell, lambda n, most: [1,6])
    small = lossless(net)
    assert sizes(small)=={'cell':(6,0)} and small.hidden==6
    quiet(Pruner(net, 50, example_inputs=X).prune_model)
    assert net.hidden==net.fc.in_features==4 and net(LONGER).shape==(2,9,OUT)

def test_lengths_as_inputs():
    "How many sequences there are at each step is no question for a value"
    class Lengths(Net):
        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.fc(torch.cat([*self.rnn(packed)[1][0][-2:]], -1))
    net,lengths = Lengths(layers=2, both=True).double().eval(),torch.tensor([2,5,4])
    silence(net.rnn, lambda n, most: [0,3])
    small = quiet(Pruner().prune_model, net, (X,lengths))
    assert sizes(small)=={'rnn':(6,0)} and (small(X,lengths)-net(X,lengths)).abs().max()<1e-6

@pytest.mark.parametrize('form', ['all','last','view','directions','zeros','handed'])
def test_in_steps(form):
    "As a callback prunes: what is gone stays so, and the next step counts from there"
    torch.manual_seed(0)
    net,x = Net(form=form, layers=2, both=True),X.float()
    pruner = Pruner(net, 75, example_inputs=x)
    pruner.start(x)
    for ratio,left in ((25,6),(50,4),(75,2)):
        quiet(pruner.update, ratio)
        assert net.rnn.hidden_size==net.hidden==left if form in ('zeros','directions') else net.rnn.hidden_size==left
        assert net(LONGER.float()).shape[-1]==OUT
