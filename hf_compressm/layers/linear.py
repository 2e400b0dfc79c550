"""`torch.nn.Linear` with the matrix products of this package."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear`, faster in float32 on some CPUs; see `hf_compressm.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
