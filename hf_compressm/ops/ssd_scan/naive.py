"""Mamba-2's scan in plain PyTorch, in chunks, by matrix products: the reference for kernels.

It is differentiable, and runs in float64 if its inputs are.

Shapes: batch B, L steps in K chunks of T, G groups of J heads each, P channels of a head, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..exporting import scan_over_blocks

Limits = tuple[float, float]
LONGEST_CHUNK_IN_GRAPHS = 64
"""A graph for every length treats full chunks only, so that a short input would pay for a long one."""


def time_steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: Limits) -> Tensor:
    """The time steps that the scan runs with, from dt (..., H) and dt_bias (H,); dt's shape and dtype.

    Source: Dao and Gu 2024, arXiv 2405.21060, section 7.
    """
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    return dt if dt_softplus and dt_limit == (0.0, float("inf")) else dt.clamp(*dt_limit)


def time_steps_backward(
    grad: Tensor, dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: Limits
) -> Tensor:
    """The gradient of dt + dt_bias (..., H) from that of `time_steps`, `grad` (..., H); other arguments as there.

    Source: the derivative of `time_steps`.
    """
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    step = F.softplus(dt) if dt_softplus else dt
    grad = grad * ((step >= dt_limit[0]) & (step <= dt_limit[1]))
    return grad * dt.sigmoid() if dt_softplus else grad


def naive_ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: Limits = (0.0, float("inf")), initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, H, P) in x's dtype and the final state (B, H, P, N); arguments as in `ssd_scan`.

    Source: Dao and Gu 2024, arXiv 2405.21060, section 6.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = time_steps(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    wide, A, B, C = (tensor.to(dtype) for tensor in (x, A, B, C))
    scan = _scan_for_any_length if torch.compiler.is_exporting() else _scan_in_chunks
    y, final = scan(wide, step, A, B, C, initial_state, chunk_size)
    return (y if D is None else y + wide * D.to(dtype)[:, None]).to(x.dtype), final


def _scan_in_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The scan without the direct term, `dt` being the time step itself."""
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


def _scan_for_any_length(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """As `_scan_in_chunks`, for graphs: chunk by chunk, all of full size."""
    size = min(chunk_size, LONGEST_CHUNK_IN_GRAPHS)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3]) if initial_state is None else initial_state.to(x.dtype)

    def step(state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, ...]:
        y, state = _scan_in_chunks(x, dt, A, B, C, state, size)
        return state.clone(), y.clone()

    final, y = scan_over_blocks(step, [state], (x, dt, B, C), [A], size)
    return y, final
