"""The gated delta rule token by token: plain PyTorch, differentiable, in float64 if its inputs are.

Shapes: batch B, length L, G key heads, H value heads, K key channels, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_gated_delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    erase: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, L, H, V) and final state (B, H, K, V); arguments as in `gated_delta_scan`.

    Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    bounds = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    tensors = [tensor.to(dtype) for tensor in (q, k, v, g, beta, k if erase is None else erase)]
    outputs, finals = [], []
    for sequence, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        part = [tensor[:, begin:end] for tensor in tensors]
        state = None if initial_state is None else initial_state.to(dtype)
        if state is not None and cu_seqlens is not None:
            state = state[sequence : sequence + 1]
        for t in range(end - begin):
            token = [tensor[:, t] for tensor in part]
            output, state = _step(scale, state, *token)
            outputs.append(output)
        empty = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3], dtype=dtype)
        finals.append(empty if state is None else state)
    return torch.stack(outputs, 1).to(v.dtype), torch.cat(finals)


def naive_gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    erase: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, V) of one token and the next state (B, H, K, V); arguments as in `gated_delta_step`.

    Here `state` is left as it is; None is a state of zeros.

    Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10.
    """
    return _step(scale, state, q, k, v, g, beta, k if erase is None else erase)


def _step(
    scale: float | None, state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, erase: Tensor
) -> tuple[Tensor, Tensor]:
    per_group = v.shape[1] // k.shape[1]
    q, k, erase = (tensor.repeat_interleave(per_group, 1) for tensor in (q, k, erase))
    scale = k.shape[2] ** -0.5 if scale is None else scale
    decay = g.exp()[..., None] if g.ndim == 3 else g.exp()[..., None, None]
    if state is None:
        state = v.new_zeros(*k.shape, v.shape[2])
    state = decay * state
    error = v - torch.einsum("bhkv,bhk->bhv", state, erase)
    state = state + k[..., None] * (beta[..., None] * error)[:, :, None]
    return scale * torch.einsum("bhkv,bhk->bhv", state, q), state


@torch.no_grad()
def naive_delta_state_gramian(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, weights: Tensor, *, erase: Tensor | None = None
) -> Tensor:
    """The Gramian (G, K, K), float64; arguments as in `delta_state_gramian`.

    Source: Antoulas 2005, Approximation of Large-Scale Dynamical Systems, section 4.3: Gramians as sums of x x^T.
    """
    groups, size = k.shape[2:]
    k, v, g, beta, weights = (tensor.double() for tensor in (k, v, g, beta, weights))
    erase = None if erase is None else erase.double()
    total, state = k.new_zeros(groups, size, size), None
    for t in range(k.shape[1]):
        now = None if erase is None else erase[:, t]
        _, state = naive_gated_delta_step(k[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state, erase=now)
        by_group = state.unflatten(1, (groups, -1))
        total += torch.einsum("b,bgjkv,bgjlv->gkl", weights[:, t], by_group, by_group)
    return total
