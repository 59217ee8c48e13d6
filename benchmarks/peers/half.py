"How each library makes half of the channels of a network go, as its documentation says"
import torch
from torch import nn
from torch.nn.utils import prune

def last_layers(model, classes=1000):
    "The layers of `model` that give its classes"
    return [m for m in model.modules() if classes in (getattr(m, 'out_features', 0), getattr(m, 'out_channels', 0))]

def ours(model, x, round_to=None):
    from fasterai.prune.all import Pruner
    return Pruner(model, 50, example_inputs=x, round_to=round_to).prune_model()

def before(model, x, round_to=None):
    from fasterai.core.all import large_final
    from fasterai.prune.all import Pruner
    Pruner(model, .5, 'local', large_final, example_inputs=x, round_to=round_to).prune_model()
    return model

def torch_pruning(model, x, round_to=None):
    import torch_pruning as tp
    from torchvision.models import VisionTransformer
    vit = isinstance(model, VisionTransformer)
    if vit: round_to = model.encoder.layers[0].num_heads
    tp.pruner.MagnitudePruner(model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=.5, ignored_layers=last_layers(model), round_to=round_to).step()
    if vit: model.hidden_dim = model.conv_proj.out_channels  # the network's code compares widths with it
    return model

def torch_simplify(model, x):
    "Half of the filters of each convolution are zeroed, and what the additions of the network allow is removed; norms are folded"
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            prune.ln_structured(m, 'weight', amount=.5, n=2, dim=0)
            prune.remove(m, 'weight')
    return simplified(model, x)

def simplified(model, x):
    from simplify import simplify
    return simplify(model, torch.zeros_like(x))
