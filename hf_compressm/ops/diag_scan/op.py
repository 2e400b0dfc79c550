"""The diagonal scan: checks, custom ops and the choice of the backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose_backend, kernels
from ..checks import check_devices
from ..custom_ops import custom_op, empty_gradients, fitted_gradients, register_gradient
from .naive import naive_diag_scan


def diag_scan(
    lam: Tensor, u: Tensor, initial_state: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Diagonal complex linear recurrence over time, differentiable once in all its tensors.

    h_k = lam * h_{k-1} + u_k for k = 0 .. L-1, with h_{-1} = initial_state.

    Args:
        lam: (N,) complex64 or complex128, the poles; any modulus, |lam| < 1 for a stable system.
        u: (B, L, N), dtype and device of `lam`, B, L >= 1, any strides: the input of each state.
        initial_state: (B, N), dtype and device of `lam`; zero if None.
        backend: "naive", "cpu" (Numba) or "triton"; chosen by device if None. The environment variable
            HF_COMPRESSM_DIAG_SCAN sets one too.

    Returns:
        states (B, L, N), where states[:, k] = h_k includes u_k, and the final state h_{L-1} (B, N).

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend is unknown or cannot run.
        RuntimeError: if gradients of gradients are asked for, except of the naive backend.

    Source: Orvieto et al. 2023, arXiv 2303.06349, section 3.
    """
    _check(lam, u, initial_state)
    backend = choose_backend("diag_scan", backend, u.device.type)
    if backend == "naive":
        return naive_diag_scan(lam, u, initial_state)
    return _scan(lam, u, initial_state, backend)


def check_poles(lam: Tensor) -> None:
    """Check that poles are (N,), N >= 1, of a complex dtype.

    Raises:
        ValueError: if they are not.
    """
    if lam.dtype not in (torch.complex64, torch.complex128):
        raise ValueError(f"lam must be complex64 or complex128, got {lam.dtype}")
    if lam.ndim != 1 or lam.numel() == 0:
        raise ValueError(f"lam must have shape (N,) with N >= 1, got {tuple(lam.shape)}")


def _check(lam: Tensor, u: Tensor, initial_state: Tensor | None) -> None:
    check_poles(lam)
    if u.ndim != 3 or u.shape[2] != lam.shape[0] or u.numel() == 0:
        raise ValueError(
            f"u must have shape (B, L, N) with B, L >= 1 and N = {lam.shape[0]} as in lam, got {tuple(u.shape)}"
        )
    expected = (u.shape[0], u.shape[2])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must have shape (B, N) = {expected} as in u, got {tuple(initial_state.shape)}")
    for name, tensor in (("u", u), ("initial_state", initial_state)):
        if tensor is not None and tensor.dtype != lam.dtype:
            raise ValueError(f"{name} must have lam's dtype {lam.dtype}, got {tensor.dtype}")
    check_devices(lam=lam, u=u, initial_state=initial_state)


class Inputs(NamedTuple):
    """Arguments of the custom op, as in `diag_scan`."""

    lam: Tensor
    u: Tensor
    initial_state: Tensor | None
    backend: str


class Gradients(NamedTuple):
    """Gradients of the states (B, L, N) and of the final state (B, N)."""

    dstates: Tensor | None
    dfinal: Tensor | None


class Saved(NamedTuple):
    """What the backward pass needs: the states (B, L, N) rather than u."""

    lam: Tensor
    states: Tensor
    initial_state: Tensor | None
    backend: str


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor]:
    u = inputs.u
    return u.new_empty(u.shape), u.new_empty(u.shape[0], u.shape[2])


@custom_op("diag_scan", Inputs, returns=2, fake=_fake)
def _scan(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return kernels(__package__, inputs.backend).forward(inputs)


@custom_op("diag_scan_backward", Gradients, Saved, returns=3, fake=lambda _, saved: empty_gradients(saved[:3]))
def _scan_backward(gradients: Gradients, saved: Saved) -> tuple[Tensor, ...]:
    return fitted_gradients(kernels(__package__, saved.backend).backward(gradients, saved), saved[:3])


def _saved(inputs: Inputs, outputs: tuple[Tensor, ...]) -> Saved:
    return Saved(inputs.lam, outputs[0], inputs.initial_state, inputs.backend)


register_gradient(_scan, _scan_backward, Inputs, _saved, outputs=2)
