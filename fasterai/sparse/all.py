from ..core.all import *
from .sparsifier import LevelPruner, Sparsifier, hold_zeros
from .semi_structured import to_semi_structured
from .checkpoint import sparsify_checkpoint
from .training import Sparsify
from .sparsify_callback import KeepSparsity, SparsifyCallback
from ..legacy import annealing_cos, annealing_gradual, annealing_linear, annealing_no
