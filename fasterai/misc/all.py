from ..core.all import *
from .bn_folding import *
