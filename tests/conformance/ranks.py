"Masks and weights of several processes beside those of one, in seeded random configurations: `python tests/conformance/ranks.py [how many]`"
import itertools, random, sys, tempfile, traceback, warnings
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from fasterai.sparse.sparsifier import Sparsifier
sys.path.insert(0, str(Path(__file__).parent))
from processes import joined

def drawn(w): return w.abs()+torch.rand_like(w)  # a user's own, another on each rank
def relative(w): return w.abs()/w.abs().max()  # a user's own that looks at the whole weight

CRITERIA = ['large_final','squared_final','small_final','movement','updating_movement','random','taylor','large_init_large_final',drawn,relative]
WHERE = {'ddp':['weight','filter','column','row','kernel','2:4'], 'fsdp':['weight','weight','weight','column','2:4'],
         'rows':['weight','weight','column'], 'columns':['weight','weight','column'], 'mixed':['weight','column']}

def config(seed):
    "What is run for a seed"
    r = random.Random(seed)
    how = r.choice(list(WHERE))
    return dict(seed=seed, how=how, world=r.choice([2,3]), granularity=r.choice(WHERE[how]), context=r.choice(['local','global','erk','uniform_plus']),
        criteria=r.choice(CRITERIA), dtype=r.choice([torch.float32,torch.bfloat16]), ties=r.random()<.4, levels=[r.choice([0,10,37.5,50,80,95,100]) for _ in range(5)])

def net(c):
    torch.manual_seed(c['seed'])
    sizes = random.Random(c['seed']).choice([(7,13,5,4),(16,24,9,8),(3,40,33,2)])
    m = nn.Sequential(*[o for a,b in zip(sizes, sizes[1:]) for o in (nn.Linear(a, b, bias=c['how']=='ddp'), nn.ReLU())])
    if c['ties']:
        for p in m.parameters(): p.data.mul_(4).round_().div_(4)
    return m.to(c['dtype'])

def spread_out(m, c):
    "The model `m` over the ranks"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    if c['how']=='ddp': return nn.parallel.DistributedDataParallel(m)
    mesh = init_device_mesh('cpu', (c['world'],))
    if c['how']=='fsdp':
        for o in m: fully_shard(o, mesh=mesh)
        return fully_shard(m, mesh=mesh)
    places = {'rows':[Shard(0)], 'columns':[Shard(1)], 'mixed':[Shard(1),Replicate(),Shard(0)]}[c['how']]
    for o,p in zip((o for o in m if isinstance(o, nn.Linear)), itertools.cycle(places)): o.weight = nn.Parameter(distribute_tensor(o.weight.detach(), mesh, [p]))
    return m

def whole(t): return t.full_tensor() if hasattr(t, 'full_tensor') else t

def cut_as(g, p):
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, 'full_tensor') else g

def train(m, c):
    "Masks and weights after each update: levels that rise and fall, with optimizer steps in between"
    sp = Sparsifier(m, c['granularity'], c['context'], c['criteria'], layer_type=nn.Linear, example_inputs=torch.randn(2, next(iter(net(c).parameters())).shape[1]))
    opt,gen,seen = torch.optim.SGD(m.parameters(), lr=1.),torch.Generator().manual_seed(c['seed']),[]
    for level in c['levels']:
        for _ in range(2):
            for p in m.parameters(): p.grad = cut_as((torch.randn(p.shape, generator=gen)/16).to(p.dtype), p)
            opt.step()
            sp.apply_masks()
        torch.manual_seed(c['seed']+(dist.get_rank()*1000 if dist.is_initialized() else 0))  # what is drawn differs between ranks
        sp.update(min(level, sp.own))  # a pattern has a share of its own
        seen.append([whole(x.detach()).clone() for x in (*sp.masks.values(), *m.parameters())])
    return seen

def agree(c, expected):
    "'' if this rank has the same bits as one process, else what is wrong"
    found = train(spread_out(net(c), c), c)
    for k,(xs,ys) in enumerate(zip(found, expected)):
        for i,(x,y) in enumerate(zip(xs, ys)):
            if not torch.equal(x, y): return f'update {k}, tensor {i}: {int((x!=y).sum())} of {x.numel()} differ'
    return ''

def tried(f, c, expected):
    "What `f` says is wrong, or the error that it raised"
    try: return f(c, expected)
    except Exception as e: return ''.join(traceback.format_exception(e)[-3:])

def work(rank, world, folder, cs, f=agree):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store{world}', world), rank=rank, world_size=world, timeout=timedelta(seconds=30))
    try: torch.save([tried(f, c, e) for c,e in cs], f'{folder}/found{world}_{rank}.pt')
    finally: dist.destroy_process_group()

def one(c):
    "What one process makes of a configuration"
    warnings.simplefilter('ignore')
    m = net(c)
    return train(m, c)

def compare(cs, f=agree, first=one):
    "What is wrong with each configuration, on any rank; one group of processes for each number of them"
    res = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in sorted({c['world'] for c in cs}):
            some = [(c, first(c)) for c in cs if c['world']==world]
            joined(work, (world, folder, some, f), world, 180)
            found = [torch.load(f'{folder}/found{world}_{r}.pt') for r in range(world)]
            res |= {c['seed']: next((o for o in os_ if o), '') for (c,_),os_ in zip(some, zip(*found))}
    return res

if __name__=='__main__':
    cs = [config(i) for i in range(int(sys.argv[1]) if len(sys.argv)>1 else 50)]
    found = compare(cs)
    for c in cs:
        name = getattr(c['criteria'], '__name__', c['criteria'])
        if found[c['seed']]: sys.stdout.write(f"{c['seed']:3} {c['how']:8} {c['world']} {c['granularity']:8} {c['context']:12} {name:24} {str(c['dtype'])[6:]:9} {found[c['seed']]}\n")
    sys.stdout.write(f'{sum(not o for o in found.values())} of {len(cs)} agree\n')
    sys.exit(any(found.values()))
