from ..core.schedule import Schedule, agp, dsd, gradual, iterative, lin, one_cycle, one_shot, schedules
from .losses import (ActivationBoundaries, Attention, DIST, DecoupledKD, FitNet, Logits, MLD, Mutual, NormalizedDecoupledKD, NormalizedKD, RKD, Similarity, SoftTarget,
    kd_losses, standardized)
from .training import Distill
from .distiller import Distiller, match_feature_layers
from .distillation_callback import KnowledgeDistillation, KnowledgeDistillationCallback
from ..legacy import annealing_cos, annealing_gradual, annealing_linear, annealing_no, get_model_layers, get_module_by_name
