"""The diagonal system in real arithmetic, for graphs that run where there are no complex numbers.

A complex number is a pair of its real and imaginary part, in a last axis of length 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..exporting import scan_over_time


def diag_system_of_pairs(
    u: Tensor, poles: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y (B, L, H) and the final state (B, N, 2), as `diag_system` gives them; for `torch.export` with any length.

    Args:
        u, B, C, D: as in `diag_system`.
        poles: (N, 2).
        initial_state: (B, N, 2); zero if None.

    Source: Orvieto et al. 2023, arXiv 2303.06349, section 3.
    """
    driven = F.linear(u, B).to(poles.dtype).unflatten(-1, (-1, 2))
    state = driven.new_zeros(u.shape[0], *poles.shape) if initial_state is None else initial_state
    *last, states = scan_over_time(_next_pairs, state.unbind(-1), driven.unbind(-1), poles.unbind(-1))
    y = F.linear(states.flatten(-2).to(u.dtype), C)
    return torch.addcmul(y, D.to(y.dtype), u.to(y.dtype)), torch.stack(last, -1)


def _next_pairs(x: Tensor, y: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    x, y = a * x - b * y + u, b * x + a * y + v
    return x, y, torch.stack([x, y], -1)


def multiply_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Multiply complex numbers given as pairs: floats of shape (..., 2), to (..., 2).

    Source: (x + iy)(u + iv) = xu - yv + i (xv + yu).
    """
    (x, y), (u, v) = a.unbind(-1), b.unbind(-1)
    return torch.stack([x * u - y * v, x * v + y * u], -1)
