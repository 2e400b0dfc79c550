"""The gated delta rule on the CPU: chunks as in PyTorch, and a kernel for single tokens."""

from __future__ import annotations

from torch import Tensor

from ..threads import run_units
from .chunks import backward, forward, kept_shapes
from .cpu_kernels import gated_delta_step_kernel

__all__ = ["backward", "forward", "kept_shapes", "step"]

ALONE = 1 << 18
"""Up to so many entries of states one thread is faster than several, which take time to start."""


def step(
    scale: float, state: Tensor, q: Tensor, k: Tensor, e: Tensor, v: Tensor, decay: Tensor, beta: Tensor
) -> Tensor:
    """Output (B, H, V) of one token; updates `state` (B, H, K, V), which is contiguous.

    Args:
        q, k, e: (B, G, K). v: (B, H, V). decay: (B, H, 1 or K). beta: (B, H). All of the dtype of the state.
    """
    output = state.new_empty(v.shape)
    arrays = [tensor.flatten(0, 1).contiguous().numpy() for tensor in (q, k, e, v, decay)]
    arguments = (*arrays, beta.flatten().numpy(), scale, state.flatten(0, 1).numpy(), output.flatten(0, 1).numpy())
    heads = v.shape[0] * v.shape[1]
    if state.numel() <= ALONE:
        gated_delta_step_kernel(0, heads, *arguments)
    else:
        run_units(gated_delta_step_kernel, heads, *arguments)
    return output
