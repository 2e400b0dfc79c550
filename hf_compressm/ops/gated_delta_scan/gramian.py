"""The Gramian of matrix-valued states: sums of S_t S_t^T in chunks, without storing the states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_devices, check_real
from .chunks import CHUNK, CHUNK_PER_CHANNEL, advance, chunk_layout, pair_decays, prepare
from .op import check_keys


@torch.no_grad()
def delta_state_gramian(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, weights: Tensor, *, erase: Tensor | None = None
) -> Tensor:
    """Weighted sum of S_t S_t^T of `gated_delta_scan` from a state of zero, for each key head.

    Sums go over batch, tokens, value columns and the value heads of a key head. The result has no gradient. Memory does
    not hold states, and chunks without weights cost only their recurrence.

    Args:
        k, v, g, beta, erase: as in `gated_delta_scan`.
        weights: (B, L), >= 0: how often S_t S_t^T counts.

    Returns:
        float64 (G, K, K), accumulated in float32 (float64 if v is) within a chunk and in float64 over chunks.

    Raises:
        ValueError: if a shape, dtype or device does not fit.

    Source: Antoulas 2005, Approximation of Large-Scale Dynamical Systems, section 4.3: Gramians as sums of x x^T; in
    chunks as in Yang et al. 2024, arXiv 2406.06484, section 3.
    """
    _check(k, v, g, beta, weights, erase)
    dtype = torch.promote_types(v.dtype, torch.float32)
    (batch, length, heads, width), (groups, channels) = v.shape, k.shape[2:]
    layout = chunk_layout(length, None, min(CHUNK if g.ndim == 3 else CHUNK_PER_CHANNEL, length))
    wanted = (weights != 0).any(0)
    keys, eraser = (
        layout.split(tensor.to(dtype).repeat_interleave(heads // groups, 2))
        for tensor in (k, k if erase is None else erase)
    )
    v, g, beta = (layout.split(tensor.to(dtype)) for tensor in (v, g, beta))
    weights = layout.split(weights.to(dtype)[..., None].expand(-1, -1, heads))
    chunk = prepare(keys, keys, eraser, g, 1.0)
    total = keys.new_zeros(batch * heads, channels, channels, dtype=torch.float64)
    state = keys.new_zeros(batch * heads, channels, width)
    for n in range(len(v)):
        found, after = advance(chunk, v, beta, n, state)
        if wanted[n * layout.chunk : (n + 1) * layout.chunk].any():
            total += _of_chunk(keys[n], g[n], found * beta[n, ..., None], weights[n], state)
        state = after
    return total.unflatten(0, (batch, groups, -1)).sum((0, 2))


def _of_chunk(k: Tensor, g: Tensor, written: Tensor, weights: Tensor, state: Tensor) -> Tensor:
    """Sum over a chunk (M, K, K), from k (M, C, K), g (M, C) or (M, C, K), U (M, C, V), (M, C) and the state before."""
    if g.ndim == 3:
        sums, total = g.cumsum(1), k.new_zeros(*k.shape[::2], k.shape[2])
        for t in range(k.shape[1]):
            keys = k[:, : t + 1] * (sums[:, t : t + 1] - sums[:, : t + 1]).exp()
            now = torch.baddbmm(sums[:, t, :, None].exp() * state, keys.mT, written[:, : t + 1])
            total = total + weights[:, t, None, None] * (now @ now.mT)
        return total
    sums = g[..., None].cumsum(1)
    decays, start = pair_decays(sums[None])[0], sums[..., 0].exp()
    crossed = decays.mT @ (weights * start)[..., None]
    cross = (state @ written.mT) @ (crossed * k)
    pairs = (written @ written.mT) * (decays.mT @ (weights[..., None] * decays))
    own = (weights * start.square()).sum(1)[:, None, None] * (state @ state.mT)
    return own + cross + cross.mT + k.mT @ pairs @ k


def _check(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, weights: Tensor, erase: Tensor | None) -> None:
    check_keys(None, k, erase, v, 4)
    if g.shape not in (v.shape[:3], (*v.shape[:3], k.shape[3])) or beta.shape != v.shape[:3]:
        raise ValueError(
            f"g must be {tuple(v.shape[:3])} or {(*v.shape[:3], k.shape[3])} and beta {tuple(v.shape[:3])}; got "
            f"{tuple(g.shape)} and {tuple(beta.shape)}"
        )
    if weights.shape != v.shape[:2]:
        raise ValueError(f"weights must be {tuple(v.shape[:2])}, (B, L) as in v; got {tuple(weights.shape)}")
    tensors = {"k": k, "v": v, "g": g, "beta": beta, "erase": erase, "weights": weights}
    check_real(**tensors)
    check_devices(**tensors)
