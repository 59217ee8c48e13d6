from ..core.all import *
from .pruner import Pruner, load_pruned, save_pruned
from .prune_callback import PruneCallback
