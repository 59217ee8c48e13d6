from ..core.all import *
from .left import *
from .pruner import *
from .prune_callback import *
