from .bn_folding import BN_Folder, bn_folding_model
from .fc_decomposer import FCDecomposer, FC_Decomposer
from .conv_decomposer import Conv_Decomposer, conv_methods
from ..export.cpu import accelerate_model_for_cpu, optimize_for_cpu
