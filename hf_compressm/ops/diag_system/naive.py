"""The diagonal system in plain PyTorch: differentiable, in float64 if its inputs are; the reference for kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..diag_scan.naive import naive_diag_scan


def naive_diag_system(
    u: Tensor, lam: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None = None,
    scan: Callable[..., tuple[Tensor, Tensor]] = naive_diag_scan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, H) and the final state (B, N); arguments and results as in `diag_system`.

    Args:
        scan: function (lam, inputs of the states (B, L, N), initial_state) -> (states, final state).

    Source: Orvieto et al. 2023, arXiv 2303.06349, section 3.
    """
    driven = F.linear(u, B).to(lam.real.dtype).unflatten(-1, (-1, 2))
    states, final = scan(lam, torch.view_as_complex(driven), initial_state)
    y = F.linear(torch.view_as_real(states).flatten(-2).to(u.dtype), C)
    return torch.addcmul(y, D.to(y.dtype), u.to(y.dtype)), final
