from ..core.all import *
from .sparsifier import *
from .sparsify_callback import *
from ..legacy import *
