"""Mamba's selective scan, with cost in proportion to the number of states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import choose_backend
from .naive import naive_selective_scan, step_sizes

__all__ = ["naive_selective_scan", "selective_scan", "selective_state_update"]

BACKENDS = ("naive", "cpu")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Any:
    """Selective scan of Mamba, channels last, differentiable in all tensors.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = (C_t . h_t + D u_t) silu(z_t) per channel, with
    dt_t = softplus(delta_t + delta_bias). State sizes of any N cost in proportion to N.

    Args:
        u, delta: (B, L, H), float16, bfloat16, float32 or float64, any strides.
        A: (H, N), usually negative; float32 or float64.
        B, C: (B, L, N).
        D: (H,), or None for no direct term.
        z: (B, L, H), or None for no gate.
        delta_bias: (H,), or None.
        delta_softplus: whether dt passes softplus; without it dt = delta + delta_bias.
        initial_state: (B, H, N); zero if None.
        return_final_state: whether to return the state after the last step too.
        backend: "naive" or "cpu" (Numba, float32 and float64 arithmetic); chosen by device if None. The environment
            variable HF_COMPRESSM_SELECTIVE_SCAN forces one as well.

    Returns:
        y (B, L, H) in u's dtype; with `return_final_state` also h_{L-1} (B, H, N), in float32, or float64 if u is.

    Raises:
        ValueError: if a shape or device does not fit, or the backend is unknown or cannot run here.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.
    """
    _check(u, delta, A, B, C, initial_state)
    if choose_backend("selective_scan", backend, u.device.type, BACKENDS) == "naive":
        y, final = naive_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
        return (y, final) if return_final_state else y
    dtype = torch.promote_types(u.dtype, torch.float32)
    dt = step_sizes(delta.to(dtype), delta_bias, delta_softplus)
    if initial_state is None:
        initial_state = A.new_zeros(len(u), *A.shape)
    y, final = _CPUScan.apply(*(tensor.to(dtype).contiguous() for tensor in (u, dt, A, B, C, initial_state)))
    y = y if D is None else y + u.to(dtype) * D.to(dtype)
    y = y if z is None else y * F.silu(z.to(dtype))
    return (y.to(u.dtype), final) if return_final_state else y.to(u.dtype)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """One step of the scan, for generation; updates `state` in place.

    Args:
        state: (B, H, N), float32 or float64.
        u, delta, z: (B, H). B, C: (B, N). The rest as in `selective_scan`.

    Returns:
        y (B, H) in u's dtype.
    """
    dt = step_sizes(delta.to(state.dtype), delta_bias, delta_softplus)
    drive = (dt * u.to(state.dtype))[..., None] * B.to(state.dtype)[:, None]
    state.mul_((dt[..., None] * A.to(state.dtype)).exp()).add_(drive)
    y = (state @ C.to(state.dtype)[..., None]).squeeze(-1)
    y = y if D is None else y + u * D.to(state.dtype)
    y = y if z is None else y * F.silu(z.to(state.dtype))
    return y.to(u.dtype)


class _CPUScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        from .cpu import scan_forward

        y, final, checkpoints = scan_forward(*tensors)
        ctx.save_for_backward(*tensors[:5], checkpoints)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
        from .cpu import scan_backward

        u, dt, A, B, C, checkpoints = ctx.saved_tensors
        return scan_backward(u, dt, A, B, C, checkpoints, dy.contiguous(), dfinal.contiguous())


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None) -> None:
    if u.ndim != 3 or u.numel() == 0 or delta.shape != u.shape:
        raise ValueError(
            f"u and delta must have one shape (B, L, H) with B, L, H >= 1; got {tuple(u.shape)}, {tuple(delta.shape)}"
        )
    batch, length, channels = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.numel() == 0:
        raise ValueError(f"A must have shape (H, N) with H = {channels} as in u and N >= 1; got {tuple(A.shape)}")
    for name, tensor in (("B", B), ("C", C)):
        if tensor.shape != (batch, length, A.shape[1]):
            raise ValueError(f"{name} must be {(batch, length, A.shape[1])}, (B, L, N); got {tuple(tensor.shape)}")
    if initial_state is not None and initial_state.shape != (batch, *A.shape):
        raise ValueError(f"initial_state must be {(batch, *A.shape)}, (B, H, N); got {tuple(initial_state.shape)}")
    if len(devices := {tensor.device for tensor in (u, delta, A, B, C)}) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(map(str, devices))}")
