"""The selective scan in plain PyTorch: differentiable, in float64 if its inputs are; the reference for kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..exporting import scan_over_time


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
    state = wide.new_zeros(*A.shape).expand(u.shape[0], -1, -1) if initial_state is None else initial_state.to(dtype)
    y, state = (_of_any_length if torch.compiler.is_exporting() else _step_by_step)(dt, dt * wide, A, B, C, state)
    if D is not None:
        y = y + wide * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


def _step_by_step(dt: Tensor, driven: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, L, H) of the states alone, and the last of these; dt and driven, dt * u, are (B, L, H)."""
    decays = (dt[..., None] * A).exp()
    drives = driven[..., None] * B[:, :, None]
    outputs = []
    # Not by index: the gradient of a selected time step is as large as the whole sequence.
    for decay, drive, read_out in zip(decays.unbind(1), drives.unbind(1), C.unbind(1), strict=True):
        state = decay * state + drive
        outputs.append((state * read_out[:, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def _of_any_length(dt: Tensor, driven: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `_step_by_step`, for graphs."""

    def step(state: Tensor, dt: Tensor, driven: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, ...]:
        state = (dt * A).exp() * state + driven * B
        return state, state @ C

    # With all axes in place beforehand few nodes are left in what runs once per time step.
    inputs = dt[..., None], driven[..., None], B[:, :, None], C[..., None]
    final, y = scan_over_time(step, [state], inputs, [A])
    return y[..., 0], final


def step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Step sizes dt from delta (..., H), its bias (H,) and softplus; delta's shape and dtype.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.
    """
    dt = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)
    return F.softplus(dt) if delta_softplus else dt
