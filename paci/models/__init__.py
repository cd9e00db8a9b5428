"""Models as sequences of layers that can be cut into stages anywhere."""

from paci.models.gpt import (
    PRESETS,
    GPTConfig,
    gpt_config,
    is_hidden_matrix,
    layer_costs,
    num_parameters,
)
from paci.models.layers import (
    LayerStack,
    build_stage,
    build_stages,
    combine_digests,
    layer_digests,
    muon_groups,
    parameter_groups,
)
from paci.models.sampling import generate
from paci.models.subspace import Narrow, Widen

__all__ = [
    "PRESETS",
    "GPTConfig",
    "LayerStack",
    "Narrow",
    "Widen",
    "build_stage",
    "build_stages",
    "combine_digests",
    "generate",
    "gpt_config",
    "is_hidden_matrix",
    "layer_costs",
    "layer_digests",
    "muon_groups",
    "num_parameters",
    "parameter_groups",
]
