"""What configs share whose models may mix linear attention, with a state size for each layer, and softmax attention."""

from __future__ import annotations

from typing import Any

LINEAR = "linear_attention"
FULL = "full_attention"


def types_at_interval(layers: int, interval: int) -> list[str]:
    """Types of so many layers, softmax attention last among every `interval` of them.

    Raises:
        ValueError: if the interval is negative.
    """
    if interval < 0:
        raise ValueError(f"full_attention_interval must be >= 0, with 0 for no softmax attention; got {interval}")
    return [FULL if interval and (layer + 1) % interval == 0 else LINEAR for layer in range(layers)]


def check_layers(config: Any) -> None:
    """Check the types of layers.

    Raises:
        ValueError: if they are not one for each layer, of two types, linear attention at least once.
    """
    types = config.layer_types
    if len(types) != config.num_hidden_layers or not {*types} <= {LINEAR, FULL} or LINEAR not in types:
        raise ValueError(
            f"layer_types must name {LINEAR} or {FULL} for each of num_hidden_layers={config.num_hidden_layers} "
            f"layers, the former at least once; got {types} (full_attention_interval={config.full_attention_interval})"
        )


def check_multiple(config: Any, many: str, few: str) -> None:
    """Check that a number of heads, by its field, is a multiple of another.

    Raises:
        ValueError: if it is not, or one of the two is less than 1.
    """
    if getattr(config, few) < 1 or getattr(config, many) < 1 or getattr(config, many) % getattr(config, few):
        raise ValueError(
            f"{many} must be a multiple of {few}, both >= 1; got {getattr(config, many)} and {getattr(config, few)}"
        )


def check_sizes(config: Any, full: str) -> None:
    """Check that no state is larger than keys and queries are.

    Args:
        config: has `state_sizes`, a list.
        full: the field with the size of keys and queries.

    Raises:
        ValueError: if one is.
    """
    if max(config.state_sizes) > getattr(config, full):
        raise ValueError(
            f"state_sizes must not exceed {full}, which keys and queries have; got {config.state_sizes} "
            f"for {full}={getattr(config, full)}"
        )
