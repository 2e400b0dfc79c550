"""Numba kernels of the selective scan: threads over sequences and blocks of channels, vectors over 16 channels.

The forward pass keeps the states at every `CHUNK`-th time step only; the backward pass recomputes those between, for
`STATES` states at a time, so that they stay in the fastest cache. Sums over channels are formed per group of blocks
and added in a fixed order, so results do not depend on the number of threads.

Shapes: batch B, length L, H channels in K blocks, N states. Decays are powers of two, with rates A log2(e).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..lanes import (
    LANES,
    LN2,
    LOG2E,
    add_sums,
    bytes_of,
    exp2,
    full,
    gather,
    load,
    read,
    scatter,
    sigmoid,
    softplus,
    softplus_slope,
    store,
)  # fmt: skip

FAST = {"contract", "nsz", "arcp"}
CHUNK = 32
STATES = 16
# Rows of the table of tensors: address and the strides of its first two dimensions in bytes; address 0 for none.
U, DELTA, B_, C_, Z, A_, D_, BIAS, INITIAL, Y, FINAL, CHECKPOINTS, DY, DFINAL = range(14)
DU, DDELTA, DZ, DBC, DA, DD, DBIAS, DINITIAL = range(14, 22)


@njit(inline="always")
def _place(table, which, i, j):
    return table[which, 0] + i * table[which, 1] + j * table[which, 2]


@njit(inline="always")
def _take(address, count, like):
    if count == LANES:
        return load(address, like)
    return gather(address, bytes_of(like), count, like)


@njit(inline="always")
def _put(address, value, count, like):
    if count == LANES:
        store(address, value)
    else:
        scatter(address, bytes_of(like), count, value)


@njit(inline="always")
def _optional(table, which, first, count, like):
    """Per-channel vector of a block; zeros if there is none."""
    if table[which, 0] == 0:
        return full(like, 0.0)
    return _take(table[which, 0] + first * bytes_of(like), count, like)


@njit(nogil=True, fastmath=FAST, cache=True)
def selective_scan_fwd_kernel(begin, end, table, length, channels, size, with_softplus, like):
    """y, final state and checkpoints of units `begin` to `end`, blocks of a sequence; tensors are in `table`."""
    item = bytes_of(like)
    vector = LANES * item
    blocks = (channels + LANES - 1) // LANES
    for unit in range(begin, end):
        b, block = unit // blocks, unit % blocks
        first = block * LANES
        count = min(LANES, channels - first)
        scratch = np.empty(2 * size * vector + 64, np.uint8)
        rates = (scratch.ctypes.data + 63) // 64 * 64
        states = rates + size * vector
        for n in range(size):
            rate = gather(table[A_, 0] + (first * size + n) * item, size * item, count, like) * LOG2E
            store(rates + n * vector, rate)
            state = full(like, 0.0)
            if table[INITIAL, 0] != 0:
                state = gather(_place(table, INITIAL, b, first) + n * item, size * item, count, like)
            store(states + n * vector, state)
        bias = _optional(table, BIAS, first, count, like)
        direct = _optional(table, D_, first, count, like)
        for t in range(length):
            if t % CHUNK == 0:
                saved = _place(table, CHECKPOINTS, b, t // CHUNK) + block * size * vector
                for n in range(size):
                    store(saved + n * vector, load(states + n * vector, like))
            dt = _take(_place(table, DELTA, b, t) + first * item, count, like) + bias
            if with_softplus:
                dt = softplus(dt)
            u = _take(_place(table, U, b, t) + first * item, count, like)
            drive = dt * u
            y = direct * u
            row_b, row_c = _place(table, B_, b, t), _place(table, C_, b, t)
            for n in range(size):
                decay = exp2(dt * load(rates + n * vector, like))
                state = decay * load(states + n * vector, like) + drive * read(row_b + n * item, like)
                store(states + n * vector, state)
                y = y + state * read(row_c + n * item, like)
            if table[Z, 0] != 0:
                z = _take(_place(table, Z, b, t) + first * item, count, like)
                y = y * z * sigmoid(z)
            _put(_place(table, Y, b, t) + first * item, y, count, like)
        for n in range(size):
            final = _place(table, FINAL, b, first) + n * item
            scatter(final, size * item, count, load(states + n * vector, like))
        scratch[0] = 0  # It must live until here.


@njit(nogil=True, fastmath=FAST, cache=True)
def selective_scan_bwd_kernel(begin, end, table, length, channels, size, groups, with_softplus, like):
    """All gradients of units `begin` to `end`, each a group of blocks of a sequence; tensors are in `table`."""
    item = bytes_of(like)
    vector = LANES * item
    blocks = (channels + LANES - 1) // LANES
    each = (blocks + groups - 1) // groups
    tile = STATES * vector
    for unit in range(begin, end):
        b, group = unit // groups, unit % groups
        scratch = np.empty((3 * size + 9 * CHUNK + (2 * CHUNK + 1) * STATES) * vector + 64, np.uint8)
        rates = (scratch.ctypes.data + 63) // 64 * 64
        costates = rates + size * vector
        slopes = costates + size * vector
        steps = slopes + size * vector
        values, drives, grads = steps + CHUNK * vector, steps + 2 * CHUNK * vector, steps + 3 * CHUNK * vector
        outputs, into_drives, into_steps = (
            grads + CHUNK * vector,
            grads + 2 * CHUNK * vector,
            grads + 3 * CHUNK * vector,
        )
        bends, gates = into_steps + CHUNK * vector, into_steps + 2 * CHUNK * vector
        states = gates + CHUNK * vector
        decays = states + (CHUNK + 1) * tile
        for block in range(group * each, min((group + 1) * each, blocks)):
            first = block * LANES
            count = min(LANES, channels - first)
            bias = _optional(table, BIAS, first, count, like)
            direct = _optional(table, D_, first, count, like)
            zero = full(like, 0.0)
            bias_grad, direct_grad = zero, zero
            for n in range(size):
                store(
                    rates + n * vector,
                    gather(table[A_, 0] + (first * size + n) * item, size * item, count, like) * LOG2E,
                )
                costate = zero
                if table[DFINAL, 0] != 0:
                    costate = gather(_place(table, DFINAL, b, first) + n * item, size * item, count, like)
                store(costates + n * vector, costate)
                store(slopes + n * vector, zero)
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                start = chunk * CHUNK
                steps_here = min(CHUNK, length - start)
                for s in range(steps_here):
                    dt = _take(_place(table, DELTA, b, start + s) + first * item, count, like) + bias
                    if with_softplus:
                        store(bends + s * vector, softplus_slope(dt))
                        dt = softplus(dt)
                    u = _take(_place(table, U, b, start + s) + first * item, count, like)
                    grad = _take(_place(table, DY, b, start + s) + first * item, count, like)
                    if table[Z, 0] != 0:
                        z = _take(_place(table, Z, b, start + s) + first * item, count, like)
                        gate = sigmoid(z)
                        store(gates + s * vector, gate)
                        grad = grad * z * gate
                    store(steps + s * vector, dt)
                    store(values + s * vector, u)
                    store(drives + s * vector, dt * u)
                    store(grads + s * vector, grad)
                    store(outputs + s * vector, direct * u)
                    store(into_drives + s * vector, zero)
                    store(into_steps + s * vector, zero)
                saved = _place(table, CHECKPOINTS, b, chunk) + block * size * vector
                for low in range(0, size, STATES):
                    width = min(STATES, size - low)
                    for n in range(width):
                        store(states + n * vector, load(saved + (low + n) * vector, like))
                    for s in range(steps_here):
                        dt, drive = load(steps + s * vector, like), load(drives + s * vector, like)
                        y = load(outputs + s * vector, like)
                        row_b, row_c = _place(table, B_, b, start + s), _place(table, C_, b, start + s)
                        for n in range(width):
                            decay = exp2(dt * load(rates + (low + n) * vector, like))
                            state = load(states + s * tile + n * vector, like)
                            state = decay * state + drive * read(row_b + (low + n) * item, like)
                            store(decays + s * tile + n * vector, decay)
                            store(states + (s + 1) * tile + n * vector, state)
                            y = y + state * read(row_c + (low + n) * item, like)
                        store(outputs + s * vector, y)
                    for s in range(steps_here - 1, -1, -1):
                        dt, drive = load(steps + s * vector, like), load(drives + s * vector, like)
                        grad = load(grads + s * vector, like)
                        into_drive, into_step = (
                            load(into_drives + s * vector, like),
                            load(into_steps + s * vector, like),
                        )
                        row_b, row_c = _place(table, B_, b, start + s), _place(table, C_, b, start + s)
                        sums = _place(table, DBC, unit, start + s)
                        for n in range(width):
                            g = load(costates + (low + n) * vector, like) + grad * read(row_c + (low + n) * item, like)
                            add_sums(
                                sums + 2 * (low + n) * item,
                                g * drive,
                                grad * load(states + (s + 1) * tile + n * vector, like),
                            )
                            into_drive = into_drive + g * read(row_b + (low + n) * item, like)
                            carried = g * load(decays + s * tile + n * vector, like)
                            store(costates + (low + n) * vector, carried)
                            through = carried * load(states + s * tile + n * vector, like)
                            into_step = into_step + through * load(rates + (low + n) * vector, like)
                            slope = load(slopes + (low + n) * vector, like) + through * dt
                            store(slopes + (low + n) * vector, slope)
                        store(into_drives + s * vector, into_drive)
                        store(into_steps + s * vector, into_step)
                for s in range(steps_here):
                    u, grad = load(values + s * vector, like), load(grads + s * vector, like)
                    into_drive = load(into_drives + s * vector, like)
                    du = into_drive * load(steps + s * vector, like) + grad * direct
                    _put(_place(table, DU, b, start + s) + first * item, du, count, like)
                    ddelta = into_drive * u + load(into_steps + s * vector, like) * LN2
                    if with_softplus:
                        ddelta = ddelta * load(bends + s * vector, like)
                    _put(_place(table, DDELTA, b, start + s) + first * item, ddelta, count, like)
                    bias_grad = bias_grad + ddelta
                    direct_grad = direct_grad + grad * u
                    if table[Z, 0] != 0:
                        z = _take(_place(table, Z, b, start + s) + first * item, count, like)
                        gate = load(gates + s * vector, like)
                        dz = _take(_place(table, DY, b, start + s) + first * item, count, like) * gate
                        dz = dz * load(outputs + s * vector, like) * (z * (full(like, 1.0) - gate) + 1.0)
                        _put(_place(table, DZ, b, start + s) + first * item, dz, count, like)
            for n in range(size):
                scatter(_place(table, DA, b, first) + n * item, size * item, count, load(slopes + n * vector, like))
                start_grad = load(costates + n * vector, like)
                scatter(_place(table, DINITIAL, b, first) + n * item, size * item, count, start_grad)
            _put(_place(table, DBIAS, b, first), bias_grad, count, like)
            _put(_place(table, DD, b, first), direct_grad, count, like)
        scratch[0] = 0  # It must live until here.
