"""Mamba's selective scan, with cost in proportion to the number of states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import BACKENDS, choose_backend
from .naive import naive_selective_scan, step_sizes
from .op import scan

__all__ = ["naive_selective_scan", "selective_scan", "selective_state_update"]

AVAILABLE = (*BACKENDS, "mamba_ssm")


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
        backend: "naive", "cpu" (Numba), "triton" or, where installed, "mamba_ssm"; chosen by device if None. The
            environment variable HF_COMPRESSM_SELECTIVE_SCAN forces one as well.

    Returns:
        y (B, L, H) in u's dtype; with `return_final_state` also h_{L-1} (B, H, N), in float32, or float64 if u is.
        All arithmetic is in the latter precision.

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend is unknown or cannot run here.
        RuntimeError: if gradients of gradients are asked for, except of the naive backend.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    backend = choose_backend("selective_scan", backend, u.device.type, AVAILABLE)
    if backend == "naive":
        y, final = naive_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    elif backend == "mamba_ssm":
        if initial_state is not None or return_final_state or A.shape[1] > 256 or u.dtype == torch.float64:
            raise ValueError(
                "the backend 'mamba_ssm' of selective_scan runs without initial_state, return_final_state and float64 "
                f"and with at most 256 states, here {A.shape[1]}; use the backend 'triton'"
            )
        return _mamba_ssm(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        y, final, _ = scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, backend)
    return (y, final) if return_final_state else y


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
    dtype = state.dtype
    dt, wide = step_sizes(delta.to(dtype), delta_bias, delta_softplus), u.to(dtype)
    state.mul_((dt[..., None] * A.to(dtype)).exp_()).addcmul_((dt * wide)[..., None], B.to(dtype)[:, None])
    # At every size faster than a product of matrices, which copies.
    y = torch.linalg.vecdot(state, C.to(dtype)[:, None])
    y = y if D is None else torch.addcmul(y, wide, D.to(dtype))
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def _mamba_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C = (tensor.to(u.dtype).transpose(1, 2) for tensor in (u, delta, B, C))
    z = None if z is None else z.to(u.dtype).transpose(1, 2)
    D, delta_bias = (None if tensor is None else tensor.float() for tensor in (D, delta_bias))
    return selective_scan_fn(u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus).transpose(1, 2)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if u.ndim != 3 or u.numel() == 0:
        raise ValueError(f"u must have shape (B, L, H) with B, L, H >= 1; got {tuple(u.shape)}")
    batch, length, channels = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.numel() == 0:
        raise ValueError(f"A must have shape (H, N) with H = {channels} as in u and N >= 1; got {tuple(A.shape)}")
    size = A.shape[1]
    given = {"delta": delta, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state}
    expected = {
        "delta": ("(B, L, H)", (batch, length, channels)),
        "B": ("(B, L, N)", (batch, length, size)),
        "C": ("(B, L, N)", (batch, length, size)),
        "D": ("(H,)", (channels,)),
        "z": ("(B, L, H)", (batch, length, channels)),
        "delta_bias": ("(H,)", (channels,)),
        "initial_state": ("(B, H, N)", (batch, channels, size)),
    }
    for name, tensor in given.items():
        letters, shape = expected[name]
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, {letters}, as in u and A; got {tuple(tensor.shape)}")
    for name, tensor in {"u": u, "A": A, **given}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a real floating-point dtype, got {tensor.dtype}")
        if tensor is not None and tensor.device != u.device:
            raise ValueError(f"all tensors must be on one device; u is on {u.device}, {name} on {tensor.device}")
