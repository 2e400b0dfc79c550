"""Mamba-2's scan on the CPU: padding, calls of the Numba kernels, and threads.

Shapes: batch B, length L, H heads of P channels, G groups, N states; K checkpoints of R channels and W states, which
are P and N with their padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..lanes import LANES
from ..threads import run_units
from .cpu_kernels import CHUNK, ROWS, ssd_scan_bwd_kernel, ssd_scan_fwd_kernel
from .op import Gradients, Inputs

UNITS = 16
"""Most units of work that the heads of one group are divided into."""


def checkpoint_shape(inputs: Inputs) -> tuple[int, ...]:
    """(B, H, K, R, W): the states before every `CHUNK`-th step."""
    batch, length, heads, width = inputs.x.shape
    return batch, heads, -(-length // CHUNK), -(-width // ROWS) * ROWS, -(-inputs.B.shape[3] // LANES) * LANES


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H, P) in x's dtype, the final state (B, H, P, N) and the checkpoints."""
    width, size = inputs.x.shape[3], inputs.B.shape[3]
    x, dt, A, B, C, D = _tensors(inputs)
    checkpoints = x.new_empty(checkpoint_shape(inputs))
    batch, heads, _, *padded = checkpoints.shape
    initial = inputs.initial_state
    initial = x.new_zeros(batch, heads, *padded) if initial is None else _channels(_states(initial))
    y, final = torch.empty_like(x), torch.empty_like(initial)
    arguments = (x, dt, (dt * A).exp_(), B, C, D, initial, y, checkpoints, final)
    _run(ssd_scan_fwd_kernel, batch * heads, *arguments)
    return y.to(inputs.x.dtype), final[:, :, :width, :size].contiguous(), checkpoints


def backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and the initial state, of the shapes and in the precision of the states."""
    dy, dfinal, checkpoints = gradients
    assert dy is not None
    batch, length, heads, width = inputs.x.shape
    groups, size = inputs.B.shape[2:]
    padded = checkpoints.shape[3:]
    x, dt, A, B, C, D = _tensors(inputs)
    costates = x.new_zeros(batch, heads, *padded)
    if dfinal is not None:
        costates[:, :, :width, :size] = dfinal
    dx, ddt, dA, dD = torch.empty_like(x), torch.empty_like(dt), x.new_zeros(batch, heads), x.new_zeros(batch, heads)
    units = min(UNITS, heads // groups)
    dB, dC = (x.new_empty(batch, groups, units, length, padded[1]) for _ in range(2))
    arguments = (x, dt, (dt * A).exp_(), A, B, C, D, checkpoints, dy.to(x.dtype).contiguous(), costates)
    _run(ssd_scan_bwd_kernel, batch * groups * units, *arguments, dx, ddt, dA, dB, dC, dD)
    dB, dC = (part.sum(2).transpose(1, 2)[..., :size] for part in (dB, dC))
    return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), costates[:, :, :width, :size]


def _tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    """x, dt, A, B, C and D (zero if None) in the precision of the states, contiguous, B and C with padding."""
    A, dtype = inputs.A, inputs.dt.dtype
    B, C = (_states(tensor.to(dtype)) for tensor in (inputs.B, inputs.C))
    # Copies: these may be parameters, whose storage FSDP frees and fills, which NumPy's view of it would forbid.
    D = torch.zeros_like(A) if inputs.D is None else inputs.D.clone()
    return inputs.x.to(dtype).contiguous(), inputs.dt.contiguous(), A.clone(), B, C, D


def _states(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % LANES)).contiguous()


def _channels(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, 0, 0, -tensor.shape[-2] % ROWS)).contiguous()


def _run(kernel: Any, units: int, *arguments: Tensor | int) -> None:
    run_units(kernel, units, *(value.detach().numpy() if isinstance(value, Tensor) else value for value in arguments))
