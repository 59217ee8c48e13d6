from ..core.all import *
from .pruner import *
from .prune_callback import *
