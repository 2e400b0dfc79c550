"""The causal convolution in plain PyTorch: differentiable, in float64 if its inputs are; the reference for kernels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def naive_causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, L, C), weight (C, K) and bias (C,) -> y (B, L, C), as in `causal_conv`.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.4.
    """
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0)).to(weight.dtype)
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(weight))).transpose(1, 2).to(x.dtype)
