"""What a callback costs a training step in Lightning, beside the same training without it, and, for a penalty, with the same written by hand, in turn.

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
# a penalty makes a second gradient of each weight, whoever writes it
BY_HAND = dict(penalty=lambda net: .01*sum(m.weight.abs().mean((1,2,3)).sum() for m in net.modules() if isinstance(m, nn.Conv2d)))

class Module(pl.LightningModule):
    def __init__(self, more=None): # What is added to the loss, a function of the network
        super().__init__()
        self.more = more
        torch.manual_seed(0)
        self.net = torchvision.models.resnet18(num_classes=10)
        self.net.layer1[0].conv1.weight.data[:8] = 0
    def forward(self, x): return self.net(x)
    def training_step(self, batch, i):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss+self.more(self.net) if self.more else loss
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=.9)

class Clock(pl.Callback):
    "Seconds of each step, all that callbacks do among them"
    def __init__(self): self.times,self.start = [],None
    def on_train_batch_start(self, *args):
        now = time.perf_counter()
        if self.start is not None: self.times.append(now-self.start)
        self.start = now

def steps(make=None, more=None):
    "Seconds of the steps of one training"
    torch.manual_seed(0)
    data = [(torch.randn(32, 3, 64, 64),torch.randint(0, 10, (32,))) for _ in range(4)]*(STEPS//4)
    clock = Clock()
    callbacks = [clock, *([make()] if make else [])]
    quiet = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    pl.Trainer(max_epochs=1, callbacks=callbacks, **quiet).fit(Module(more), torch.utils.data.DataLoader(data, batch_size=None))
    return clock.times[SKIPPED:]

if __name__=='__main__':
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads; resnet18, 32 images of 64 pixels, milliseconds a step')
    for name in sys.argv[1:] or TECHNIQUES:
        ways = dict(without={}, ours=dict(make=TECHNIQUES[name])) | (dict(hand=dict(more=BY_HAND[name])) if name in BY_HAND else {})
        times = {k:[] for k in ways}
        for _ in range(ROUNDS):
            for k,how in ways.items(): times[k] += steps(**how)
        for base in [o for o in ways if o!='ours']:
            mean,median = (f(times['ours'])/f(times[base]) for f in (statistics.mean, statistics.median))
            beside = 'the same by hand' if base=='hand' else 'nothing'
            print(f'{name}: {1e3*statistics.median(times["ours"]):.1f} beside {1e3*statistics.median(times[base]):.1f} with {beside}; ×{median:.3f} of the medians, ×{mean:.3f} of the means')
