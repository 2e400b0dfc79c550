"""One token of the gated delta rule, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_devices, check_real
from .op import check_keys


@torch.no_grad()
def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    erase: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One token of `gated_delta_scan`; updates `state` in place.

    Args:
        q, k, erase: (B, G, K), the latter None for k. v: (B, H, V). g: (B, H) or (B, H, K). beta: (B, H).
        state: (B, H, K, V), float32 or float64, any strides.
        scale: of the output; K**-0.5 if None.

    Returns:
        o (B, H, V) in v's dtype. Sums are in the dtype of the state.

    Raises:
        ValueError: if a shape, dtype or device does not fit.

    Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10.
    """
    _check(q, k, v, g, beta, state, erase)
    scale = k.shape[2] ** -0.5 if scale is None else float(scale)
    dtype, erase = state.dtype, k if erase is None else erase
    like, per_group = v, v.shape[1] // k.shape[1]
    q, k, v, g, beta, erase = (tensor.to(dtype) for tensor in (q, k, v, g, beta, erase))
    by_group = state.unflatten(1, (-1, per_group))
    q, k, erase = (tensor[:, :, None, :, None] for tensor in (q, k, erase))
    decay = g.exp().unflatten(1, (-1, per_group))
    by_group.mul_(decay[..., None] if g.ndim == 3 else decay[..., None, None])
    error = v.unflatten(1, (-1, per_group)) - (by_group * erase).sum(3)
    by_group.addcmul_(k, (beta.unflatten(1, (-1, per_group))[..., None] * error)[..., None, :])
    return (scale * (by_group * q).sum(3)).reshape(like.shape).to(like.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, erase: Tensor | None) -> None:
    check_keys(q, k, erase, v, 3)
    (batch, heads, width), channels = v.shape, k.shape[2]
    if state.shape != (batch, heads, channels, width) or state.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"state must be float32 or float64 {(batch, heads, channels, width)}, (B, H, K, V); got {state.dtype} "
            f"{tuple(state.shape)}. A cache from before a cut does not fit the model after it"
        )
    if g.shape not in ((batch, heads), (batch, heads, channels)) or beta.shape != (batch, heads):
        raise ValueError(
            f"g must be {(batch, heads)} or {(batch, heads, channels)} and beta {(batch, heads)}; got {tuple(g.shape)} "
            f"and {tuple(beta.shape)}"
        )
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state, "erase": erase}
    check_real(**tensors)
    check_devices(**tensors)
