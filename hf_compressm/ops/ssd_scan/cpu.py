"""Numba kernels of Mamba-2's scan: step by step, threads over sequences and heads, vectors over states.

The forward pass keeps the states before every `chunk_length`-th step only; the backward pass recomputes those between.
Four channels of a head are treated at once, so that B and C are read once for all of them. Channels and states are
padded with zeros, to multiples of 4 and of `LANES`. Sums over heads are formed per unit of work and added in a fixed
order, so results do not depend on the number of threads.

Shapes: batch B, length L, H heads of P channels, G groups, N states; K checkpoints of R channels and W states, which
are P and N with their padding.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.nn import functional as F

from ..lanes import LANES, add_sums, full, load, store

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered; NaN and infinity keep their meaning."""
ROWS = 4
"""Channels that are treated at once, as the kernels are written."""
UNITS = 16
"""Most units of work that the heads of one group are divided into."""


def chunk_length(size: int) -> int:
    """Steps between two checkpoints: the states of four channels between them stay in a near cache."""
    return max(16, min(64, 4096 // size))


@njit(fastmath=FAST, cache=True)
def _steps(x, dt, decay, D, y, at, first, last, into, read, state, step_bytes, row_bytes, sums):
    """The steps from first to last; `into` and `read` are the addresses of B and C at the first, `state` of h."""
    b, h, p = at
    rows, item = min(ROWS, x.shape[3] - p), x.itemsize
    zero = x.dtype.type(0)
    s0, s1, s2, s3 = state, state + row_bytes, state + 2 * row_bytes, state + 3 * row_bytes
    drive, y_address = np.zeros(ROWS, dtype=x.dtype), sums.ctypes.data
    for t in range(first, last):
        for i in range(rows):
            drive[i] = dt[b, t, h] * x[b, t, h, p + i]
        d0, d1, d2, d3 = drive[0], drive[1], drive[2], drive[3]
        keep = decay[b, t, h]
        y0 = y1 = y2 = y3 = full(load(into, zero), 0.0)
        for v in range(0, row_bytes, LANES * item):
            column, weight = load(into + v, zero), load(read + v, zero)
            a0 = keep * load(s0 + v, zero) + d0 * column
            a1 = keep * load(s1 + v, zero) + d1 * column
            a2 = keep * load(s2 + v, zero) + d2 * column
            a3 = keep * load(s3 + v, zero) + d3 * column
            store(s0 + v, a0)
            store(s1 + v, a1)
            store(s2 + v, a2)
            store(s3 + v, a3)
            y0 = y0 + a0 * weight
            y1 = y1 + a1 * weight
            y2 = y2 + a2 * weight
            y3 = y3 + a3 * weight
        sums[:] = 0
        add_sums(y_address, y0, y1)
        add_sums(y_address + 2 * item, y2, y3)
        for i in range(rows):
            y[b, t, h, p + i] = sums[i] + D[h] * x[b, t, h, p + i]
        into += step_bytes
        read += step_bytes


@njit(fastmath=FAST, cache=True)
def _replay(x, dt, decay, at, first, last, into, states, step_bytes, row_bytes):
    """Writes the states after each step behind the one before the first, ROWS rows each."""
    b, h, p = at
    rows, item = min(ROWS, x.shape[3] - p), x.itemsize
    zero = x.dtype.type(0)
    drive = np.zeros(ROWS, dtype=x.dtype)
    for t in range(first, last):
        for i in range(rows):
            drive[i] = dt[b, t, h] * x[b, t, h, p + i]
        d0, d1, d2, d3 = drive[0], drive[1], drive[2], drive[3]
        keep = decay[b, t, h]
        s0, s1, s2, s3 = states, states + row_bytes, states + 2 * row_bytes, states + 3 * row_bytes
        after = ROWS * row_bytes
        for v in range(0, row_bytes, LANES * item):
            column = load(into + v, zero)
            store(s0 + after + v, keep * load(s0 + v, zero) + d0 * column)
            store(s1 + after + v, keep * load(s1 + v, zero) + d1 * column)
            store(s2 + after + v, keep * load(s2 + v, zero) + d2 * column)
            store(s3 + after + v, keep * load(s3 + v, zero) + d3 * column)
        states += after
        into += step_bytes


@njit(fastmath=FAST, cache=True)
def _adjoint(
    x, dt, decay, A, D, dy, dx, ddt, totals, at, first, last, into, read, states, costate, dB, dC, step_bytes,
    row_bytes, sums,
):  # fmt: skip
    """The steps backwards; addresses are those of the step before `last`, and of the states before that step."""
    b, h, p = at
    rows, item = min(ROWS, x.shape[3] - p), x.itemsize
    zero = x.dtype.type(0)
    value, slope = np.zeros(ROWS, dtype=x.dtype), np.zeros(ROWS, dtype=x.dtype)
    c0, c1, c2, c3 = costate, costate + row_bytes, costate + 2 * row_bytes, costate + 3 * row_bytes
    into_A, into_D, sums_address = zero, zero, sums.ctypes.data
    after = ROWS * row_bytes
    for t in range(last - 1, first - 1, -1):
        step = dt[b, t, h]
        for i in range(rows):
            value[i], slope[i] = x[b, t, h, p + i], dy[b, t, h, p + i]
        d0, d1, d2, d3 = step * value[0], step * value[1], step * value[2], step * value[3]
        q0, q1, q2, q3 = slope[0], slope[1], slope[2], slope[3]
        keep = decay[b, t, h]
        none = full(load(into, zero), 0.0)
        e0 = e1 = e2 = e3 = through = none
        s0, s1, s2, s3 = states, states + row_bytes, states + 2 * row_bytes, states + 3 * row_bytes
        for v in range(0, row_bytes, LANES * item):
            column, weight = load(into + v, zero), load(read + v, zero)
            b0, b1, b2, b3 = load(s0 + v, zero), load(s1 + v, zero), load(s2 + v, zero), load(s3 + v, zero)
            g0 = load(c0 + v, zero) + q0 * weight
            g1 = load(c1 + v, zero) + q1 * weight
            g2 = load(c2 + v, zero) + q2 * weight
            g3 = load(c3 + v, zero) + q3 * weight
            a0, a1 = load(s0 + after + v, zero), load(s1 + after + v, zero)
            a2, a3 = load(s2 + after + v, zero), load(s3 + after + v, zero)
            store(dC + v, load(dC + v, zero) + q0 * a0 + q1 * a1 + q2 * a2 + q3 * a3)
            store(dB + v, load(dB + v, zero) + g0 * d0 + g1 * d1 + g2 * d2 + g3 * d3)
            e0 = e0 + g0 * column
            e1 = e1 + g1 * column
            e2 = e2 + g2 * column
            e3 = e3 + g3 * column
            g0, g1, g2, g3 = keep * g0, keep * g1, keep * g2, keep * g3
            through = through + g0 * b0 + g1 * b1 + g2 * b2 + g3 * b3
            store(c0 + v, g0)
            store(c1 + v, g1)
            store(c2 + v, g2)
            store(c3 + v, g3)
        sums[:] = 0
        add_sums(sums_address, e0, e1)
        add_sums(sums_address + 2 * item, e2, e3)
        add_sums(sums_address + 4 * item, through, none)
        into_step = sums[4] * A[h]
        into_A += sums[4] * step
        for i in range(rows):
            dx[b, t, h, p + i] = sums[i] * step + D[h] * slope[i]
            into_step += sums[i] * value[i]
            into_D += slope[i] * value[i]
        ddt[b, t, h] += into_step
        into, read, states = into - step_bytes, read - step_bytes, states - after
        dB, dC = dB - row_bytes, dC - row_bytes
    totals[0] += into_A
    totals[1] += into_D


@njit(parallel=True, fastmath=FAST, cache=True)
def _forward(x, dt, decay, B, C, D, initial, chunk, y, checkpoints, final):
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    row_bytes = size * x.itemsize
    step_bytes = groups * row_bytes
    B_address, C_address = B.ctypes.data, C.ctypes.data
    for unit in prange(batch * heads):
        b, h = unit // heads, unit % heads
        state, sums = np.empty((ROWS, size), dtype=x.dtype), np.empty(ROWS, dtype=x.dtype)
        for p in range(0, width, ROWS):
            state[:] = initial[b, h, p : p + ROWS]
            for k in range((length + chunk - 1) // chunk):
                checkpoints[b, h, k, p : p + ROWS] = state
                first, last = k * chunk, min((k + 1) * chunk, length)
                offset = (b * length + first) * step_bytes + h // (heads // groups) * row_bytes
                _steps(
                    x, dt, decay, D, y, (b, h, p), first, last, B_address + offset, C_address + offset,
                    state.ctypes.data, step_bytes, row_bytes, sums,
                )  # fmt: skip
            final[b, h, p : p + ROWS] = state


@njit(parallel=True, fastmath=FAST, cache=True)
def _backward(x, dt, decay, A, B, C, D, checkpoints, dy, dfinal, chunk, dx, ddt, dA, dB, dC, dD, dinitial):
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    row_bytes = size * x.itemsize
    step_bytes = groups * row_bytes
    B_address, C_address = B.ctypes.data, C.ctypes.data
    per_group, units = heads // groups, dB.shape[2]
    block = (per_group + units - 1) // units
    for task in prange(batch * groups * units):
        b, g, unit = task // (groups * units), task // units % groups, task % units
        states = np.empty((chunk + 1, ROWS, size), dtype=x.dtype)
        costate = np.empty((ROWS, size), dtype=x.dtype)
        sums, totals = np.empty(6, dtype=x.dtype), np.empty(2, dtype=x.dtype)
        into_B, into_C = dB[b, g, unit].ctypes.data, dC[b, g, unit].ctypes.data
        for h in range(g * per_group + unit * block, g * per_group + min((unit + 1) * block, per_group)):
            totals[:] = 0
            for p in range(0, width, ROWS):
                at = (b, h, p)
                costate[:] = dfinal[b, h, p : p + ROWS]
                for k in range((length - 1) // chunk, -1, -1):
                    first, last = k * chunk, min((k + 1) * chunk, length)
                    states[0] = checkpoints[b, h, k, p : p + ROWS]
                    start = (b * length + first) * step_bytes + g * row_bytes
                    end = (b * length + last - 1) * step_bytes + g * row_bytes
                    state = states.ctypes.data
                    _replay(
                        x, dt, decay, at, first, last, B_address + start, state, step_bytes, row_bytes
                    )  # fmt: skip
                    _adjoint(
                        x, dt, decay, A, D, dy, dx, ddt, totals, at, first, last, B_address + end, C_address + end,
                        state + (last - first - 1) * ROWS * row_bytes, costate.ctypes.data,
                        into_B + (last - 1) * row_bytes, into_C + (last - 1) * row_bytes, step_bytes, row_bytes, sums,
                    )  # fmt: skip
                dinitial[b, h, p : p + ROWS] = costate
            dA[b, h], dD[b, h] = totals[0], totals[1]


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H, P), final state (B, H, P, N) and checkpoints (B, H, K, R, W), from tensors of one dtype.

    x: (B, L, H, P); dt (B, L, H), the time step itself; A, D: (H,); B, C: (B, L, G, N); initial: (B, H, P, N).
    """
    width, size = x.shape[3], B.shape[3]
    checkpoints = x.new_empty(checkpoint_shape(*x.shape, size, 0))
    batch, heads, _, *padded = checkpoints.shape
    x, dt, B, C = x.contiguous(), dt.contiguous(), _states(B), _states(C)
    initial = x.new_zeros(batch, heads, *padded) if initial is None else _channels(_states(initial))
    y, final = torch.empty_like(x), torch.empty_like(initial)
    D = torch.zeros_like(A) if D is None else D
    _run(_forward, x, dt, (dt * A).exp_(), B, C, D, initial, chunk_length(size), y, checkpoints, final)
    return y, final[:, :, :width, :size].contiguous(), checkpoints


def scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    checkpoints: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and the initial state, from those of y and the final state."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    padded = checkpoints.shape[3:]
    x, dt, B, C, dy = x.contiguous(), dt.contiguous(), _states(B), _states(C), dy.contiguous()
    dfinal = x.new_zeros(batch, heads, *padded) if dfinal is None else _channels(_states(dfinal))
    dx, ddt, dinitial = torch.empty_like(x), torch.zeros_like(dt), torch.empty_like(dfinal)
    dA, dD = x.new_empty(batch, heads), x.new_empty(batch, heads)
    units = min(UNITS, heads // groups)
    dB, dC = (x.new_zeros(batch, groups, units, length, padded[1]) for _ in range(2))
    D = torch.zeros_like(A) if D is None else D
    arguments = (x, dt, (dt * A).exp_(), A, B, C, D, checkpoints, dy, dfinal, chunk_length(size))
    _run(_backward, *arguments, dx, ddt, dA, dB, dC, dD, dinitial)
    dB, dC = (part.sum(2).transpose(1, 2)[..., :size] for part in (dB, dC))
    return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dinitial[:, :, :width, :size]


def checkpoint_shape(batch: int, length: int, heads: int, width: int, size: int, chunk: int) -> tuple[int, ...]:
    """(B, H, K, R, W); the chunk that the caller asks for does not matter."""
    return batch, heads, -(-length // chunk_length(size)), -(-width // ROWS) * ROWS, -(-size // LANES) * LANES


def _states(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % LANES)).contiguous()


def _channels(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, 0, 0, -tensor.shape[-2] % ROWS)).contiguous()


def _run(kernel: Any, *arguments: Tensor | int) -> None:
    threads, wanted = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(max(1, min(wanted, numba.config.NUMBA_NUM_THREADS)))
    try:
        kernel(*(value.detach().numpy() if isinstance(value, Tensor) else value for value in arguments))
    finally:
        numba.set_num_threads(threads)
        # Numba's OpenMP layer starts with as many threads as there are cores, for PyTorch's operations too.
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
