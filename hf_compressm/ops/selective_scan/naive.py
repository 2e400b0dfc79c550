"""The selective scan in plain PyTorch: differentiable, in float64 if its inputs are; the reference for kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, H) in u's dtype and the final state (B, H, N); arguments as in `selective_scan`.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    dt = step_sizes(delta.to(dtype), delta_bias, delta_softplus)
    wide, A, B, C = (tensor.to(dtype) for tensor in (u, A, B, C))
    decays = (dt[..., None] * A).exp()
    drives = (dt * wide)[..., None] * B[:, :, None]
    state = wide.new_zeros(*A.shape).expand(len(u), -1, -1) if initial_state is None else initial_state.to(dtype)
    outputs = []
    # Not by index: the gradient of a selected time step is as large as the whole sequence.
    for decay, drive, read_out in zip(decays.unbind(1), drives.unbind(1), C.unbind(1), strict=True):
        state = decay * state + drive
        outputs.append((state * read_out[:, None]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + wide * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


def step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Step sizes dt from delta (..., H), its bias (H,) and softplus; delta's shape and dtype.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.
    """
    dt = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)
    return F.softplus(dt) if delta_softplus else dt
