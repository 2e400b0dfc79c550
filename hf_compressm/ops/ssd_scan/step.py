"""The time step of Mamba-2's scan, and a single step of the scan for generation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Limits = tuple[float, float]


def time_steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: Limits) -> Tensor:
    """The time steps that the scan runs with, in dt's dtype."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    return dt if dt_softplus and dt_limit == (0.0, float("inf")) else dt.clamp(*dt_limit)


def time_steps_backward(
    grad: Tensor, dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: Limits
) -> Tensor:
    """The gradient of dt + dt_bias from that of `time_steps`."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    step = F.softplus(dt) if dt_softplus else dt
    grad = grad * ((step >= dt_limit[0]) & (step <= dt_limit[1]))
    return grad * dt.sigmoid() if dt_softplus else grad


@torch.no_grad()
def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = (0.0, float("inf")),
) -> Tensor:
    """One step of the scan, for generation; updates `state` (B, H, P, N) in place.

    Args:
        x: (B, H, P). dt: (B, H). B, C: (B, G, N). The rest as in `ssd_scan`.

    Returns:
        y (B, H, P) in x's dtype.
    """
    dtype, groups = state.dtype, (B.shape[1], -1)
    step, wide = time_steps(dt.to(dtype), dt_bias, dt_softplus, dt_limit), x.to(dtype)
    state.mul_((step * A.to(dtype)).exp_()[..., None, None])
    by_group = state.unflatten(1, groups)
    drive = (step[..., None] * wide).unflatten(1, groups)[..., None]
    by_group.addcmul_(drive, B.to(dtype)[:, :, None, None])
    y = torch.linalg.vecdot(by_group, C.to(dtype)[:, :, None, None]).flatten(1, 2)
    return (y if D is None else torch.addcmul(y, wide, D.to(dtype)[:, None])).to(x.dtype)
