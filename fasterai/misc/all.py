from .fc_decomposer import *
from .conv_decomposer import *
