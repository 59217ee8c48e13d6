"""Hypothesis repeats itself from run to run; `pytest --hypothesis-profile=hunt` looks further. `pytest --device cuda` puts models and data on a GPU, `--device pretend` on a device that needs no hardware"""
import os
import torch
if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'  # before anybody imports Triton, whose interpreter runs the kernels there
from hypothesis import HealthCheck, settings

quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile('same', derandomize=True, max_examples=60, **quiet)
settings.register_profile('hunt', max_examples=1000, print_blob=True, **quiet)
settings.load_profile('same')

def pytest_addoption(parser): parser.addoption('--device', default='cpu', help='where tensors and layers are made that do not say where')

def pytest_configure(config):
    device = config.getoption('device')
    if device=='cpu': return
    if device=='pretend':
        from pretend import load
        load()
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # deterministic algorithms ask for it
    torch.set_default_device(device)
    torch.backends.cudnn.allow_tf32,torch.backends.cudnn.deterministic = False,True  # tests compare digits
    class Generator(torch.Generator):
        "One whose numbers are made where all tensors are"
        def __new__(cls, device=device): return super().__new__(cls, device)
    torch.Generator = Generator
    from fastai.learner import AvgSmoothLoss
    def reset(self): self.count,self.val = 0,torch.tensor(0., device='cpu')  # fastai averages losses there, whatever the default device
    AvgSmoothLoss.reset = reset
    from fastai import learner
    def reorder(t, idxs, was=learner.nested_reorder): return was(t, idxs.cpu())  # predictions are there as well
    learner.nested_reorder = reorder
