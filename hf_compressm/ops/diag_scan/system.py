"""The diagonal scan with what stands around it in a layer: input projection, read-out and direct term."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose_backend
from .scan import diag_scan

CHUNK = 512
"""Most time steps that the CPU's op takes at once."""
RECOMPUTE_UP_TO = 64
"""Features H up to which the backward pass computes the states again from those at each chunk's start: products with
so few features cost less than writing and reading all states."""


def diag_system(
    u: Tensor,
    lam: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Diagonal linear system with many inputs and outputs, in real form; differentiable once in all its tensors.

    h_k = lam * h_{k-1} + B u_k and y_k = Re(C h_k) + D u_k. On the CPU the states pass through its caches only, and
    training keeps all of them, or, for H <= 64, those at every 512th step at most. On other devices they are stored,
    twice in training: the products are the device library's, whose speed a fused kernel would not reach.

    Args:
        u: (B, L, H), floating, B, L, H >= 1, any strides.
        lam: (N,) complex64 or complex128, the poles.
        B: (2 N, H), rows of the real and imaginary parts of the input map, alternating; u's dtype.
        C: (H, 2 N), columns of the read-out's real and negative imaginary parts, alternating; u's dtype.
        D: (H,), u's dtype.
        initial_state: (B, N), dtype of `lam`; zero if None.
        backend: as in `diag_scan`.

    Returns:
        y (B, L, H), in u's dtype, and the final state h_{L-1} (B, N), in lam's. Under autocast the products, and y,
        have autocast's dtype.

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend cannot run.
    """
    _check(u, lam, B, C, D, initial_state)
    backend = choose_backend("diag_scan", backend, u.device.type)
    if backend != "cpu":
        driven = F.linear(u, B).to(lam.real.dtype).unflatten(-1, (-1, 2))
        states, final = diag_scan(lam, torch.view_as_complex(driven), initial_state, backend)
        y = F.linear(torch.view_as_real(states).flatten(-2).to(u.dtype), C)
        return torch.addcmul(y, D.to(y.dtype), u.to(y.dtype)), final
    if torch.is_autocast_enabled("cpu") and u.dtype != torch.float64:
        u, B, C, D = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (u, B, C, D))
    tensors = (u, lam, B, C, D, initial_state)
    keep = "nothing"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        keep = "checkpoints" if u.shape[2] <= RECOMPUTE_UP_TO else "states"
    y, final, _ = _system(*tensors, keep)
    return y, final


@torch.library.custom_op("hf_compressm::diag_system", mutates_args=())
def _system(
    u: Tensor, lam: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None, keep: str
) -> tuple[Tensor, Tensor, Tensor]:
    from .cpu_system import system_forward

    return system_forward(u, lam, B, C, D, initial_state, keep, CHUNK)


@_system.register_fake
def _(
    u: Tensor, lam: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None, keep: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _ = u.shape
    N = lam.shape[0]
    shape = {"states": (batch, length, N, 2), "checkpoints": (-(-length // CHUNK), batch, N, 2), "nothing": (0,)}
    kept = torch.empty(shape[keep], dtype=lam.real.dtype, device=u.device)
    return u.new_empty(u.shape), lam.new_empty(batch, N), kept


@torch.library.custom_op("hf_compressm::diag_system_backward", mutates_args=())
def _system_backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    u: Tensor,
    lam: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    kept: Tensor,
    keep: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .cpu_system import system_backward

    return system_backward(dy, dfinal, u, lam, B, C, D, initial_state, kept, keep, CHUNK)


@_system_backward.register_fake
def _(
    dy: Tensor | None,
    dfinal: Tensor | None,
    u: Tensor,
    lam: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    kept: Tensor,
    keep: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, dlam, dB, dC, dD = (x.new_empty(x.shape) for x in (u, lam, B, C, D))
    return du, dlam, dB, dC, dD, lam.new_empty(u.shape[0], lam.shape[0])


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.keep = inputs[6]


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, dkept: Tensor | None) -> tuple:
    *gradients, dinitial = _system_backward(dy, dfinal, *ctx.saved_tensors, ctx.keep)
    return (*gradients, dinitial if ctx.needs_input_grad[5] else None, None)


_system.register_autograd(_differentiate, setup_context=_save)


def _check(u: Tensor, lam: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None) -> None:
    if lam.dtype not in (torch.complex64, torch.complex128):
        raise ValueError(f"lam must be complex64 or complex128, got {lam.dtype}")
    if lam.ndim != 1 or lam.numel() == 0:
        raise ValueError(f"lam must have shape (N,) with N >= 1, got {tuple(lam.shape)}")
    if u.ndim != 3 or u.numel() == 0:
        raise ValueError(f"u must have shape (B, L, H) with B, L, H >= 1, got {tuple(u.shape)}")
    batch, _, H = u.shape
    N = lam.shape[0]
    for name, tensor, shape in (("B", B, (2 * N, H)), ("C", C, (H, 2 * N)), ("D", D, (H,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for N = {N} and H = {H}, got {tuple(tensor.shape)}")
        if tensor.dtype != u.dtype:
            raise ValueError(f"{name} must have u's dtype {u.dtype}, got {tensor.dtype}")
    if initial_state is not None and initial_state.shape != (batch, N):
        raise ValueError(f"initial_state must have shape (B, N) = {(batch, N)}, got {tuple(initial_state.shape)}")
    if initial_state is not None and initial_state.dtype != lam.dtype:
        raise ValueError(f"initial_state must have lam's dtype {lam.dtype}, got {initial_state.dtype}")
    if len(devices := {x.device for x in (u, lam, B, C, D, initial_state) if x is not None}) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
