"""The causal convolution: checks, custom ops and the choice of the backend."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choose_backend
from ..checks import check_devices
from ..custom_ops import custom_op, empty_gradients, fitted_gradients, register_gradient
from .naive import naive_causal_conv

AVAILABLE = ("naive", "cpu", "causal_conv1d")


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Depthwise causal convolution followed by SiLU, differentiable once in all tensors.

    y_t = silu(sum_k weight_k x_{t-K+1+k} + bias) per channel, with x zero before the first step.

    Args:
        x: (B, L, C), float16, bfloat16, float32 or float64, any strides.
        weight: (C, K).
        bias: (C,), or None.
        backend: "naive", "cpu" (Numba, for K <= 4 and C >= 16) or, where installed, "causal_conv1d". By default "cpu"
            on the CPU where it can run, else "naive". The environment variable HF_COMPRESSM_CAUSAL_CONV sets one too.

    Returns:
        y (B, L, C) in x's dtype.

    Raises:
        ValueError: if a shape or device does not fit, or the backend is unknown or cannot run.
        RuntimeError: if gradients of gradients are asked for, except of the naive backend.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.4: the convolution of a Mamba block.
    """
    _check(x, weight, bias)
    fits = weight.shape[1] <= 4 and weight.shape[0] >= 16
    forced = backend or os.environ.get("HF_COMPRESSM_CAUSAL_CONV")
    if forced == "cpu" and not fits:
        raise ValueError(
            f'the backend "cpu" of causal_conv needs K <= 4 and C >= 16; got K = {weight.shape[1]}, C = {len(weight)}'
        )
    wanted = forced or (None if x.device.type == "cpu" and fits else "naive")
    chosen = choose_backend("causal_conv", wanted, x.device.type, AVAILABLE)
    if chosen == "naive":
        return naive_causal_conv(x, weight, bias)
    if chosen == "causal_conv1d":
        from causal_conv1d import causal_conv1d_fn

        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    return _conv(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 3 or x.numel() == 0 or weight.ndim != 2 or len(weight) != x.shape[2] or weight.numel() == 0:
        raise ValueError(
            f"x must be (B, L, C) and weight (C, K), all >= 1; got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    check_devices(x=x, weight=weight, bias=bias)
    if bias is not None and bias.shape != (x.shape[2],):
        raise ValueError(f"bias must be {(x.shape[2],)}, one number per channel; got {tuple(bias.shape)}")


class Inputs(NamedTuple):
    """Arguments of the custom op, as in `causal_conv`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


class Gradients(NamedTuple):
    """What the backward pass gets besides the inputs: the gradient of y (B, L, C)."""

    dy: Tensor


@custom_op("causal_conv", Inputs, returns=1, fake=lambda inputs: inputs.x.new_empty(inputs.x.shape))
def _conv(inputs: Inputs) -> Tensor:
    from .cpu import forward

    return forward(_widened(inputs)).to(inputs.x.dtype)


@custom_op("causal_conv_backward", Gradients, Inputs, returns=3, fake=lambda _, inputs: empty_gradients(inputs))
def _conv_backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    from .cpu import backward

    wide = _widened(inputs)
    return fitted_gradients(backward(Gradients(gradients.dy.to(wide.x.dtype)), wide), inputs)


def _saved(inputs: Inputs, outputs: Any) -> Inputs:
    return inputs


def _widened(inputs: Inputs) -> Inputs:
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    return Inputs(*(None if tensor is None else tensor.to(dtype) for tensor in inputs))  # type: ignore[arg-type]


register_gradient(_conv, _conv_backward, Inputs, _saved, outputs=1)
