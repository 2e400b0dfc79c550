"""The diagonal scan alone: checks, custom ops and the choice of the backend."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..backends import choose_backend
from .naive import naive_diag_scan


def diag_scan(
    lam: Tensor, u: Tensor, initial_state: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Diagonal complex linear recurrence over time, differentiable once in all its arguments.

    h_k = lam * h_{k-1} + u_k for k = 0 .. L-1, with h_{-1} = initial_state.

    Args:
        lam: (N,) complex64 or complex128, the poles; any modulus, |lam| < 1 for a stable system.
        u: (B, L, N), dtype and device of `lam`, B, L >= 1, any strides: what enters each state.
        initial_state: (B, N), dtype and device of `lam`; zero if None.
        backend: "naive", "cpu" (Numba) or "triton"; by device if None. The environment variable
            HF_COMPRESSM_DIAG_SCAN forces one as well.

    Returns:
        states (B, L, N), where states[:, k] = h_k includes u_k, and the final state h_{L-1} (B, N).

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend cannot run; the message says which.
        RuntimeError: if gradients of gradients are asked for, except of the naive backend.
    """
    _check(lam, u, initial_state)
    backend = choose_backend("diag_scan", backend, u.device.type)
    if backend == "naive":
        return naive_diag_scan(lam, u, initial_state)
    return _scan(lam, u, initial_state, backend)


@torch.library.custom_op("hf_compressm::diag_scan", mutates_args=())
def _scan(lam: Tensor, u: Tensor, initial_state: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    kernels: Any = importlib.import_module(f".{backend}", __package__)
    return kernels.scan_forward(lam, u, initial_state)


@_scan.register_fake
def _(lam: Tensor, u: Tensor, initial_state: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape[0], u.shape[2])


@torch.library.custom_op("hf_compressm::diag_scan_backward", mutates_args=())
def _scan_backward(
    lam: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    dstates: Tensor | None,
    dfinal: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels: Any = importlib.import_module(f".{backend}", __package__)
    return kernels.scan_backward(lam, states, initial_state, dstates, dfinal)


@_scan_backward.register_fake
def _(
    lam: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    dstates: Tensor | None,
    dfinal: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return lam.new_empty(lam.shape), lam.new_empty(states.shape), lam.new_empty(states.shape[0], states.shape[2])


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    lam, _, initial_state, ctx.backend = inputs
    ctx.save_for_backward(lam, output[0], initial_state)


def _differentiate(ctx: Any, dstates: Tensor | None, dfinal: Tensor | None) -> tuple:
    dlam, du, dinitial = _scan_backward(*ctx.saved_tensors, dstates, dfinal, ctx.backend)
    return dlam, du, dinitial if ctx.needs_input_grad[2] else None, None


_scan.register_autograd(_differentiate, setup_context=_save)


def _check(lam: Tensor, u: Tensor, initial_state: Tensor | None) -> None:
    if lam.dtype not in (torch.complex64, torch.complex128):
        raise ValueError(f"lam must be complex64 or complex128, got {lam.dtype}")
    if lam.ndim != 1 or lam.numel() == 0:
        raise ValueError(f"lam must have shape (N,) with N >= 1, got {tuple(lam.shape)}")
    if u.ndim != 3 or u.shape[2] != lam.shape[0] or u.numel() == 0:
        raise ValueError(
            f"u must have shape (B, L, N) with B, L >= 1 and N = {lam.shape[0]} as in lam, got {tuple(u.shape)}"
        )
    expected = (u.shape[0], u.shape[2])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must have shape (B, N) = {expected} as in u, got {tuple(initial_state.shape)}")
    for name, tensor in (("u", u), ("initial_state", initial_state)):
        if tensor is not None and (tensor.dtype != lam.dtype or tensor.device != lam.device):
            raise ValueError(
                f"{name} must have lam's dtype and device, {lam.dtype} on {lam.device}; got {tensor.dtype} "
                f"on {tensor.device}"
            )
