"""Recurrences in the graphs of torch.export, for every length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, ...]]


def scan_over_time(
    step: Step, states: Sequence[Tensor], inputs: Sequence[Tensor], constants: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """Run a recurrence over a length that the graph does not fix; a loop in Python would write out its every step.

    Args:
        step: function of the states, the inputs of one time step and the constants, one after the other, that returns
            the next states and then one output. It changes nothing in place, and what it returns shares no memory.
        states: those before the first time step.
        inputs: (B, L, ...) each, none the memory of another.
        constants: tensors that are the same for all time steps. The step may use no others.

    Returns:
        The states after the last time step, and then the outputs of all of them, (B, L, ...).
    """
    length = inputs[0].shape[1]
    if isinstance(length, int) and length == 1:
        *last, output = step(*states, *(tensor[:, 0] for tensor in inputs), *constants)
        return *last, output[:, None]
    # Not yet among torch's public names; torch.export, torch.onnx and AOTInductor know it. The function `scan` beside
    # it would run Dynamo on each step, and cannot take a number of steps that depends on data.
    from torch._higher_order_ops.scan import scan_op

    # With memory of their own, as the operator wants them.
    first, fixed = ([tensor.clone() for tensor in group] for group in (states, constants))
    *last, outputs = scan_op(step, first, [tensor.transpose(0, 1) for tensor in inputs], tuple(fixed))
    return *last, outputs.transpose(0, 1)


def scan_over_blocks(
    step: Step, states: Sequence[Tensor], inputs: Sequence[Tensor], constants: Sequence[Tensor], size: int
) -> tuple[Tensor, ...]:
    """As `scan_over_time`, but each call of `step` gets `size` time steps, (B, size, ...), and returns their outputs.

    Behind the end of the inputs, up to a multiple of `size`, it gets zeros.
    """
    times = torch.arange(inputs[0].shape[1], device=inputs[0].device)
    # A number of blocks computed from the length would be assumed to differ from 1, which shorter inputs violate.
    starts = (times % size == 0).nonzero()[:, 0]
    torch._check(starts.shape[0] > 0)
    places = starts[:, None] + torch.arange(size, device=times.device)
    behind, places = places >= times.shape[0], places.clamp(max=times.shape[0] - 1)

    def blocks(x: Tensor) -> Tensor:
        return x[:, places].masked_fill(behind.view(*behind.shape, *[1] * (x.ndim - 2)), 0)

    *last, outputs = scan_over_time(step, states, [blocks(tensor) for tensor in inputs], constants)
    return *last, outputs.flatten(1, 2).index_select(1, times)
