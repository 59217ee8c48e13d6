from ..core.all import *
from ..core.files import FileError
from .blocks import drop_blocks
from .pruner import Pruner, load_pruned, save_pruned
from .training import Prune
from .prune_callback import PruneCallback
