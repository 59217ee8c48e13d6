"""What a callback costs a training step in Lightning, beside the same training without it, in turn.

    python benchmarks/engines.py [techniques …]"""
import logging, statistics, sys, time, warnings
import torch, torchvision
from torch import nn
from torch.nn import functional as F
import lightning.pytorch as pl
from fasterai.lightning import KeepSparsity, KMeansCallback, RegularizationCallback, SparsifyCallback

logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
warnings.simplefilter('ignore')
STEPS,ROUNDS,SKIPPED = 40,5,8 # steps of a training, trainings of each, first steps that are not counted
TECHNIQUES = dict(weight_local=lambda: SparsifyCallback(50), weight_global=lambda: SparsifyCallback(50, 'weight', 'global'),
    filters=lambda: SparsifyCallback(50, 'filter', coupled=True, example_inputs=torch.randn(1, 3, 64, 64)), keep=KeepSparsity,
    shared=lambda: KMeansCallback(4), penalty=lambda: RegularizationCallback('filter'))

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torchvision.models.resnet18(num_classes=10)
        self.net.layer1[0].conv1.weight.data[:8] = 0
    def forward(self, x): return self.net(x)
    def training_step(self, batch, i): return F.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=.9)

class Clock(pl.Callback):
    "Seconds of each step, all that callbacks do among them"
    def __init__(self): self.times,self.start = [],None
    def on_train_batch_start(self, *args):
        now = time.perf_counter()
        if self.start is not None: self.times.append(now-self.start)
        self.start = now

def steps(make):
    "Seconds of the steps of one training"
    torch.manual_seed(0)
    data = [(torch.randn(32, 3, 64, 64),torch.randint(0, 10, (32,))) for _ in range(4)]*(STEPS//4)
    clock = Clock()
    callbacks = [clock, *([make()] if make else [])]
    quiet = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    pl.Trainer(max_epochs=1, callbacks=callbacks, **quiet).fit(Module(), torch.utils.data.DataLoader(data, batch_size=None))
    return clock.times[SKIPPED:]

if __name__=='__main__':
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads; resnet18, 32 images of 64 pixels, milliseconds a step')
    for name in sys.argv[1:] or TECHNIQUES:
        with_it,without = [],[]
        for _ in range(ROUNDS):
            without += steps(None)
            with_it += steps(TECHNIQUES[name])
        mean,median = (f(with_it)/f(without) for f in (statistics.mean, statistics.median))
        print(f'{name}: {1e3*statistics.median(without):.1f} without, {1e3*statistics.median(with_it):.1f} with; ×{median:.3f} of the medians, ×{mean:.3f} of the means')
