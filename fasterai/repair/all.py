from ..core.all import *
from .repair import repair
