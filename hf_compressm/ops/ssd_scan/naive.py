"""The scan of Mamba-2 in chunks, by matrix products: plain PyTorch, differentiable, in float64 if its inputs are.

Shapes: batch B, L steps in K chunks of T, G groups of J heads each, P channels of a head, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Output (B, L, H, P) and final state (B, H, P, N); arguments as in `ssd_scan`, dt being the time step itself."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    per_group, chunk = heads // groups, min(chunk_size, length)
    chunks = -(-length // chunk)

    def split(tensor: Tensor) -> Tensor:
        padding = (0, 0) * (tensor.ndim - 2) + (0, chunks * chunk - length)
        return F.pad(tensor, padding).unflatten(1, (chunks, chunk))

    # Padded steps have dt = 0: they neither decay nor drive the state.
    B, C = (split(tensor).transpose(2, 3) for tensor in (B, C))  # (B, K, G, T, N)
    drives = split(x * dt[..., None]).unflatten(3, (groups, per_group)).movedim(2, 4)  # (B, K, G, J, T, P)
    log_decay = split(dt * A).unflatten(3, (groups, per_group)).movedim(2, 4).cumsum(-1)  # (B, K, G, J, T)

    difference = log_decay[..., :, None] - log_decay[..., None, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    within = difference.masked_fill(later, -torch.inf).exp() * (C @ B.mT)[:, :, :, None]
    y = within @ drives

    end = log_decay[..., -1:]
    weighted = (drives * (end - log_decay).exp()[..., None]).movedim(3, 4).flatten(4)  # (B, K, G, T, J P)
    gained = B.mT @ weighted  # (B, K, G, N, J P)
    decay = end.exp().expand(*end.shape[:-1], width).flatten(3)[:, :, :, None]  # (B, K, G, 1, J P)
    state = gained.new_zeros(batch, groups, size, per_group * width)
    if initial_state is not None:
        state = initial_state.to(state.dtype).unflatten(1, (groups, per_group)).permute(0, 1, 4, 2, 3).flatten(3)
    before = []
    for gain, keep in zip(gained.unbind(1), decay.unbind(1), strict=True):
        before.append(state)
        state = keep * state + gain
    carried = (C @ torch.stack(before, dim=1)).unflatten(4, (per_group, width)).movedim(4, 3)  # (B, K, G, J, T, P)
    y = y + carried * log_decay.exp()[..., None]
    y = y.movedim(4, 2).reshape(batch, chunks * chunk, heads, width)[:, :length]
    final = state.unflatten(3, (per_group, width)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    return y, final
