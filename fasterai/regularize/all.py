from ..core.all import *
from .penalties import Penalty, penalties, penalty
from .regularize_callback import RegularizationCallback, RegularizeCallback
