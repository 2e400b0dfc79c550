"""What stands in for this package's ops in code that travels with a checkpoint: plain PyTorch, the same signatures.

Arguments, shapes and results as in the op of the same name, without a choice of backends and without checks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.causal_conv.naive import naive_causal_conv
from ..ops.diag_scan.naive import naive_diag_scan
from ..ops.selective_scan.naive import naive_selective_scan
from ..ops.ssd_scan.naive import naive_ssd_scan
from ..ops.ssd_scan.step import time_steps

causal_conv = naive_causal_conv


def selective_scan(*tensors: Any, return_final_state: bool = False, **options: Any) -> Any:
    """Selective scan of Mamba."""
    y, final = naive_selective_scan(*tensors, **options)
    return (y, final) if return_final_state else y


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """Scan of Mamba-2."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = time_steps(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    wide, A, B, C, D = (tensor.to(dtype) for tensor in (x, A, B, C, D))
    y, final = naive_ssd_scan(wide, step, A, B, C, initial_state, chunk_size)
    y = (y + wide * D[:, None]).to(x.dtype)
    return (y, final) if return_final_state else y


def diag_system(
    u: Tensor, lam: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Diagonal linear system with many inputs and outputs, in real form."""
    driven = F.linear(u, B).to(lam.real.dtype).unflatten(-1, (-1, 2))
    states, final = naive_diag_scan(lam, torch.view_as_complex(driven), initial_state)
    y = F.linear(torch.view_as_real(states).flatten(-2).to(u.dtype), C)
    return torch.addcmul(y, D.to(y.dtype), u.to(y.dtype)), final


class CarriesCode:
    """Nothing to do: transformers itself copies this file when a model that was loaded with it is saved."""
