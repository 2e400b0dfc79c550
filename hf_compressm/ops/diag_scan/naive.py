"""The diagonal scan in plain PyTorch: differentiable, in float64 if its inputs are; the reference for kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exporting import scan_over_time


def naive_diag_scan(lam: Tensor, u: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Diagonal complex linear recurrence, one Python step per time step.

    h_k = lam * h_{k-1} + u_k for k = 0 .. L-1, with h_{-1} = initial_state.

    Args:
        lam: (N,) complex64 or complex128, the poles; any modulus.
        u: (B, L, N), the dtype of `lam`, L >= 1: the input of each state.
        initial_state: (B, N), the dtype of `lam`; zero if None.

    Returns:
        states (B, L, N), where states[:, k] = h_k includes u_k, and the final state h_{L-1} (B, N).

    Source: Orvieto et al. 2023, arXiv 2303.06349, section 3.
    """
    state = torch.zeros_like(u[:, 0]) if initial_state is None else initial_state
    if torch.compiler.is_exporting():
        last, every = scan_over_time(_next_state, [state], [u], [lam])
        return every, last
    states = []
    # unbind, not u[:, k]: the backward of each indexing would fill a tensor of u's full size.
    for step in u.unbind(1):
        state = lam * state + step
        states.append(state)
    return torch.stack(states, 1), state


def _next_state(state: Tensor, u: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    state = lam * state + u
    return state, state.clone()
