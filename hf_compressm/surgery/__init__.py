"""Surgery on live models and optimizers: measure, plan, cut, undo.

A cut goes through here once. `make_plan` measures every mixer and computes its reduced parameters, changing nothing;
`apply_plan` puts them into model and optimizer, and returns the record. `compress` does both.

Imports within the package go one way; each line uses only lines above it:

- `wrappers`: names without what `torch.compile` adds
- `record_keys`, `changes`, `policies`, `batches`
- `peft/`: LoRA around weights that change
- `adapters/`: one file for each family of mixers
- `optimizer`, `gradients`, `owners`, `shards`
- `parameters`, `runtime_sizes`
- `history`, `resize`, `sharded`, `lockstep`
- `refit`, `snapshot`
- `statistics`, `layer_plans`
- `team`
- `processes`: several of them plan together
- `base_model`, `values`
- `plan`
"""

from . import adapters as _adapters  # noqa: F401  registers them
from .adapters.base import (
    Measurement,
    MixerAdapter,
    MixerReduction,
    MixerSite,
    ReductionError,
    Statistics,
    find_mixers,
    register_adapter,
    register_refusal,
    register_subclass,
    state_sizes,
    supported_mixers,
)
from .adapters.mamba import MambaAdapter
from .adapters.mamba2 import CompreSSMMamba2Adapter, StockMamba2Adapter
from .adapters.selective import Signals, selective_signals
from .base_model import mixer_state, restore_mixer_state, save_base_model
from .changes import ParameterChange, Term
from .history import append_history, history, last_sizes, merged, original_sizes, set_history, short, with_details
from .layer_plans import CompressionPlan, CutSettings, LayerPlan
from .optimizer import unwrap_optimizer
from .owners import Owner, find_owners, with_ties
from .parameters import check_parameters
from .peft.tuners import has_tuners
from .plan import apply_plan, compress, make_plan
from .policies import Energy, Fraction, Policy, Target
from .resize import check_fixed_tensors, resize_mixers, sizes_in_state_dict
from .snapshot import Snapshot
from .statistics import gather_statistics, measure_mixers, measure_model, needs_calibration, undisturbed
from .team import Team
from .values import check_value_size

__all__ = [
    "CompreSSMMamba2Adapter",
    "CompressionPlan",
    "CutSettings",
    "Energy",
    "Fraction",
    "LayerPlan",
    "MambaAdapter",
    "Measurement",
    "MixerAdapter",
    "MixerReduction",
    "MixerSite",
    "Owner",
    "ParameterChange",
    "Policy",
    "ReductionError",
    "Signals",
    "Snapshot",
    "Statistics",
    "StockMamba2Adapter",
    "Target",
    "Team",
    "Term",
    "append_history",
    "apply_plan",
    "check_fixed_tensors",
    "check_parameters",
    "check_value_size",
    "compress",
    "find_mixers",
    "find_owners",
    "gather_statistics",
    "has_tuners",
    "history",
    "last_sizes",
    "make_plan",
    "measure_mixers",
    "measure_model",
    "merged",
    "mixer_state",
    "needs_calibration",
    "original_sizes",
    "register_adapter",
    "register_refusal",
    "register_subclass",
    "resize_mixers",
    "restore_mixer_state",
    "save_base_model",
    "selective_signals",
    "set_history",
    "short",
    "sizes_in_state_dict",
    "state_sizes",
    "supported_mixers",
    "undisturbed",
    "unwrap_optimizer",
    "with_details",
    "with_ties",
]
