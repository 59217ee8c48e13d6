from ..core.all import *
from .counts import *
from .budget import *
from .sensitivity import *
