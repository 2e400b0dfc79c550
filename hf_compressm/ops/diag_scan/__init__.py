"""Diagonal complex scan: h_k = lam * h_{k-1} + u_k."""

from __future__ import annotations

import torch
from torch import Tensor

from .loop import loop_diag_scan
from .naive import naive_diag_scan

__all__ = ["diag_scan", "loop_diag_scan", "naive_diag_scan"]


def diag_scan(lam: Tensor, u: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Diagonal complex linear recurrence over time, differentiable once in all its arguments.

    h_k = lam * h_{k-1} + u_k for k = 0 .. L-1, with h_{-1} = initial_state.

    Args:
        lam: (N,) complex64 or complex128, the poles; any modulus, |lam| < 1 for a stable system.
        u: (B, L, N), dtype and device of `lam`, B, L >= 1, any strides: what enters each state.
        initial_state: (B, N), dtype and device of `lam`; zero if None.

    Returns:
        states (B, L, N), where states[:, k] = h_k includes u_k, and the final state h_{L-1} (B, N).

    Raises:
        ValueError: if a shape, dtype or device does not fit; the message says which.
        RuntimeError: if gradients of gradients are asked for.
    """
    _check(lam, u, initial_state)
    return loop_diag_scan(lam, u, initial_state)


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
