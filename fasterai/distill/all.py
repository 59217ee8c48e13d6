from ..core.all import *
from .losses import *
from .distiller import *
from .distillation_callback import *
from ..legacy import *
