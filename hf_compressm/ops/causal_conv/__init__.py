"""Depthwise causal convolution with SiLU, channels last: what stands before a selective scan."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..backends import choose_backend
from .naive import naive_causal_conv
from .step import causal_conv_step

__all__ = ["causal_conv", "causal_conv_step", "naive_causal_conv"]


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """y_t = silu(sum_k weight_k x_{t-K+1+k} + bias) per channel, with x zero before the first step.

    Args:
        x: (B, L, C), float16, bfloat16, float32 or float64, any strides.
        weight: (C, K). bias: (C,), or None.
        backend: "naive", "cpu" (Numba) or, where installed, "causal_conv1d"; by device if None. "naive" too on GPUs,
            for K > 4 and for C < 16. The environment variable HF_COMPRESSM_CAUSAL_CONV forces one as well.

    Returns:
        (B, L, C) in x's dtype; differentiable once.

    Raises:
        ValueError: if a shape or device does not fit, or the backend cannot run.
    """
    if x.ndim != 3 or x.numel() == 0 or weight.ndim != 2 or len(weight) != x.shape[2] or weight.numel() == 0:
        raise ValueError(
            f"x must be (B, L, C) and weight (C, K), all >= 1; got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (x.shape[2],):
        raise ValueError(f"bias must be {(x.shape[2],)}, one number per channel; got {tuple(bias.shape)}")
    if len(devices := {tensor.device for tensor in (x, weight, bias) if tensor is not None}) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    fits = weight.shape[1] <= 4 and weight.shape[0] >= 16
    forced = backend or os.environ.get("HF_COMPRESSM_CAUSAL_CONV")
    if forced == "cpu" and not fits:
        raise ValueError(
            f'the backend "cpu" of causal_conv needs K <= 4 and C >= 16; got K = {weight.shape[1]}, C = {len(weight)}'
        )
    wanted = forced or (None if x.device.type == "cpu" and fits else "naive")
    chosen = choose_backend("causal_conv", wanted, x.device.type, ("naive", "cpu", "causal_conv1d"))
    if chosen == "naive":
        return naive_causal_conv(x, weight, bias)
    if chosen == "causal_conv1d":
        from causal_conv1d import causal_conv1d_fn

        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    return _conv(x, weight, bias)


@torch.library.custom_op("hf_compressm::causal_conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from .cpu import conv_forward

    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = None if bias is None else bias.to(dtype)
    return conv_forward(x.to(dtype), weight.to(dtype), wide).to(x.dtype)


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("hf_compressm::causal_conv_backward", mutates_args=())
def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from .cpu import conv_backward

    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = None if bias is None else bias.to(dtype)
    dx, dweight, dbias = conv_backward(grad.to(dtype), x.to(dtype), weight.to(dtype), wide)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)


@_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    given = weight if bias is None else bias
    return x.new_empty(x.shape), weight.new_empty(weight.shape), given.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, dweight, dbias = _conv_backward(grad, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.needs_input_grad[2] else None


_conv.register_autograd(_differentiate, setup_context=_save)
