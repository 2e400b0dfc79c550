"""The diagonal system: checks, custom ops and the choice of the backend."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose_backend
from ..checks import check_devices
from ..custom_ops import custom_op, empty_gradients, fitted_gradients, register_gradient
from ..diag_scan.op import check_poles, diag_scan
from .naive import naive_diag_system

RECOMPUTE_UP_TO = 64
"""Features H up to which the backward pass computes the states again from those at the start of each chunk: with so
few features the products cost less than writing and reading all states."""


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

    h_k = lam * h_{k-1} + B u_k and y_k = Re(C h_k) + D u_k. On the CPU the states stay in the caches: training stores
    all of them or, for H <= 64, those at every 512th step. On other devices the states are stored, and in training
    twice: the products are the device library's, since a fused kernel would be slower.

    Args:
        u: (B, L, H), floating, B, L, H >= 1, any strides.
        lam: (N,) complex64 or complex128, the poles; |lam| < 1 for a stable system.
        B: (2 N, H), rows of the real and imaginary parts of the input map, alternating; u's dtype.
        C: (H, 2 N), columns of the read-out's real and negative imaginary parts, alternating; u's dtype.
        D: (H,), u's dtype.
        initial_state: (B, N), dtype of `lam`; zero if None.
        backend: as in `diag_scan`.

    Returns:
        y (B, L, H), in u's dtype, and the final state h_{L-1} (B, N), in lam's. Under autocast the products, and y,
        have autocast's dtype.

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend is unknown or cannot run.
        RuntimeError: if gradients of gradients are asked for, except of the naive backend.

    Source: Orvieto et al. 2023, arXiv 2303.06349, section 3.
    """
    _check(u, lam, B, C, D, initial_state)
    backend = choose_backend("diag_scan", backend, u.device.type)
    if backend != "cpu":
        return naive_diag_system(u, lam, B, C, D, initial_state, partial(diag_scan, backend=backend))
    if torch.is_autocast_enabled("cpu") and u.dtype != torch.float64:
        u, B, C, D = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (u, B, C, D))
    tensors = (u, lam, B, C, D, initial_state)
    keep = "nothing"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        keep = "checkpoints" if u.shape[2] <= RECOMPUTE_UP_TO else "states"
    y, final, _ = _system(*tensors, keep)
    return y, final


def _check(u: Tensor, lam: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None) -> None:
    check_poles(lam)
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
    check_devices(u=u, lam=lam, B=B, C=C, D=D, initial_state=initial_state)


class Inputs(NamedTuple):
    """Arguments of the custom op, as in `diag_system`, and what it keeps for the backward pass.

    `keep` is "states" for all states (B, L, N, 2), "checkpoints" for those before each of K spans of time
    (K, B, N, 2), or "nothing".
    """

    u: Tensor
    lam: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    initial_state: Tensor | None
    keep: str


class Gradients(NamedTuple):
    """Gradients of y (B, L, H) and of the final state (B, N), and what the forward pass kept."""

    dy: Tensor | None
    dfinal: Tensor | None
    kept: Tensor


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    from .cpu import kept_shape

    u, lam = inputs[:2]
    kept = u.new_empty(kept_shape(inputs), dtype=lam.real.dtype)
    return u.new_empty(u.shape), lam.new_empty(u.shape[0], lam.shape[0]), kept


def _fake_backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    lam = inputs.lam
    return (*empty_gradients(inputs[:5]), lam.new_empty(inputs.u.shape[0], lam.shape[0]))


@custom_op("diag_system", Inputs, returns=3, fake=_fake)
def _system(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    from .cpu import forward

    return forward(inputs)


@custom_op("diag_system_backward", Gradients, Inputs, returns=6, fake=_fake_backward)
def _system_backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    from .cpu import backward

    *found, dinitial = backward(gradients, inputs)
    return *fitted_gradients(found, inputs[:5]), dinitial


def _saved(inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple:
    return outputs[2], *inputs


register_gradient(_system, _system_backward, Inputs, _saved, outputs=2)
