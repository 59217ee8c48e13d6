from .bn_folding import *
from .fc_decomposer import *
from .conv_decomposer import *
