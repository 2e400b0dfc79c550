"""How tensors lie in memory when kernels read them."""

from __future__ import annotations

from torch import Tensor


def row_contiguous(tensor: Tensor) -> Tensor:
    """The tensor (..., N) itself if neighbours in its last dimension are neighbours in memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
