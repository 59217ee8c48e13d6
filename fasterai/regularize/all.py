from ..core.all import *
from .penalties import *
from .regularize_callback import *
