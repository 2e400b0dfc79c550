"""Plain PyTorch reference of the causal convolution: differentiable, in float64 if its inputs are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def naive_causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Arguments and result as in `causal_conv`."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0)).to(weight.dtype)
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(weight))).transpose(1, 2).to(x.dtype)
