"""Trainings in two processes, which share each batch"""
import os, socket, sys, tempfile, time, traceback, warnings
from pathlib import Path
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def work(rank, port, folder, cells):
    "Train as `cells` say; what each ends with, or its error, goes into `folder`"
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    dist.init_process_group('gloo')
    sys.path.insert(0, str(Path(__file__).parent))
    import table
    found = []
    for i,(engine,name,options) in enumerate(cells):
        own = Path(folder)/f'{i}_{rank}'
        own.mkdir()
        try: found.append(table.bits(table.trained(engine, name, own, **options)))
        except Exception as e: found.append(f'{type(e).__name__}: {e}\n{traceback.format_exc()[-1500:]}')
        dist.barrier()
    torch.save(found, f'{folder}/found_{rank}.pt')
    dist.destroy_process_group()

def joined(f, args, n, seconds):
    "Let `n` processes run `f(rank, *args)` to the end, `seconds` at most"
    ctx = mp.start_processes(f, args, nprocs=n, join=False, start_method='spawn')
    end = time.monotonic()+seconds
    try:
        while not ctx.join(timeout=5, grace_period=5):
            if time.monotonic()>end: raise TimeoutError(f'{n} processes are not done after {seconds} seconds')
    finally:
        for p in ctx.processes:
            if p.is_alive(): p.kill()

def run(cells, seconds=300): # Of each training: engine, technique, options
    "The state that each training ends with, or its error: of the first process, and of the second"
    with tempfile.TemporaryDirectory() as folder:
        joined(work, (free_port(), folder, cells), 2, seconds)
        return list(zip(*(torch.load(f'{folder}/found_{r}.pt') for r in range(2))))
