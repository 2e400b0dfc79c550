"""Surgery on live models and optimizers: measure, plan, cut, undo."""

from . import lru as _lru  # noqa: F401  registers its adapter
from .adapters import (
    MixerAdapter,
    MixerReduction,
    MixerSite,
    ReductionError,
    find_mixers,
    register_adapter,
    state_sizes,
    supported_mixers,
)
from .changes import ParameterChange, Term
from .history import append_history, history, original_sizes, set_history
from .optimizer import unwrap_optimizer
from .plan import (
    CompressionPlan,
    LayerPlan,
    apply_plan,
    check_parameters,
    compress,
    make_plan,
    measure_model,
)
from .policies import Energy, Fraction, Policy, Target
from .resize import resize_mixers, sizes_in_state_dict
from .snapshot import Snapshot

__all__ = [
    "CompressionPlan",
    "Energy",
    "Fraction",
    "LayerPlan",
    "MixerAdapter",
    "MixerReduction",
    "MixerSite",
    "ParameterChange",
    "Policy",
    "ReductionError",
    "Snapshot",
    "Target",
    "Term",
    "append_history",
    "apply_plan",
    "check_parameters",
    "compress",
    "find_mixers",
    "history",
    "make_plan",
    "measure_model",
    "original_sizes",
    "register_adapter",
    "resize_mixers",
    "set_history",
    "sizes_in_state_dict",
    "state_sizes",
    "supported_mixers",
    "unwrap_optimizer",
]
