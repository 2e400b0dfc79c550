"""The state Gramian in plain PyTorch, summed step by step: the reference for kernels."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 16
"""Time steps whose decays are computed at once; memory is `CHUNK` times that of the states."""


@torch.no_grad()
def naive_state_gramian(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, weights: Tensor | None = None) -> Tensor:
    """float64 (G, N, N), the weighted sum of h_t h_t^T; arguments as in `state_gramian`.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3, for the states.
    """
    batch, length, channels = u.shape
    groups, size = B.shape[2:]
    A = A.float().reshape(groups, channels // groups, -1)
    state = u.new_zeros(batch, groups, channels // groups, size, dtype=torch.float32)
    total = u.new_zeros(groups, size, size, dtype=torch.float64)
    for start in range(0, length, CHUNK):
        window = slice(start, min(start + CHUNK, length))
        step = dt[:, window].float().transpose(0, 1).reshape(-1, batch, groups, channels // groups, 1)
        drive = step * u[:, window].float().transpose(0, 1).reshape(step.shape)
        decays = (step * A).exp()
        gathered = torch.zeros_like(total, dtype=torch.float32)
        for offset in range(len(step)):
            state.mul_(decays[offset]).addcmul_(drive[offset], B[:, start + offset, :, None].float())
            counted = state if weights is None else state * weights[:, start + offset, None, None, None].float()
            rows, counted = (part.transpose(0, 1).reshape(groups, -1, size) for part in (state, counted))
            gathered.baddbmm_(counted.mT, rows)
        total += gathered
    return total
