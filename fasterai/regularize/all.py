from ..core.all import *
from .penalties import Penalty, penalties, penalty
from .training import Regularize
from .regularize_callback import RegularizationCallback, RegularizeCallback
