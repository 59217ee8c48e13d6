"""What becomes of damaged files, and of writers that are killed: `python tests/conformance/files.py [N]`

N files of each kind (20,000 by default) are damaged: half of them by chance, and half by somebody who makes the checksum fit. Each is read the same or refused in words, within 2 seconds, and the network is as it was.
`other` is what was read otherwise because its checksum was made to fit. Then a writer is killed 200 times (or N/100 times): the file is always an old or a new one, and nothing is left beside it."""
import os, signal, sys, tempfile, time, warnings
from pathlib import Path
import numpy as np, torch
from torch import nn
from fasterai.prune.pruner import load_pruned, save_pruned
sys.path.insert(0, str(Path(__file__).parent.parent))
import damage

def net(): return nn.Sequential(*(nn.Linear(200, 200) for _ in range(8)))

def started(path):
    "A process that writes `path` again and again, once it has begun"
    read,write = os.pipe()
    if pid := os.fork():
        os.close(write)
        assert os.read(read, 1)
        os.close(read)
        return pid
    try:
        torch.set_num_threads(1)
        model,i = net(),0
        os.write(write, b'.')
        while os.getppid()!=1:
            i += 1
            with torch.no_grad():
                for p in model.parameters(): p.fill_(i)
            save_pruned(model, path, progress=False)
    finally: os._exit(1)

def parts_beside(path): return [o.name for o in path.parent.iterdir() if o.name!=path.name]

def killed(path, n, seed=0):
    "Kill a writer of `path` `n` times: how often something was left, and how often the file was not whole, or something still left after the next write"
    save_pruned(net(), path)
    rng,left,bad = np.random.default_rng(seed),0,0
    for i in range(n):
        pid = started(path)
        time.sleep(float(rng.random())*.1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left += bool(parts_beside(path))
        model = net()
        try:
            load_pruned(path, model)
            whole = not i or len({float(o) for p in model.state_dict().values() for o in (p.min(),p.max())})==1
        except ValueError: whole = False
        with torch.no_grad():
            for p in model.parameters(): p.fill_(-i-1)
        save_pruned(model, path)
        bad += not whole or bool(parts_beside(path))
    return left,bad

def main(n=20_000):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    failed = 0
    for name in damage.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            trial = damage.Trial(name, Path(folder))
            counts = trial.run(n)
            print(f'{name:10} {len(trial.data):6,} bytes  '+'  '.join(f'{k} {v:,}' for k,v in counts.items())+f'  longest {trial.time:.2f} s  most memory {trial.memory/1024:.0f} MB', flush=True)
            for what,data in trial.wrong[:3]: print(f'    {what[:300]}: {data!r}'[:2000])
            failed += counts['wrong']+counts['slow']
    with tempfile.TemporaryDirectory() as folder:
        kills = max(2, n//100)
        left,bad = killed(Path(folder)/'net', kills)
        print(f'{kills} kills: {left} left a file beside, which the next write removed; {bad} files were not whole')
    sys.exit(bool(failed+bad))

if __name__=='__main__': main(*map(int, sys.argv[1:]))
