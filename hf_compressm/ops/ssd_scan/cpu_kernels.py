"""Numba kernels of Mamba-2's scan: step by step, threads over sequences and heads, vectors over states.

The forward pass keeps the states before every `CHUNK`-th step only; the backward pass recomputes those between.
Four channels of a head are treated at once, so that B and C are read once for all of them. Channels and states are
padded with zeros, to multiples of 4 and of `LANES`. Sums over heads are formed per unit of work and added in a fixed
order, so results do not depend on the number of threads.

Shapes: batch B, length L, H heads of P channels, G groups, N states; K checkpoints of R channels and W states, which
are P and N with their padding.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..lanes import LANES, add_sums, load, store

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered; NaN and infinity keep their meaning."""
ROWS = 4
"""Channels that are treated at once, as the kernels are written."""
CHUNK = 64
"""Steps between two checkpoints: what the backward pass holds of one vector of states stays in the first cache."""


@njit(nogil=True, fastmath=FAST, cache=True)
def _steps(drives, decays, y, p, count, into, read, state, step_bytes, row_bytes):
    """`count` steps of channels p to p + 3; `into`, `read` and `state` are addresses of B, C and h."""
    zero, item = y.dtype.type(0), y.itemsize
    s0, s1, s2, s3 = state, state + row_bytes, state + 2 * row_bytes, state + 3 * row_bytes
    out, out_bytes = y.ctypes.data + p * item, y.shape[1] * item
    for t in range(count):
        d0, d1, d2, d3 = drives[t, p], drives[t, p + 1], drives[t, p + 2], drives[t, p + 3]
        keep = decays[t]
        y0 = y1 = y2 = y3 = load(into, zero) * zero
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
        add_sums(out, y0, y1)
        add_sums(out + 2 * item, y2, y3)
        into, read, out = into + step_bytes, read + step_bytes, out + out_bytes


@njit(nogil=True, fastmath=FAST, cache=True)
def _sweep(drives, decays, slopes, p, count, addresses, row_bytes):
    """One vector of states of channels p to p + 3 through `count` steps, forwards for the states and then backwards.

    Addresses: B, C and their gradients (T vectors each); room for the states before each step (T + 1 times ROWS
    vectors); sums (T times ROWS + 1 vectors) that gain what flows into the drives and into the logarithm of the decay;
    the first state and the costate, rows of which lie `row_bytes` apart.
    """
    into, read, dB, dC, states, sums, start, costate = addresses
    zero, vector = drives.dtype.type(0), LANES * drives.itemsize
    s0, s1 = load(start, zero), load(start + row_bytes, zero)
    s2, s3 = load(start + 2 * row_bytes, zero), load(start + 3 * row_bytes, zero)
    for t in range(count):
        store(states, s0)
        store(states + vector, s1)
        store(states + 2 * vector, s2)
        store(states + 3 * vector, s3)
        states += ROWS * vector
        keep, column = decays[t], load(into + t * vector, zero)
        s0 = keep * s0 + drives[t, p] * column
        s1 = keep * s1 + drives[t, p + 1] * column
        s2 = keep * s2 + drives[t, p + 2] * column
        s3 = keep * s3 + drives[t, p + 3] * column
    g0, g1 = load(costate, zero), load(costate + row_bytes, zero)
    g2, g3 = load(costate + 2 * row_bytes, zero), load(costate + 3 * row_bytes, zero)
    for t in range(count - 1, -1, -1):
        at, keep = t * vector, decays[t]
        column, weight = load(into + at, zero), load(read + at, zero)
        q0, q1, q2, q3 = slopes[t, p], slopes[t, p + 1], slopes[t, p + 2], slopes[t, p + 3]
        store(dC + at, load(dC + at, zero) + q0 * s0 + q1 * s1 + q2 * s2 + q3 * s3)
        g0, g1, g2, g3 = g0 + q0 * weight, g1 + q1 * weight, g2 + q2 * weight, g3 + q3 * weight
        d0, d1, d2, d3 = drives[t, p], drives[t, p + 1], drives[t, p + 2], drives[t, p + 3]
        store(dB + at, load(dB + at, zero) + d0 * g0 + d1 * g1 + d2 * g2 + d3 * g3)
        out = sums + t * (ROWS + 1) * vector
        store(out, load(out, zero) + g0 * column)
        store(out + vector, load(out + vector, zero) + g1 * column)
        store(out + 2 * vector, load(out + 2 * vector, zero) + g2 * column)
        store(out + 3 * vector, load(out + 3 * vector, zero) + g3 * column)
        g0, g1, g2, g3 = keep * g0, keep * g1, keep * g2, keep * g3
        states -= ROWS * vector
        s0, s1 = load(states, zero), load(states + vector, zero)
        s2, s3 = load(states + 2 * vector, zero), load(states + 3 * vector, zero)
        out += ROWS * vector
        store(out, load(out, zero) + g0 * s0 + g1 * s1 + g2 * s2 + g3 * s3)
    store(costate, g0)
    store(costate + row_bytes, g1)
    store(costate + 2 * row_bytes, g2)
    store(costate + 3 * row_bytes, g3)


@njit(nogil=True, fastmath=FAST, cache=True)
def ssd_scan_fwd_kernel(begin, end, x, dt, decay, B, C, D, initial, y, checkpoints, final):
    """y (B, L, H, P), checkpoints and the final state of units `begin` to `end`, each a head of a sequence."""
    length, heads, width = x.shape[1:]
    groups, size = B.shape[2:]
    padded, row_bytes = initial.shape[2], size * x.itemsize
    step_bytes = groups * row_bytes
    # Tiles of one head and chunk: rows of whole tensors lie far apart, at distances that caches do not like.
    drives, outputs = np.zeros((CHUNK, padded), dtype=x.dtype), np.empty((CHUNK, padded), dtype=x.dtype)
    decays, state = np.empty(CHUNK, dtype=x.dtype), np.empty((padded, size), dtype=x.dtype)
    for unit in range(begin, end):
        b, h = unit // heads, unit % heads
        state[:] = initial[b, h]
        for k in range((length + CHUNK - 1) // CHUNK):
            first = k * CHUNK
            count = min(CHUNK, length - first)
            for t in range(count):
                decays[t] = decay[b, first + t, h]
                for p in range(width):
                    drives[t, p] = dt[b, first + t, h] * x[b, first + t, h, p]
            checkpoints[b, h, k] = state
            outputs[:] = 0
            offset = (b * length + first) * step_bytes + h // (heads // groups) * row_bytes
            into, read = B.ctypes.data + offset, C.ctypes.data + offset
            for p in range(0, width, ROWS):
                row = state.ctypes.data + p * row_bytes
                _steps(drives, decays, outputs, p, count, into, read, row, step_bytes, row_bytes)
            for t in range(count):
                for p in range(width):
                    y[b, first + t, h, p] = outputs[t, p] + D[h] * x[b, first + t, h, p]
        final[b, h] = state


@njit(nogil=True, fastmath=FAST, cache=True)
def ssd_scan_bwd_kernel(begin, end, x, dt, decay, A, B, C, D, checkpoints, dy, costates, dx, ddt, dA, dB, dC, dD):
    """`costates` (B, H, R, W) enters as the gradient of the final state and leaves as that of the initial one."""
    length, heads, width = x.shape[1:]
    groups, size = B.shape[2:]
    padded, row_bytes, vector = costates.shape[2], size * x.itemsize, LANES * x.itemsize
    per_group, units = heads // groups, dB.shape[2]
    block, vectors = (per_group + units - 1) // units, size // LANES
    drives, slopes = np.zeros((CHUNK, padded), dtype=x.dtype), np.zeros((CHUNK, padded), dtype=x.dtype)
    into_drives, into_decays = np.empty((CHUNK, padded), dtype=x.dtype), np.empty((CHUNK, 2), dtype=x.dtype)
    decays = np.empty(CHUNK, dtype=x.dtype)
    # One vector of states of all steps after the other.
    tiles = np.empty((4, vectors, CHUNK, LANES), dtype=x.dtype)
    states = np.empty((CHUNK + 1, ROWS, LANES), dtype=x.dtype)
    sums = np.empty((CHUNK, ROWS + 1, LANES), dtype=x.dtype)
    zero, tile_bytes = x.dtype.type(0), vectors * CHUNK * vector
    for task in range(begin, end):
        b, g, unit = task // (groups * units), task // units % groups, task % units
        for k in range((length - 1) // CHUNK, -1, -1):
            first = k * CHUNK
            count = min(CHUNK, length - first)
            for v in range(vectors):
                for t in range(count):
                    for n in range(LANES):
                        tiles[0, v, t, n] = B[b, first + t, g, v * LANES + n]
                        tiles[1, v, t, n] = C[b, first + t, g, v * LANES + n]
            tiles[2:] = 0
            for h in range(g * per_group + unit * block, g * per_group + min((unit + 1) * block, per_group)):
                for t in range(count):
                    decays[t] = decay[b, first + t, h]
                    for p in range(width):
                        drives[t, p] = dt[b, first + t, h] * x[b, first + t, h, p]
                        slopes[t, p] = dy[b, first + t, h, p]
                into_drives[:], into_decays[:] = 0, 0
                for p in range(0, width, ROWS):
                    sums[:] = 0
                    start = checkpoints[b, h, k, p].ctypes.data
                    costate = costates[b, h, p].ctypes.data
                    for v in range(vectors):
                        tile = tiles.ctypes.data + v * CHUNK * vector
                        addresses = (
                            tile, tile + tile_bytes, tile + 2 * tile_bytes, tile + 3 * tile_bytes, states.ctypes.data,
                            sums.ctypes.data, start + v * vector, costate + v * vector,
                        )  # fmt: skip
                        _sweep(drives, decays, slopes, p, count, addresses, row_bytes)
                    for t in range(count):
                        found = sums.ctypes.data + t * (ROWS + 1) * vector
                        out = into_drives.ctypes.data + (t * padded + p) * x.itemsize
                        add_sums(out, load(found, zero), load(found + vector, zero))
                        add_sums(out + 2 * x.itemsize, load(found + 2 * vector, zero), load(found + 3 * vector, zero))
                        last = load(found + 4 * vector, zero)
                        add_sums(into_decays.ctypes.data + 2 * t * x.itemsize, last, last * zero)
                for t in range(count):
                    step = dt[b, first + t, h]
                    into_step = into_decays[t, 0] * A[h]
                    dA[b, h] += into_decays[t, 0] * step
                    for p in range(width):
                        value = x[b, first + t, h, p]
                        dx[b, first + t, h, p] = into_drives[t, p] * step + D[h] * slopes[t, p]
                        into_step += into_drives[t, p] * value
                        dD[b, h] += slopes[t, p] * value
                    ddt[b, first + t, h] = into_step
            for v in range(vectors):
                for t in range(count):
                    for n in range(LANES):
                        dB[b, g, unit, first + t, v * LANES + n] = tiles[2, v, t, n]
                        dC[b, g, unit, first + t, v * LANES + n] = tiles[3, v, t, n]
