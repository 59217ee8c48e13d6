from ..core.all import *
from .losses import *
