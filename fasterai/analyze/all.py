from .counts import effective_parameters, latency, n_bytes, n_macs, n_nonzero, n_params, speedup
from .blocks import block_influence
from .budget import allocate
from .sensitivity import (Sensitivity, perform_bits_analysis, perform_sensitivity_analysis, sensitivities_to_csv, sensitivities_to_png, sensitivity,
    sensitivity_to_png)
