from ..core.all import *
from .repair import repair
from .training import Repair
from .repair_callback import RepairCallback
