"""One step of Mamba-2's scan, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import Limits, time_steps


@torch.no_grad()
def ssd_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: Limits = (0.0, float("inf")),
) -> Tensor:  # fmt: skip
    """One step of `ssd_scan`; updates `state` in place.

    Args:
        state: (B, H, P, N), float32 or float64.
        x: (B, H, P).
        dt: (B, H).
        B, C: (B, G, N).
        A, D, dt_bias, dt_softplus, dt_limit: as in `ssd_scan`.

    Returns:
        y (B, H, P) in x's dtype.

    Source: Dao and Gu 2024, arXiv 2405.21060, section 6.
    """
    dtype, groups = state.dtype, (B.shape[1], -1)
    step, wide = time_steps(dt.to(dtype), dt_bias, dt_softplus, dt_limit), x.to(dtype)
    state.mul_((step * A.to(dtype)).exp_()[..., None, None])
    by_group = state.unflatten(1, groups)
    drive = (step[..., None] * wide).unflatten(1, groups)[..., None]
    by_group.addcmul_(drive, B.to(dtype)[:, :, None, None])
    y = torch.linalg.vecdot(by_group, C.to(dtype)[:, :, None, None]).flatten(1, 2)
    return (y if D is None else torch.addcmul(y, wide, D.to(dtype)[:, None])).to(x.dtype)
