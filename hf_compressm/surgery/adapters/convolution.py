"""State sizes at which an installed kernel can run the convolution in front of the states.

Source: the checks of strides that the package causal_conv1d makes of its input, csrc/causal_conv1d.cpp.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

CONV_MULTIPLE = 8
"""The `causal_conv1d` kernel takes channels-last tensors only where strides are a multiple of this."""


def convolution_step(rows: Callable[[int], Sequence[int]], size: int) -> int:
    """Smallest step, 1 to 8, by which a layer's states may become fewer so that `causal_conv1d` still runs the layer.

    Args:
        rows: from a number of states, the numbers of channels that the kernel needs to be multiples of 8.
        size: present number of states, >= 1.

    Returns:
        1 where the kernel is not installed, cannot run the layer as it is, or where no multiple of a step would do.
    """

    def runs(states: int) -> bool:
        return not any(number % CONV_MULTIPLE for number in rows(states))

    if importlib.util.find_spec("causal_conv1d") is None or not runs(size):
        return 1
    step = next(step for step in range(1, CONV_MULTIPLE + 1) if runs(size - step))
    return 1 if size % step else step


def check_convolution(step: int, size: int, multiple: int) -> None:
    """Raise if `causal_conv1d` runs a layer at its present size, but not at all smaller ones that a cut may choose.

    Args:
        step: of `convolution_step`.
        size: present number of states, a multiple of step.
        multiple: smaller sizes are multiples of this, >= 1.

    Raises:
        ValueError: with the multiple that would do.
    """
    if failing := [order for order in range(multiple, size, multiple) if order % step]:
        raise ValueError(
            f"causal_conv1d is installed and needs channels of the convolution in multiples of {CONV_MULTIPLE}, which "
            f"they would not be with {failing[0]} states. Set multiple_of={step}, or leave it out."
        )
