"""What holds, in each engine, for each technique: `python tests/conformance/table.py [--write] [scenario …]`

Each cell is a training of a tiny network that ends as it must, and with the bits of the same training in a loop of one's own."""
import argparse, copy, json, sys, tempfile, traceback, warnings
from pathlib import Path
import torch
from torch import nn
sys.path.insert(0, str(Path(__file__).parent))
from engines import ANSWERS, ENGINES, EPOCHS, STEPS, Net, Stop, Watch, network
import fasterai.lightning, fasterai.transformers
from fasterai.core.selection import n_of
from fasterai.core.plan import pruned_plan
from fasterai.core.schedule import one_cycle
from fasterai.distill.all import Distill, KnowledgeDistillationCallback
from fasterai.prune.all import Prune, PruneCallback
from fasterai.quantize.all import KMeansCallback, Quantize, QuantizeCallback, Share
from fasterai.regularize.all import RegularizationCallback
from fasterai.regularize.training import GroupRegularize
from fasterai.sparse.all import KeepSparsity, SparsifyCallback
from fasterai.sparse.training import Keep, Sparsify

def teacher():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net(20)

BOTH = (nn.Conv2d,nn.Linear)
ARGS = dict( # the technique, what fastai calls its callback, and arguments
    sparsify=(Sparsify, SparsifyCallback, lambda: ((50,'weight','local','movement'), dict(layer_type=BOTH))),
    prune=(Prune, PruneCallback, lambda: ((50,'lin'), dict(criteria='movement', n_updates=EPOCHS*STEPS))),
    distill=(Distill, KnowledgeDistillationCallback, lambda: ((teacher(), 'Logits'), dict(weight=.7))),
    regularize=(GroupRegularize, RegularizationCallback, lambda: (('filter',.1), dict(layer_types=BOTH))),
    share=(Share, KMeansCallback, lambda: ((2,), {})),
    quantize=(Quantize, QuantizeCallback, lambda: ((), {})),
    keep=(Keep, KeepSparsity, lambda: ((), {})))

def made(engine, name):
    technique,callback,args = ARGS[name]
    args,kwargs = args()
    if engine=='loop' or engine=='transformers' and name=='distill': return technique(*args, **kwargs)
    return (callback if engine=='fastai' else getattr(getattr(fasterai, engine), callback.__name__))(*args, **kwargs)

def weights(net): return {n:p for n,p in net.named_parameters() if p.dim()>1}

def gone(name, k=EPOCHS*STEPS, n=EPOCHS*STEPS):
    "A function that says of a network whether it is as it must be after step k of n"
    def sparsify(net): return all(int((w==0).sum())>=n_of(w.numel(), one_cycle(k/n, 50)) and (k<n or abs(int((w==0).sum())-n_of(w.numel(), 50))<=(3*9 if 'a.' in o else 0)) for o,w in weights(net).items())
    def prune(net): return [net.a.out_channels,net.c.out_channels]==[12-n_of(12, 50*k/n),8-n_of(8, 50*k/n)]
    def share(net): return all(len(w.unique())<=5 for w in weights(net).values())
    def keep(net): return not net.a.weight[:3].any() and bool(net.a.weight[3:].all())
    def quantize(net): return {type(m) in (nn.Conv2d,nn.Linear) for m in (net.a,net.c,net.head)}=={k==n}  # another class while it is trained
    return dict(sparsify=sparsify, prune=prune, share=share, quantize=quantize, keep=keep).get(name, lambda net: True)

def bits(net): return {k:v.clone() for k,v in net.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def trained(engine, name, folder, network_args={}, watch=None, net=None, **options):
    net = network(**network_args) if net is None else net
    watch = watch or Watch()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.manual_seed(0)
        ENGINES[engine](made(engine, name), net, watch, folder, **options)
    return net

_known = {}
def reference(engine, name, folder, key, **options):
    "What the same training comes to in a loop of one's own, remembered by `key` if there is one: with a penalty in the loss, as fastai and Lightning have it, or in the gradients of a step"
    in_loss = name=='regularize' and engine in ('fastai','lightning')
    def run(): return bits(trained('loop', name, folder, in_loss=in_loss, **options))
    if key is None: return run()
    if (k := (name,in_loss,key)) not in _known: _known[k] = run()
    return _known[k]

def check(ok, what):
    if not ok: raise AssertionError(what)

def plain(key, **options):
    "A scenario that ends as it must, with the bits of a loop"
    def run(engine, name, folder):
        net = trained(engine, name, folder, **options)
        check(gone(name)(net), 'the network is not as it must be')
        if engine!='loop': check(same(bits(net), reference(engine, name, folder, key, **options)), 'other bits than a loop')
    return run

def exact(engine, name, folder):
    n = EPOCHS*STEPS
    watch = Watch(look=lambda net: gone(name, watch.k, n)(net))
    trained(engine, name, folder, watch=watch)
    check(len(watch.seen)==n and all(watch.seen), f'after steps {[i+1 for i,o in enumerate(watch.seen) if not o]}')

def average(engine, name, folder):
    watch = Watch(ema=name!='prune')  # an average of narrower networks is none
    net = trained(engine, name, folder, watch=watch)
    check(same(bits(net), reference(engine, name, folder, 'plain')), 'other bits beside an average')

def resume(engine, name, folder):
    trained(engine, name, folder, save=2)
    net = trained(engine, name, folder, dict(seed=5), resume='loop' if engine=='loop' else 2)
    check(same(bits(net), reference(engine, name, folder, 'plain')), 'other bits than without a stop')

def inner_plan(net):
    "How `net` was cut inside of what the Trainer has"
    plan = pruned_plan(ANSWERS[net])
    short = lambda d: {k.removeprefix('net.'):v for k,v in d.items()}
    return plan | {k:short(plan[k]) for k in ('kept','sizes','attrs','widths')}

def interrupt(engine, name, folder):
    net = network()
    try: trained(engine, name, folder, watch=Watch(stop=5), net=net)
    except Stop: pass
    else: raise AssertionError('nothing was raised')
    left = [o for m in net.modules() for o in (*m._forward_hooks,*m._forward_pre_hooks,*m._backward_hooks,*m._state_dict_hooks,*m._load_state_dict_pre_hooks)]
    check(not left, f'hooks are left: {left}')
    if name!='prune': check(all(type(m)==type(o) for m,o in zip(net.modules(), network().modules())), 'layers are of another class')
    net.zero_grad()
    again = copy.deepcopy(net)
    if engine=='transformers': again._pruned = inner_plan(net)
    trained(engine, name, folder, net=net)
    check(same(bits(net), reference(engine, name, folder, None, net=again)), 'the next training is another one')

def second(engine, name, folder):
    net = trained(engine, name, folder)
    trained(engine, name, folder, net=net)
    want = network()
    for i in range(2): last = reference(engine, name, folder, (engine,i), net=want)
    check(same(bits(net), last), 'other bits than a loop')

SCENARIOS = {
    'exact after each step': exact,
    'SGD, momentum, weight decay': plain('sgd', opt='sgd'),
    'AdamW, weight decay': plain('plain'),
    'bfloat16 autocast': plain('amp', amp=True),
    'accumulated gradients': plain('acc', acc=2),
    'clipped gradients': plain('clip', clip=.1),
    'an average of the weights beside it': average,
    'stop, save, go on': resume,
    'interrupted': interrupt,
    'a second training': second,
    'a frozen layer': plain('frozen', network_args=dict(frozen=True)),
    'tied weights': plain('tied', network_args=dict(tied=True)),
    'compiled': plain('compiled', compile=True)}

TWO = 'two processes'
SHARES = dict(fastai='halves', lightning='turns', transformers='blocks') # How samples are shared

def in_two(engine, name, both, loops):
    "What each process ended with is the same network, as it must be, and that of a loop that shares samples alike"
    if name=='prune':
        check(all(isinstance(o, str) and 'average' in o and 'gradients' in o for o in both), f'not refused: {both}')
        return
    check(not any(isinstance(o, str) for o in both), both[0])
    params = [n for n,_ in network().named_parameters()]
    check(all(torch.equal(both[0][n], both[1][n]) for n in params), 'processes differ')
    (net := network()).load_state_dict(both[0])
    check(gone(name)(net), 'the network is not as it must be')
    if engine!='loop': check(same(both[0], loops[0]), 'other bits than a loop')

def run_two():
    "By scenario, engine and technique, as `run` has it"
    import processes
    cells = [(e, t, {}) for e in ENGINES for t in ARGS]
    loops = {(e,t): ('loop', t, dict(share=share, in_loss=t=='regularize' and e!='transformers')) for e,share in SHARES.items() for t in ARGS}
    found = processes.run([*cells, *loops.values()])
    loop_of,res = dict(zip(loops, found[len(cells):])),{}
    for (e,t,_),both in zip(cells, found):
        try: in_two(e, t, both, loop_of.get((e,t)))
        except AssertionError as err: res[TWO,e,t] = str(err)
        else: res[TWO,e,t] = ''
    return res

def cell(scenario, engine, name):
    with tempfile.TemporaryDirectory() as folder: SCENARIOS[scenario](engine, name, Path(folder))

def run(scenarios=SCENARIOS):
    "By scenario, engine and technique: '' or what went wrong"
    res = {}
    for s in scenarios:
        for e in ENGINES:
            for t in ARGS:
                try: cell(s, e, t)
                except Exception as err:
                    res[s,e,t] = f'{type(err).__name__}: {err}'
                    print(f'--- {s}, {e}, {t}: {traceback.format_exc()[-1500:]}', file=sys.stderr)
                else: res[s,e,t] = ''
    return res

def table(res):
    "As markdown: a row for each scenario, a column for each engine, which names the techniques that it does not hold for"
    rows = ['| | '+' | '.join(dict(loop="a loop of one's own", fastai='fastai', lightning='Lightning', transformers='transformers')[e] for e in ENGINES)+' |', '|---'*(len(ENGINES)+1)+'|']
    for s in dict.fromkeys(s for s,*_ in res):
        cells = []
        for e in ENGINES:
            bad = [t for t in ARGS if res.get((s,e,t))]
            cells.append(f'not {", ".join(bad)}' if bad else 'all but prune, which is refused' if s==TWO else f'all {len(ARGS)}')
        rows.append(f'| {s} | '+' | '.join(cells)+' |')
    return '\n'.join(rows)

NOTEBOOK = Path(__file__).parents[2]/'nbs'/'95_engines.ipynb'
def shown_in(nb): "The cell of a notebook that shows the table"; return next(c for c in nb['cells'] if c['id']=='c0f0a11e')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('scenarios', nargs='*', metavar='scenario')
    p.add_argument('--write', action='store_true', help='write the table into its notebook')
    args = p.parse_args()
    res = run([s for s in SCENARIOS if not args.scenarios or any(o in s for o in args.scenarios)])
    if not args.scenarios or any(o in TWO for o in args.scenarios): res |= run_two()
    print(table(res))
    if args.write:
        nb = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
        shown_in(nb)['source'] = table(res).splitlines(keepends=True)
        NOTEBOOK.write_text(json.dumps(nb, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
    sys.exit(any(res.values()))
