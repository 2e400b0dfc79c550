"""Plain PyTorch reference of the selective scan: differentiable, in float64 if its inputs are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and final state; arguments as in `selective_scan`."""
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
    """dt from delta, its bias and softplus, in delta's dtype."""
    dt = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)
    return F.softplus(dt) if delta_softplus else dt
