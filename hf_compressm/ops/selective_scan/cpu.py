"""The selective scan on the CPU: tables of addresses for the Numba kernels, and threads.

Shapes: batch B, length L, H channels in K blocks, N states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lanes import LANES
from ..memory import row_contiguous
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
from .op import Gradients, Inputs

UNITS = 32
"""Number of units of work in the backward pass, about; fixed, since the order of sums depends on it."""


def checkpoint_shape(inputs: Inputs) -> tuple[int, ...]:
    """(B, L / CHUNK, K, N, 16), the states before every `CHUNK`-th step."""
    batch, length, channels = inputs.u.shape
    return batch, -(-length // CHUNK), -(-channels // LANES), inputs.A.shape[1], LANES


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H), the final state (B, H, N) and the checkpoints; see `selective_scan`."""
    batch, length, channels = inputs.u.shape
    size = inputs.A.shape[1]
    tensors = _tensors(inputs)
    y, final = tensors[U].new_empty(inputs.u.shape), tensors[U].new_empty(batch, channels, size)
    checkpoints = y.new_empty(checkpoint_shape(inputs))
    table = _table(tensors | {Y: y, FINAL: final, CHECKPOINTS: checkpoints})
    units = batch * checkpoints.shape[2]
    run_units(selective_scan_fwd_kernel, units, table, length, channels, size, inputs.delta_softplus, _like(y))
    return y.to(inputs.u.dtype), final, checkpoints


def backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients of the eight tensors and of the initial state, of their shapes, in the precision of the checkpoints."""
    checkpoints, (batch, length, channels) = gradients.checkpoints, inputs.u.shape
    size = inputs.A.shape[1]
    tensors = _tensors(inputs) | {DY: _rows(gradients.dy, checkpoints.dtype), CHECKPOINTS: checkpoints}
    if gradients.dfinal is not None:
        tensors[DFINAL] = gradients.dfinal.to(checkpoints.dtype).contiguous()
    new = checkpoints.new_empty
    blocks = -(-channels // LANES)
    groups = -(-blocks // -(-batch * blocks // UNITS))
    shape = inputs.u.shape
    du, ddelta, dz = new(shape), new(shape), new(shape if inputs.z is not None else 0)
    dA, dinitial = (new(batch, channels, size) for _ in range(2))
    dD, dbias = (new(batch, channels) for _ in range(2))
    dBC = checkpoints.new_zeros(batch * groups, length, size, 2)
    found = {DU: du, DDELTA: ddelta, DZ: dz, DBC: dBC, DA: dA, DD: dD, DBIAS: dbias, DINITIAL: dinitial}
    arguments = (_table(tensors | found), length, channels, size, groups, inputs.delta_softplus, _like(du))
    run_units(selective_scan_bwd_kernel, batch * groups, *arguments)
    dB, dC = (part.clone() for part in dBC.view(batch, groups, length, size, 2).sum(1).unbind(-1))
    return du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0), dinitial


def _tensors(inputs: Inputs) -> dict[int, Tensor]:
    """The inputs by their row in the table."""
    dtype = torch.promote_types(inputs.u.dtype, torch.float32)
    rows = {U: inputs.u, DELTA: inputs.delta, B_: inputs.B, C_: inputs.C, Z: inputs.z}
    whole = {A_: inputs.A, D_: inputs.D, BIAS: inputs.delta_bias, INITIAL: inputs.initial_state}
    found = {which: _rows(tensor, dtype) for which, tensor in rows.items() if tensor is not None}
    return found | {which: tensor.to(dtype).contiguous() for which, tensor in whole.items() if tensor is not None}


def _rows(tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, with neighbours in memory in its last dimension."""
    assert tensor is not None
    return row_contiguous(tensor.to(dtype))


def _table(tensors: dict[int, Tensor]) -> np.ndarray:
    table = np.zeros((DINITIAL + 1, 3), dtype=np.int64)
    for which, tensor in tensors.items():
        strides = [stride * tensor.element_size() for stride in (*tensor.stride()[:2], 0)[:2]]
        table[which] = tensor.data_ptr(), *strides
    return table


def _like(tensor: Tensor) -> Any:
    return np.float64(0) if tensor.dtype == torch.float64 else np.float32(0)
