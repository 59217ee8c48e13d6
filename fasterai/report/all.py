from .plots import (show_blocks, show_channels, show_criteria, show_criterion, show_granularities, show_influence, show_report, show_schedules, show_sensitivity,
    show_sensitivity_map, show_sparsity)
from .tables import report, summary
