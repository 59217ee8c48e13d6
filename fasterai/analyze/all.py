from ..core.all import *
from .counts import *
