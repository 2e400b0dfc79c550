"""Initial values of new models that the configs of some stock classes do not offer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..layers.mixer import inverse_softplus_of_time_steps


def check_time_steps(limits: Sequence[float] | None) -> None:
    """Check the range of initial time steps, or None for none.

    Raises:
        ValueError: unless these are two finite numbers with 0 < smallest <= largest.
    """
    if limits is not None and not (len(limits) == 2 and 0 < limits[0] <= limits[1] < math.inf):
        raise ValueError(f"time_steps are the smallest and the largest, 0 < smallest <= largest; got {list(limits)}")


@torch.no_grad()
def set_time_steps(model: nn.Module, limits: Sequence[float]) -> None:
    """Draw new time steps for all recurrent layers with a `dt_bias`, evenly in their logarithm; by torch's generator.

    A layer's decay is exp(-exp(A_log) softplus(dt_bias + ...)). Stock delta-rule layers but OLMo-Hybrid's begin with
    dt_bias = 1, which forgets nearly everything within a token.

    Args:
        model: any model.
        limits: smallest and largest time step, > 0.

    Raises:
        ValueError: if no layer has a `dt_bias`.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.6 for the distribution.
    """
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".dt_bias")]
    if not biases:
        raise ValueError(f"time_steps is given, and no layer of {type(model).__name__} has a dt_bias that it could set")
    low, high = limits
    for bias in biases:
        bias.copy_(inverse_softplus_of_time_steps(len(bias), (low, high, low), bias.device))
