"""Batch normalisation that leaves padding out. B batch, L length, H features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MimoSSMBatchNorm(nn.Module):
    """Batch normalisation over all real positions of a batch, with running statistics for evaluation.

    y = (x - mean) / sqrt(var + eps) * weight + bias, statistics per feature and process, in float32 at least.
    """

    MOMENTUM = 0.1
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("running_mean", torch.zeros(hidden_size))
        self.register_buffer("running_var", torch.ones(hidden_size))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise (B, L, H) -> (B, L, H), and while training update the running statistics.

        Args:
            x: (B, L, H), any float dtype.
            mask: (B, L) bool, True at real positions, or None if all are real.
        """
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = self._statistics(values, mask) if self.training else (self.running_mean, self.running_var)
        scale = self.weight.to(values.dtype) * torch.rsqrt(variance.to(values.dtype) + self.eps)
        return torch.addcmul(self.bias - mean * scale, values, scale).to(x.dtype)

    def _statistics(self, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        count: Tensor | int = values.shape[0] * values.shape[1]
        if mask is None:
            variance, mean = torch.var_mean(values, (0, 1), correction=0)
            unbiased = variance * (count / max(count - 1, 1))
        else:
            count = mask.sum().clamp(min=1)
            padded = ~mask[:, :, None]
            mean = values.masked_fill(padded, 0).sum((0, 1)) / count
            variance = (values - mean).masked_fill(padded, 0).square().sum((0, 1)) / count
            unbiased = variance * (count / (count - 1).clamp(min=1))
        if not _recomputing():
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.MOMENTUM)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.MOMENTUM)
        return mean, variance


def _recomputing() -> bool:
    """Tell whether gradient checkpointing runs this forward again in a backward, which must not update statistics."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
