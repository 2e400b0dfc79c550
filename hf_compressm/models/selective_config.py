"""What the configs of this package's Mamba and Mamba-2 models share: a state size for each layer, and checks."""

from __future__ import annotations

from typing import Any

from transformers.activations import ACT2FN

from .pooling import POOLINGS
from .remote_code import CarriesCode

SCHEMES = ("random", "constant")


class SelectiveConfig(CarriesCode):
    """Mixin of transformers' configs that have `state_sizes`, `num_channels` and `pooling` besides their own fields."""

    keys_to_ignore_at_inference = ["cache", "cache_params"]
    state_sizes: Any
    state_size: Any
    num_hidden_layers: Any

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        self.state_sizes = checked_sizes(self.state_sizes, self.state_size, self.num_hidden_layers)
        super().__post_init__(**kwargs)  # type: ignore[misc]


def checked_sizes(sizes: Any, full: int, layers: int, counted: str = "num_hidden_layers") -> list[int]:
    """Return state sizes as one integer for each layer.

    Args:
        sizes: one integer for all layers, or a list of one per layer; None stands for `full` in all layers.
        full: the largest size that layers can have.
        layers: number of layers that have states.
        counted: what their number is called in the error.

    Raises:
        ValueError: if it is not one integer >= 1 for each layer.
    """
    sizes = full if sizes is None else sizes
    sizes = [sizes] * layers if isinstance(sizes, int) else list(sizes)
    if len(sizes) != layers or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(
            f"state_sizes must be one integer >= 1, or a list of one per layer; got {sizes!r} for {counted}={layers}"
        )
    return sizes


def check_fields(config: Any) -> None:
    """Check the names in a config.

    Raises:
        ValueError: if `hidden_act`, `pooling` or, if there is one, `time_step_init_scheme` is unknown, or the
            activation has parameters.
    """
    if config.hidden_act not in ACT2FN or has_parameters(config.hidden_act):
        plain = [name for name in sorted(ACT2FN) if not has_parameters(name)]
        raise ValueError(
            f"hidden_act must be an activation without parameters, which transformers' own layers would not train: "
            f"{', '.join(plain)}; got {config.hidden_act!r}"
        )
    scheme = getattr(config, "time_step_init_scheme", SCHEMES[0])
    if scheme not in SCHEMES:
        raise ValueError(f"time_step_init_scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    if config.pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {config.pooling!r}")


def has_parameters(activation: str) -> bool:
    """Tell whether an activation, by transformers' name, has parameters of its own."""
    return activation in ("prelu", "xielu")
