"""Matrix products in float32 on CPUs by oneDNN: PyTorch takes MKL for them, several times slower on some processors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear", "product"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias, as `torch.nn.functional.linear`; differentiable once where oneDNN runs.

    Args:
        x: (..., K), weight: (M, K), bias: (M,) or None; dtypes, devices and errors as PyTorch has them.
    """
    fits = weight.ndim == 2 and x.ndim > 1 and x.shape[-1] == weight.shape[1] and x.numel() > 0
    if fits and _by_onednn(x, weight) and not torch.is_autocast_enabled("cpu"):
        return _linear(x, weight, bias)
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for non-empty matrices of any strides; not differentiable."""
    if not _by_onednn(a, b):
        return a @ b
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b.t()), None, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    # oneDNN takes rows or columns without gaps between their elements.
    return x if 1 in x.stride() and 0 not in x.stride() else x.contiguous()


def _by_onednn(*tensors: Tensor) -> bool:
    # float64 is unknown to oneDNN; for half precision PyTorch takes oneDNN by itself.
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and _ONEDNN_RUNS


# Not a function: torch.compile would trace into it, and stop there.
_ONEDNN_RUNS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.library.custom_op("hf_compressm::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = product(x.reshape(-1, x.shape[-1]), weight.t())
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("hf_compressm::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return product(grad_rows, weight).view(x.shape), product(grad_rows.t(), rows)


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.biased = inputs[2] is not None


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, dweight = _linear_backward(grad, *ctx.saved_tensors)
    return dx, dweight, grad.sum(tuple(range(grad.ndim - 1))) if ctx.biased else None


_linear.register_autograd(_differentiate, setup_context=_save)
