"""Numba kernels of the selective scan: threads over sequences and blocks of channels, vectors over states.

The forward pass keeps the states at every `CHUNK`-th time step only; the backward pass recomputes those between.
Sums over channels are formed per block and added in a fixed order, so results do not depend on the number of threads.

Shapes: batch B, length L, H channels, N states, K checkpoints.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning."""
CHUNK = 32
BLOCK = 16
"""Channels of one unit of work."""


@intrinsic
def _float_from_bits(typingctx: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@njit(inline="always", fastmath=FAST)
def _exp32(x):
    # exp(x) = 2^k exp(f) with |f| <= ln(2)/2 and a Taylor polynomial of degree 7: a library call would not vectorise.
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    k = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    f = x - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * f + np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1.0)
    p = p * f + np.float32(1.0)
    return p * _float_from_bits(np.int32((np.int32(k) + 127) << 23))


@njit(inline="always", fastmath=FAST)
def _exp64(x):
    return np.exp(x)


def _make(exp: Any) -> tuple[Any, Any]:
    @njit(parallel=True, fastmath=FAST, cache=True)
    def forward(u, dt, A, B, C, initial, y, checkpoints, final):
        batch, length, channels = u.shape
        size = A.shape[1]
        blocks = (channels + BLOCK - 1) // BLOCK
        for unit in prange(batch * blocks):
            b, first = unit // blocks, (unit % blocks) * BLOCK
            for h in range(first, min(first + BLOCK, channels)):
                state = initial[b, h].copy()
                rate = A[h]
                for t in range(length):
                    if t % CHUNK == 0:
                        for n in range(size):
                            checkpoints[b, h, t // CHUNK, n] = state[n]
                    step = dt[b, t, h]
                    drive = step * u[b, t, h]
                    row_b, row_c = B[b, t], C[b, t]
                    total = drive * 0
                    for n in range(size):
                        state[n] = exp(step * rate[n]) * state[n] + drive * row_b[n]
                        total += state[n] * row_c[n]
                    y[b, t, h] = total
                for n in range(size):
                    final[b, h, n] = state[n]

    @njit(parallel=True, fastmath=FAST, cache=True)
    def backward(u, dt, A, B, C, checkpoints, dy, dfinal, du, ddt, dA, dB, dC, dinitial):
        batch, length, channels = u.shape
        size = A.shape[1]
        blocks = (channels + BLOCK - 1) // BLOCK
        for unit in prange(batch * blocks):
            b, block = unit // blocks, unit % blocks
            states = np.empty((CHUNK + 1, size), dtype=u.dtype)
            decays = np.empty((CHUNK, size), dtype=u.dtype)
            for h in range(block * BLOCK, min((block + 1) * BLOCK, channels)):
                costate = dfinal[b, h].copy()
                rate = A[h]
                gradient_rate = np.zeros(size, dtype=u.dtype)
                for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                    start = chunk * CHUNK
                    stop = min(start + CHUNK, length)
                    for n in range(size):
                        states[0, n] = checkpoints[b, h, chunk, n]
                    for t in range(start, stop):
                        step = dt[b, t, h]
                        drive = step * u[b, t, h]
                        row_b = B[b, t]
                        before, after, decay = states[t - start], states[t - start + 1], decays[t - start]
                        for n in range(size):
                            decay[n] = exp(step * rate[n])
                            after[n] = decay[n] * before[n] + drive * row_b[n]
                    for t in range(stop - 1, start - 1, -1):
                        step, value, gradient = dt[b, t, h], u[b, t, h], dy[b, t, h]
                        row_b, row_c = B[b, t], C[b, t]
                        row_db, row_dc = dB[b, block, t], dC[b, block, t]
                        before, after, decay = states[t - start], states[t - start + 1], decays[t - start]
                        drive = step * value
                        into_drive = drive * 0
                        into_step = drive * 0
                        for n in range(size):
                            g = costate[n] + gradient * row_c[n]
                            row_dc[n] += gradient * after[n]
                            row_db[n] += g * drive
                            into_drive += g * row_b[n]
                            carried = g * decay[n]
                            through = carried * before[n]
                            into_step += through * rate[n]
                            gradient_rate[n] += through * step
                            costate[n] = carried
                        du[b, t, h] = into_drive * step
                        ddt[b, t, h] = into_drive * value + into_step
                for n in range(size):
                    dA[b, h, n] = gradient_rate[n]
                    dinitial[b, h, n] = costate[n]

    return forward, backward


_KERNELS = {torch.float32: _make(_exp32), torch.float64: _make(_exp64)}


def scan_forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, ...]:
    """y (B, L, H), final state (B, H, N) and checkpoints (B, H, K, N), from contiguous tensors of one dtype.

    u, dt: (B, L, H); A: (H, N); B, C: (B, L, N); initial: (B, H, N); float32 or float64.
    """
    batch, length, channels = u.shape
    y, final = torch.empty_like(u), torch.empty_like(initial)
    checkpoints = u.new_empty(batch, channels, -(-length // CHUNK), A.shape[1])
    _run(_KERNELS[u.dtype][0], u, dt, A, B, C, initial, y, checkpoints, final)
    return y, final, checkpoints


def scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, checkpoints: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C and the initial state, from those of y and the final state; all contiguous."""
    batch, length, channels = u.shape
    blocks, size = -(-channels // BLOCK), A.shape[1]
    du, ddt, dinitial = torch.empty_like(u), torch.empty_like(u), torch.empty_like(dfinal)
    dA = u.new_empty(batch, channels, size)
    dB, dC = u.new_zeros(batch, blocks, length, size), u.new_zeros(batch, blocks, length, size)
    _run(_KERNELS[u.dtype][1], u, dt, A, B, C, checkpoints, dy, dfinal, du, ddt, dA, dB, dC, dinitial)
    return du, ddt, dA.sum(0), dB.sum(1), dC.sum(1), dinitial


def _run(kernel: Any, *tensors: Tensor) -> None:
    threads = numba.get_num_threads()
    numba.set_num_threads(max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
    try:
        kernel(*(tensor.detach().numpy() for tensor in tensors))
    finally:
        numba.set_num_threads(threads)
