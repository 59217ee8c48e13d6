"Several processes hold the masks of one: gloo on the CPU, tiny networks, one group of processes for each number of them"
import copy, tempfile, warnings
from pathlib import Path
import pytest, torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from conformance import ranks as conformance
from fasterai.core.selection import Scores, rank
from fasterai.core.ranks import rank_over
from fasterai.core.pace import Training, attach
from fasterai.distill.training import Distill
from fasterai.quantize.training import Share
from fasterai.quantize.weight_sharing import KMeansQuantizer
from fasterai.regularize.penalties import Penalty
from fasterai.regularize.training import Regularize
from fasterai.sparse.sparsifier import Sparsifier, hold_zeros
from fasterai.sparse.training import Keep, Sparsify

net,spread_out,whole = conformance.net,conformance.spread_out,conformance.whole

def config(how, seed=0, **kwargs):
    return dict(seed=seed, how=how, world=2, granularity='weight', context='global', criteria='large_final', dtype=torch.float32, ties=False, levels=[50]) | kwargs

def linears(m, *args, **kwargs): return Sparsifier(m, *args, layer_type=nn.Linear, **kwargs)
def same_everywhere(xs):
    "Are these tensors of rank 0 those of each rank?"
    for x in map(whole, xs):
        x = x.detach().to(torch.float32)
        other = x.clone()
        dist.broadcast(other, 0)
        if not torch.equal(x, other): return False
    return True

def refused(words, f, *args, **kwargs):
    try: f(*args, **kwargs)
    except ValueError as e: return words in str(e)
    return False

def own_batches(c):
    "Batches that differ between ranks"
    gen,n = torch.Generator().manual_seed(dist.get_rank()),next(net(c).parameters()).shape[1]
    return [(torch.randn(4, n, generator=gen), torch.randint(2, (4,), generator=gen)) for _ in range(1+dist.get_rank())]

def by_data(c):
    "Masks from data of its own on each rank are the same on all, by name without `module.`"
    for criteria in ('wanda','taylor','random',conformance.drawn):
        for granularity in ('weight','column'):
            m = spread_out(net(c), c)
            sp = linears(m, granularity, criteria=criteria, data=own_batches(c))
            torch.manual_seed(dist.get_rank())
            sp.sparsify_model({'module.0':50, '2':25})
            if not same_everywhere(sp.masks.values()) or any(n.startswith('module.') for n in sp.masks): return f'{criteria} {granularity}'
    return ''

def in_a_loop(c):
    "A plain loop in which each rank has gradients of its own"
    m = net(c)
    (x,y),*_ = own_batches(c)
    nn.functional.cross_entropy(m(x), y).backward()
    sp = linears(m, criteria='taylor')
    sp.update(50)
    return '' if same_everywhere(sp.masks.values()) else 'taylor'

def on_rank_0(c):
    "Nobody is waited for where weights alone tell"
    if dist.get_rank()==0:
        for criteria in ('large_final','movement'): linears(net(c), 'filter', criteria=criteria, example_inputs=own_batches(c)[0][0]).sparsify_model(50)
    return ''

def trained(c):
    "Zeros hold in a model that is sharded and trained, and masks are held by `hold_zeros`"
    m = spread_out(net(c), c)
    sp,opt = linears(m, context='global'),torch.optim.AdamW(m.parameters(), lr=.1, weight_decay=.1)
    for level in (30, 60, 60):
        (x,y),*_ = own_batches(c)
        nn.functional.cross_entropy(m(x), y).backward()
        opt.step()
        opt.zero_grad()
        sp.update(level)
    zeros = [whole(p.detach())==0 for p in m.parameters()]
    if sum(int(z.sum()) for z in zeros)!=sum(z.numel() for z in zeros)*60//100: return f'{sp.reached()} percent are gone'
    held = hold_zeros(m)
    (x,y),*_ = own_batches(c)
    nn.functional.cross_entropy(m(x), y).backward()
    opt.step()
    held.apply_masks()
    return '' if all(torch.equal(whole(p.detach())==0, z) for p,z in zip(m.parameters(), zeros)) else 'zeros moved'

def penalized(c):
    "A penalty on shards is that of one process, and so is its gradient"
    for criteria,granularity in (('group_l1','weight'), ('group_l1','row'), ('group_l1','column'), ('group_lasso','weight'), ('group_lasso','row'), ('group_lasso','column')):
        one,m = net(c),spread_out(net(c), c)
        across = criteria=='group_lasso' and granularity==dict(fsdp='column', rows='column', columns='row')[c['how']]
        if across:
            if not refused('other processes hold parts', Penalty, m, criteria, granularity, nn.Linear): return f'{criteria} {granularity} is not refused'
            continue
        want,found = (Penalty(o, criteria, granularity, nn.Linear)() for o in (one, m))
        for o in (want, found): o.backward()
        if not torch.allclose(found, want): return f'{criteria} {granularity}: {found} is not {want}'
        if not all(torch.allclose(whole(a.grad), b.grad) for a,b in zip(m.parameters(), one.parameters())): return f'{criteria} {granularity}: gradients'
    return ''

def driven(c):
    "Techniques that a loop drives end as in one process, and filters that others go along with are refused"
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)).double()
    x,y = torch.randn(4, 8, 6).double(),torch.randint(2, (4, 8))
    linear = dict(layer_type=nn.Linear)
    makes = dict(local=lambda: Sparsify(50, **linear), movement=lambda: Sparsify(50, 'weight', 'global', 'movement', **linear), taylor=lambda: Sparsify(50, criteria='taylor', **linear),
        wanda=lambda: Sparsify(50, criteria='wanda', **linear), column=lambda: Sparsify(50, 'column', **linear), tickets=lambda: Sparsify(50, schedule='iterative', lth=True, **linear),
        keep=Keep, penalty=lambda: Regularize('group_l1', 'row', .1, nn.Linear), share=lambda: Share(2))
    for name,make in makes.items():
        ends = []
        for shards in (False, True):
            m = copy.deepcopy(one)
            with torch.no_grad(): m[0].weight[:,:2] = 0
            if shards: m = spread_out(m, c)
            opt = torch.optim.SGD(m.parameters(), lr=.1, momentum=.9)
            with attach(make(), Training(m, opt, 2), len(x)):
                for a,b in zip(x, y):
                    opt.zero_grad()
                    nn.functional.cross_entropy(m(a), b).backward()
                    opt.step()
            ends.append([whole(p.detach()) for p in m.parameters()])
        if not all(torch.allclose(a, b) and torch.equal(a==0, b==0) for a,b in zip(*ends)): return name
        if not same_everywhere(ends[1]): return f'{name}: ranks'
    with torch.no_grad(): one[0].weight[:2] = 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        hold_zeros(spread_out(copy.deepcopy(one), c))
    if not any('0 are held, but not those of the biases' in str(o.message) for o in told): return 'biases that are not held'
    return '' if refused('to their biases and norms', Sparsifier, spread_out(copy.deepcopy(one), c), 'row', **linear) else 'filters are not refused'

def adapters(c):
    "What adapts a student's layers is the same on each rank, which see other batches"
    torch.manual_seed(0)
    student,teacher = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2))
    torch.manual_seed(dist.get_rank())
    x,y = torch.randn(3, 8, 6),torch.randint(2, (3, 8))
    m,technique = nn.parallel.DistributedDataParallel(student),Distill(teacher, 'FitNet', '0', '0')
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    with attach(technique, Training(m, opt), len(x), adds=False) as steps:
        for a,b in zip(x, y):
            opt.zero_grad()
            with technique.seen(student) as seen: loss = nn.functional.cross_entropy(m(a), b)
            technique.compare_seen((steps.k+1)/steps.n, seen)
            technique.mixed((steps.k+1)/steps.n, loss).backward()
            opt.step()
        found = [p.detach().clone() for p in (*technique.distiller.parameters(), *student.parameters())]
    return '' if len(found)>4 and same_everywhere(found) else 'ranks differ'

def kept_whole(c):
    "A state is the same plain tensors on each rank, and that of rank 0 serves all; one of another size is refused"
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(9, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)).double()
    x,y = torch.randn(8, 8, 9).double(),torch.randint(2, (8, 8))
    linear = dict(layer_type=nn.Linear)
    makes = dict(local=lambda: Sparsify(50, schedule='agp', **linear), moved=lambda: Sparsify(60, 'weight', 'global', 'updating_movement', schedule='agp', n_updates=5, **linear), pattern=lambda: Sparsify(50, '2:4', schedule='agp', **linear),
        wanda=lambda: Sparsify(50, criteria='wanda', schedule='agp', **linear), column=lambda: Sparsify(50, 'column', schedule='agp', **linear), tickets=lambda: Sparsify(50, schedule='iterative', lth=True, **linear),
        at_end=lambda: Sparsify(50, schedule='agp', reset_end=True, **linear), keep=Keep, share=lambda: Share(2))
    def trained(make, a, b, state=None, was=None, size=None):
        m = spread_out(copy.deepcopy(size or one), c)
        if was: m.load_state_dict(was[0])
        opt = torch.optim.SGD(m.parameters(), lr=.1, momentum=.9)
        if was: opt.load_state_dict(was[1])
        technique = make()
        if state is not None: technique.load_state_dict(state)
        steps = attach(technique, Training(m, opt, 2), len(x), a)
        for i in range(a, b):
            opt.zero_grad()
            nn.functional.cross_entropy(m(x[i]), y[i]).backward()
            opt.step()
        state = copy.deepcopy(technique.state_dict())
        was = copy.deepcopy([m.state_dict(), opt.state_dict()])
        steps.close(b==len(x))
        return [whole(p.detach()) for p in m.parameters()],state,was
    for name,make in makes.items():
        want,_,_ = trained(make, 0, len(x))
        _,state,was = trained(make, 0, 4)
        if any(type(v) is not torch.Tensor for v in state.values()): return f'{name}: {[type(v).__name__ for v in state.values()]}'
        if state: save(state)
        box = [state]
        dist.broadcast_object_list(box, 0)
        if not all(torch.equal(box[0][k], v) for k,v in state.items()): return f'{name}: ranks have other states'
        found,_,_ = trained(make, 4, len(x), box[0], was)
        if not all(torch.equal(a, b) for a,b in zip(found, want)): return f'{name}: other bits'
        parts = {k:v[:len(v)//2] if v.dim() else v for k,v in state.items()}
        if name!='keep' and not refused('', trained, make, 4, len(x), parts, was): return f'{name}: a part is taken'
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box, 0)
    trained(lambda: Sparsify(50, schedule='iterative', lth=True, save_tickets=box[0], **linear), 0, len(x))
    dist.barrier()
    tickets = sorted(Path(box[0]).iterdir())
    if not tickets or {n:v.shape for n,v in load_file(tickets[0]).items()}!={n:v.shape for n,v in one.state_dict().items()}: return 'tickets'
    return ''

def patterns_and_inputs(c):
    "A pattern that does not fit into rows, and inputs of layers that are cut, end as in one process"
    torch.manual_seed(0)
    one,x = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double(),torch.randn(4, 8, 9).double()
    for kwargs in (dict(granularity='2:4'), dict(criteria='wanda')):
        ends = []
        for shards in (False, True):
            m = copy.deepcopy(one)
            if shards: m = parallel(m, c) if c['how']!='fsdp' else spread_out(m, c)
            opt = torch.optim.SGD(m.parameters(), lr=.1)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                with attach(Sparsify(50, layer_type=nn.Linear, **kwargs), Training(m, opt), len(x)):
                    for a in x:
                        opt.zero_grad()
                        m(a).square().mean().backward()
                        opt.step()
            ends.append([whole(p.detach()) for p in m.parameters()])
        if not all(torch.allclose(a, b) and torch.equal(a==0, b==0) for a,b in zip(*ends)): return f'{kwargs}'
        if not same_everywhere(ends[1]): return 'ranks'
    return ''

def parallel(m, c):
    "Linear layers cut as tensor parallelism does, by columns and rows"
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    return parallelize_module(m, mesh, {'0':ColwiseParallel(), '2':RowwiseParallel()})

def not_here(c):
    "What needs all of a weight says so on each rank"
    m = spread_out(net(c), c)
    with torch.no_grad(): before = [whole(p).clone() for p in m.parameters()]
    for words,kwargs in (('lamp',dict(context='lamp')), ('round_to',dict(round_to=4)), ('data',dict(criteria='taylor', data=own_batches(c)))):
        if not refused(words, linears, m, **kwargs): return words
    if not refused('all scores at once', linears(m).sparsify_below, .1): return 'below'
    if not all(torch.equal(whole(p.detach()), b) for p,b in zip(m.parameters(), before)): return 'changed'
    with torch.no_grad():
        if dist.get_rank()==1: m[0].weight.to_local().fill_(float('nan'))
    return '' if refused('nan or infinite', linears, m) else 'nan'

def k_means(c):
    "Shared values are the same on each rank"
    m = net(c)
    KMeansQuantizer(2).share(m)
    return '' if same_everywhere(m.parameters()) else 'values differ'

def shared(c):
    "Values of shards are those of one process, train as there, and go on from a state"
    for per_channel in (False, True):
        one,m,again = net(c),spread_out(net(c), c),spread_out(net(c), c)
        models = one,m
        how = KMeansQuantizer(2, per_channel=per_channel)
        both = [how.share(o) for o in models]
        opts = [torch.optim.AdamW(o.parameters(), lr=.1) for o in models]
        gen = torch.Generator().manual_seed(0)
        if not all(torch.equal(whole(a.detach()), b) for a,b in zip(m.parameters(), one.parameters())): return f'{per_channel}: other values'
        for k in range(3):
            grads = [torch.randn(p.shape, generator=gen).to(p.dtype) for p in one.parameters()]
            for o,opt,values in zip(models, opts, both):
                for p,g in zip(o.parameters(), grads): p.grad = conformance.cut_as(g.clone(), p)
                values.sum_grads()
                opt.step()
                values.snap()
            found = [whole(p.detach()) for p in m.parameters()]
            if not all(torch.allclose(a, b, atol=1e-5) for a,b in zip(found, one.parameters())): return f'{per_channel}: trained in another way'
            if not same_everywhere(found): return 'ranks differ'
            if not per_channel and any(len(a.unique())>5 for a in found): return 'values came apart'
        again.load_state_dict(m.state_dict())
        state = both[1].state_dict()
        if not all(torch.equal(state[n].flatten(), x.flatten()) for n,x in both[0].state_dict().items()): return 'another state'
        how.share(again, state).snap()
        if not all(torch.equal(whole(a.detach()), whole(b.detach())) for a,b in zip(m.parameters(), again.parameters())): return 'another start'
        with torch.no_grad():
            for o in models: o[0].weight.copy_(conformance.cut_as(whole(o[0].weight.detach()).clone().index_fill_(0, torch.tensor([0]), 0.), o[0].weight))
        for o in both:
            o.drop_zeros()
            o.snap()
        if whole(m[0].weight.detach())[0].any() or not torch.allclose(whole(m[0].weight.detach()), one[0].weight, atol=1e-5): return 'zeros do not hold'
    return ''

def cases(c, expected): return globals()[c['case']](c) if c['case'] else conformance.agree(c, expected)
def first(c): return None if c['case'] else conformance.one(c)

CASES = [config(how, case=case) for case,hows in dict(by_data=['ddp'], in_a_loop=['ddp'], on_rank_0=['ddp'], k_means=['ddp'], trained=['fsdp'], penalized=['fsdp','rows','columns'], shared=['fsdp','rows','columns'], driven=['fsdp'], kept_whole=['fsdp'], patterns_and_inputs=['fsdp','tensor'], adapters=['ddp'], not_here=['fsdp']).items() for how in hows]
SEEDS = [conformance.config(i) | dict(case='') for i in range(16)]
ALL = [c | dict(seed=100+i) for i,c in enumerate(CASES)]+SEEDS

@pytest.fixture(scope='module')
def found(): return conformance.compare(ALL, cases, first)

@pytest.mark.parametrize('c', ALL, ids=lambda c: c['case'] or f"{c['seed']}-{c['how']}-{c['world']}-{c['granularity']}")
def test_several_processes(found, c): assert found[c['seed']]==''

@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_counted_as_ranked(first, dtype):
    "Infinite scores, equal ones and a best that is protected"
    gen = torch.Generator().manual_seed(0)
    for k in (1, 33, 150, 297):
        values = [torch.randint(-3, 4, (n,), generator=gen).to(dtype)/2 for n in (100, 200)]
        values[0][::7],values[1][3::11] = float('inf'),float('nan')
        keep = [-(torch.rand(len(v), generator=gen)<.7).to(torch.int8) for v in values]
        one,other = [[Scores(v, m.clone()) for v,m in zip(values, keep)] for _ in range(2)]
        rank(one, k, first, first)
        rank_over(other, k, first, first, dtype==torch.float64)
        assert all(torch.equal(a.keep, b.keep) for a,b in zip(one, other))
