from .granularity import block, granularities, layer_axes, pattern
from .criteria import (Criteria, criterias, grad_crit, large_final, large_init, large_init_large_final, magnitude_increase, mov_large_final, mov_mag, movement,
    movmag, pointwise, small_final, small_init, small_init_small_final, squared_final, taylor, updating_magnitude_increase, updating_movement, updating_movmag, wanda)
from .context import contexts, erk, global_, lamp, local, uniform_plus
from .schedule import (Schedule, agp, dsd, gradual, iterative, lin, one_cycle, one_shot, sched_agp, sched_dsd, sched_iterative, sched_one_cycle, sched_one_shot,
    schedules)  # `cos` is a name of math and torch: 'cos', or `from fasterai.core.schedule import cos`
from .pace import Pace
from .graph import ChannelGraph, unknown_ops
from .ops import op
