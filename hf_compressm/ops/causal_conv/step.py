"""One step of the causal convolution, for generation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv_step(window: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The last step of `causal_conv`, from its last K inputs.

    It is plain PyTorch, since the call of a kernel would cost more than the arithmetic.

    Args:
        window: (B, C, K), the inputs in order of time.
        weight: (C, K).
        bias: (C,), or None.

    Returns:
        y (B, C) in the dtype of `window`; differentiable.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.4.
    """
    dtype = torch.promote_types(window.dtype, torch.float32)
    wide, weight = window.to(dtype), weight.to(dtype)
    y = wide[..., 0] * weight[:, 0] if bias is None else torch.addcmul(bias.to(dtype), wide[..., 0], weight[:, 0])
    for k in range(1, weight.shape[1]):
        y = torch.addcmul(y, wide[..., k], weight[:, k])
    return F.silu(y).to(window.dtype)
