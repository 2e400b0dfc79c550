"""One step of the selective scan, for generation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .naive import step_sizes


@torch.no_grad()
def selective_state_update(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """One step of `selective_scan`; updates `state` in place.

    Args:
        state: (B, H, N), float32 or float64.
        u, delta, z: (B, H).
        B, C: (B, N).
        A, D, delta_bias, delta_softplus: as in `selective_scan`.

    Returns:
        y (B, H) in u's dtype.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.
    """
    dtype = state.dtype
    dt, wide = step_sizes(delta.to(dtype), delta_bias, delta_softplus), u.to(dtype)
    state.mul_((dt[..., None] * A.to(dtype)).exp_()).addcmul_((dt * wide)[..., None], B.to(dtype)[:, None])
    # At every size faster than a product of matrices, which copies.
    y = torch.linalg.vecdot(state, C.to(dtype)[:, None])
    y = y if D is None else torch.addcmul(y, wide, D.to(dtype))
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(u.dtype)
