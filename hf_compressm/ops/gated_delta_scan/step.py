"""One token of the gated delta rule, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose_backend
from ..checks import check_devices, check_real
from .op import check_keys


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
    """One token of `gated_delta_scan`; updates `state` in place. Nothing has a gradient.

    By Numba where the state is contiguous and on the CPU, else by PyTorch; the environment variable
    HF_COMPRESSM_GATED_DELTA_STEP sets "cpu" or "naive".

    Args:
        q, k, erase: (B, G, K), the latter None for k. v: (B, H, V). g: (B, H) or (B, H, K). beta: (B, H).
        state: (B, H, K, V), float32 or float64, any strides.
        scale: of the output; K**-0.5 if None.

    Returns:
        o (B, H, V) in v's dtype. Sums are in the dtype of the state.

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend that the variable sets cannot run.

    Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10.
    """
    _check(q, k, v, g, beta, state, erase)
    scale = k.shape[2] ** -0.5 if scale is None else float(scale)
    erase = k if erase is None else erase
    if state.is_contiguous() and not torch.compiler.is_compiling() and _on_cpu(state):
        from .cpu import step

        return step(scale, state, q, k, erase, v, g, beta)
    decays = g if g.ndim == 3 else g[..., None]
    wide = [tensor.detach().to(state.dtype) for tensor in (q, k, erase, v, decays, beta)]
    return _step(scale, state.detach(), *wide).to(v.dtype)


def _on_cpu(state: Tensor) -> bool:
    return choose_backend("gated_delta_step", None, state.device.type, ("naive", "cpu")) == "cpu"


def _step(scale: float, state: Tensor, q: Tensor, k: Tensor, e: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """As `step` of the CPU, with tensors of any strides, in the dtype of the state, and g (B, H, 1 or K)."""
    groups = k.shape[1]
    states = state.unflatten(1, (groups, -1))
    v, decay, beta = (tensor.unflatten(1, (groups, -1)) for tensor in (v, g.exp(), beta[..., None]))
    q, k, e = (tensor[:, :, None, :, None] for tensor in (q, k, e))
    states.mul_(decay[..., None])
    states.addcmul_(k, (beta * (v - (states * e).sum(3)))[..., None, :])
    return (scale * (states * q).sum(3)).flatten(1, 2)


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
    others = [q, k, v, g, beta] if erase is None else [q, k, v, g, beta, erase]
    # Quick, since a token takes some dozen microseconds.
    if any(tensor.dtype != state.dtype or tensor.device != state.device for tensor in others):
        tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state, "erase": erase}
        check_real(**tensors)
        check_devices(**tensors)
