from ..core.all import *
from .pruner import *
