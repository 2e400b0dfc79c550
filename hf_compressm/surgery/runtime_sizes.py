"""State sizes that a runtime takes, for the layers of a model: `SizeConstraints.sizes_for`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..models import CompreSSMMamba2Config
from ..models.runtimes import check_rules, runtime_sizes
from ..reduction import SizeConstraints
from .adapters.base import state_sizes
from .owners import find_owners, with_ties
from .policies import Policy, Target


def check_sizes_for(model: nn.Module, constraints: SizeConstraints, policy: Policy | None = None) -> None:
    """Check that the runtime that is to run a model, if one is named, can run it at some smaller size.

    Args:
        model: with its present state sizes.
        constraints: as they were given.
        policy: how much is to be cut; a `Target` may not lie below the smallest of those sizes.

    Raises:
        ValueError: if the runtime is unknown, takes no such model, or no size below the present one that the
            constraints and the target allow.
    """
    if constraints.sizes_for is None:
        return
    name, present = constraints.sizes_for, max(state_sizes(model))
    for config in _configs(model):
        _check_config(name, config)
    sizes = [size for size in with_ties(model, constraints).allowed or () if constraints.minimum <= size < present]
    takes = " and ".join(sorted({str(runtime_sizes(name, config)) for config in _configs(model)}))
    if not sizes:
        raise ValueError(
            f"sizes_for={name!r} allows {takes} states, of which none is below the present {present} and at least the "
            f"minimum {constraints.minimum}, so nothing could be cut; leave sizes_for out, and pad with export --for"
        )
    if isinstance(policy, Target) and policy.mean_state_size < sizes[0]:
        raise ValueError(
            f"target_state_size is {policy.mean_state_size:g}, but sizes_for={name!r} allows {takes} states; the "
            f"smallest target is {sizes[0]}"
        )


def _configs(model: nn.Module) -> Sequence[Any]:
    return [config for owner in find_owners(model) for config in owner.configs]


def _check_config(name: str, config: Any) -> None:
    runtime_sizes(name, config)
    if isinstance(config, CompreSSMMamba2Config):
        raise ValueError(
            f"a cut {config.model_type} mixes states in matrices that {name} does not have; to cut for it, take the "
            "stock Mamba2ForCausalLM"
        )
    check_rules(name, config)
