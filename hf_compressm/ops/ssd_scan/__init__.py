"""Mamba-2's scan: one decay per head, states of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .naive import naive_ssd_scan

__all__ = ["naive_ssd_scan", "ssd_scan", "ssd_state_update"]

Limits = tuple[float, float]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """Scan of Mamba-2, differentiable in all tensors.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t per head, h (P, N). B and C are shared by the
    heads of a group.

    Args:
        x: (B, L, H, P), float16, bfloat16, float32 or float64.
        dt: (B, L, H); `dt_bias` (H,) is added, it passes softplus if `dt_softplus`, and is clamped to `dt_limit`.
        A: (H,), usually negative.
        B, C: (B, L, G, N), with H divisible by G.
        D: (H,), or None.
        initial_state: (B, H, P, N); zero if None.
        chunk_size: steps that are treated by matrix products at once, >= 1.
        return_final_state: whether to return the state after the last step too.

    Returns:
        y (B, L, H, P) in x's dtype; with `return_final_state` also the final state, float32, or float64 if x is.

    Raises:
        ValueError: if a shape does not fit.

    Source: Dao and Gu 2024, arXiv 2405.21060, section 6.
    """
    _check(x, dt, A, B, C)
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = _steps(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    wide = x.to(dtype)
    y, final = naive_ssd_scan(wide, step, A.to(dtype), B.to(dtype), C.to(dtype), initial_state, chunk_size)
    if D is not None:
        y = y + wide * D.to(dtype)[:, None]
    return (y.to(x.dtype), final) if return_final_state else y.to(x.dtype)


@torch.no_grad()
def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = (0.0, float("inf")),
) -> Tensor:
    """One step of the scan, for generation; updates `state` (B, H, P, N) in place.

    Args:
        x: (B, H, P). dt: (B, H). B, C: (B, G, N). The rest as in `ssd_scan`.

    Returns:
        y (B, H, P) in x's dtype.
    """
    step = _steps(dt.to(state.dtype), dt_bias, dt_softplus, dt_limit)
    per_group = state.shape[1] // B.shape[1]
    B, C = (tensor.to(state.dtype).repeat_interleave(per_group, dim=1) for tensor in (B, C))
    drive = (step[..., None] * x.to(state.dtype))[..., None] * B[:, :, None]
    state.mul_((step * A.to(state.dtype)).exp()[..., None, None]).add_(drive)
    y = (state @ C[..., None]).squeeze(-1)
    return (y if D is None else y + x * D.to(state.dtype)[:, None]).to(x.dtype)


def _steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: Limits) -> Tensor:
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    return (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must have shape (B, L, H, P), all >= 1; got {tuple(x.shape)}")
    batch, length, heads, _ = x.shape
    if dt.shape != (batch, length, heads) or A.shape != (heads,):
        raise ValueError(
            f"dt must be {(batch, length, heads)} and A {(heads,)}; got {tuple(dt.shape)} and {tuple(A.shape)}"
        )
    if B.ndim != 4 or B.shape[:2] != (batch, length) or heads % B.shape[2] or C.shape != B.shape:
        raise ValueError(
            f"B and C must both be ({batch}, {length}, G, N) with G a divisor of {heads}; got {tuple(B.shape)} and "
            f"{tuple(C.shape)}"
        )
