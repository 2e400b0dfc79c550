"""Checks of the config fields of models that forecast."""

from __future__ import annotations

from typing import Any

SCALINGS = ("mean", "std")


def check_forecasting(config: Any) -> None:
    """Check `prediction_length`, `prediction_channel_indices`, `quantiles` and `scaling` of a config.

    Raises:
        ValueError: if a value is out of its range.
    """
    steps, quantiles = config.prediction_length, config.quantiles
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"prediction_length must be an integer >= 1, got {steps!r}")
    if quantiles is not None and not are_quantiles(quantiles):
        raise ValueError(f"quantiles must be increasing numbers in (0, 1), or None for the mean; got {quantiles!r}")
    if config.scaling is not None and config.scaling not in SCALINGS:
        raise ValueError(f"scaling must be None or one of {', '.join(SCALINGS)}; got {config.scaling!r}")
    _check_channels(config.prediction_channel_indices, config.num_channels)


def _check_channels(indices: Any, channels: int | None) -> None:
    if indices is None:
        return
    counted = isinstance(indices, list) and indices and all(type(index) is int for index in indices)
    if not counted or len(set(indices)) < len(indices) or not all(0 <= index < (channels or 0) for index in indices):
        raise ValueError(
            "prediction_channel_indices must be None or a list of different channels in [0, num_channels); got "
            f"{indices!r} for num_channels={channels}"
        )


def are_quantiles(values: Any) -> bool:
    """Whether values are a list of increasing numbers in (0, 1), of any size but 0."""
    numbers = isinstance(values, list) and bool(values) and all(type(value) is float for value in values)
    return numbers and all(low < high for low, high in zip([0.0, *values], [*values, 1.0], strict=True))
