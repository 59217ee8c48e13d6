from ..core.all import *
from .pruner import Pruner, load_pruned, save_pruned
from .training import Prune
from .prune_callback import PruneCallback
