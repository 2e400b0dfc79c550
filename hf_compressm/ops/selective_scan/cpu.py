"""The selective scan on the CPU: tables of addresses for the Numba kernels, and threads.

Shapes: batch B, length L, H channels in K blocks, N states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lanes import LANES
from ..threads import run_units
from .cpu_kernels import (
    A_,
    B_,
    BIAS,
    C_,
    CHECKPOINTS,
    CHUNK,
    D_,
    DA,
    DBC,
    DBIAS,
    DD,
    DDELTA,
    DELTA,
    DFINAL,
    DINITIAL,
    DU,
    DY,
    DZ,
    FINAL,
    INITIAL,
    U,
    Y,
    Z,
    selective_scan_bwd_kernel,
    selective_scan_fwd_kernel,
)  # fmt: skip

UNITS = 32
"""Units of work to aim at in the backward pass; fixed, since the order of sums depends on it."""


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H), final state (B, H, N) and checkpoints (B, L / CHUNK, K, N, 16); see `selective_scan`."""
    batch, length, channels = u.shape
    size = A.shape[1]
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, final = inputs[U].new_empty(u.shape), inputs[U].new_empty(batch, channels, size)
    checkpoints = y.new_empty(checkpoint_shape(batch, length, channels, size))
    table = _table(inputs | {Y: y, FINAL: final, CHECKPOINTS: checkpoints})
    units = batch * checkpoints.shape[2]
    run_units(selective_scan_fwd_kernel, units, table, length, channels, size, delta_softplus, _like(y))
    return y.to(u.dtype), final, checkpoints


def checkpoint_shape(batch: int, length: int, channels: int, size: int) -> tuple[int, ...]:
    return batch, -(-length // CHUNK), -(-channels // LANES), size, LANES


def scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and the initial state, in the precision of the checkpoints."""
    batch, length, channels = u.shape
    size = A.shape[1]
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias, None)
    inputs |= {DY: _rows(dy, checkpoints.dtype), CHECKPOINTS: checkpoints}
    if dfinal is not None:
        inputs[DFINAL] = dfinal.to(checkpoints.dtype).contiguous()
    new = checkpoints.new_empty
    blocks = -(-channels // LANES)
    groups = -(-blocks // -(-batch * blocks // UNITS))
    du, ddelta, dz = new(u.shape), new(u.shape), new(u.shape if z is not None else 0)
    dA, dinitial = (new(batch, channels, size) for _ in range(2))
    dD, dbias = (new(batch, channels) for _ in range(2))
    dBC = checkpoints.new_zeros(batch * groups, length, size, 2)
    found = {DU: du, DDELTA: ddelta, DZ: dz, DBC: dBC, DA: dA, DD: dD, DBIAS: dbias, DINITIAL: dinitial}
    arguments = (_table(inputs | found), length, channels, size, groups, delta_softplus, _like(du))
    run_units(selective_scan_bwd_kernel, batch * groups, *arguments)
    dB, dC = (part.clone() for part in dBC.view(batch, groups, length, size, 2).sum(1).unbind(-1))
    return du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0), dinitial


def _inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> dict[int, Tensor]:
    dtype = torch.promote_types(u.dtype, torch.float32)
    rows = {U: u, DELTA: delta, B_: B, C_: C, Z: z}
    whole = {A_: A, D_: D, BIAS: delta_bias, INITIAL: initial_state}
    found = {which: _rows(tensor, dtype) for which, tensor in rows.items() if tensor is not None}
    return found | {which: tensor.to(dtype).contiguous() for which, tensor in whole.items() if tensor is not None}


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, with neighbours in memory in its last dimension."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _table(tensors: dict[int, Tensor]) -> np.ndarray:
    table = np.zeros((DINITIAL + 1, 3), dtype=np.int64)
    for which, tensor in tensors.items():
        strides = [stride * tensor.element_size() for stride in (*tensor.stride()[:2], 0)[:2]]
        table[which] = tensor.data_ptr(), *strides
    return table


def _like(tensor: Tensor) -> Any:
    return np.float64(0) if tensor.dtype == torch.float64 else np.float32(0)
