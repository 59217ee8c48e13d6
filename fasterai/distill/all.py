from ..core.all import *
from .losses import *
from .distiller import *
