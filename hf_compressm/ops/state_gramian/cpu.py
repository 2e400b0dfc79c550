"""The state Gramian on the CPU: a Numba kernel writes the states of nonzero weight, matrix products sum them.

Shapes: batch B, length L, I channels in G groups, each in blocks of 16 channels, N states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..lanes import LANES, LOG2E, bytes_of, exp2, full, gather, load, read, scatter, store
from ..memory import row_contiguous
from ..threads import run_units
from .op import Inputs

FAST = {"contract", "nsz", "arcp"}
STRETCH_BYTES = 1 << 22
"""Most bytes of states that wait for their product: what a core's cache holds."""
TILE = 32
"""Rows of a product; of a symmetric matrix only the tiles up to the diagonal are computed."""
# Rows of the table of tensors: address and the strides of its first three dimensions in bytes; address 0 for none.
U, DT, A_, B_, WEIGHTS, CARRY, SEEN = range(7)


@njit(inline="always")
def _place(table, which, i, j):
    return table[which, 0] + i * table[which, 1] + j * table[which, 2]


@njit(nogil=True, fastmath=FAST, cache=True)
def state_gramian_fwd_kernel(begin, end, table, places, start, stop, channels, groups, size, rates, like):
    """States of nonzero weight, times the weight, of units `begin` to `end`: blocks of 16 channels of a sequence.

    Starts from the states in CARRY (B, blocks, N, 16), goes through time steps `start` to `stop` - 1, and writes those
    of nonzero WEIGHTS (B, L), times the weight, into SEEN (G, N, looks, I / G), those of sequence b from places[b] on.
    """
    item = bytes_of(like)
    vector = LANES * item
    width = channels // groups
    blocks = (width + LANES - 1) // LANES
    for unit in range(begin, end):
        b, g, block = unit // (groups * blocks), unit // blocks % groups, unit % blocks
        first = block * LANES
        count = min(LANES, width - first)
        at = (g * width + first) * item
        states = table[CARRY, 0] + unit * size * vector
        scratch = np.empty(rates * vector + 64, np.uint8)
        slopes = (scratch.ctypes.data + 63) // 64 * 64
        for n in range(rates):
            rate = gather(_place(table, A_, g * width + first, n), table[A_, 1], count, like) * LOG2E
            store(slopes + n * vector, rate)
        seen = table[SEEN, 0] + g * table[SEEN, 1] + places[b] * table[SEEN, 3] + first * item
        for t in range(start, stop):
            dt = gather(_place(table, DT, b, t) + at, item, count, like)
            drive = dt * gather(_place(table, U, b, t) + at, item, count, like)
            row = table[B_, 0] + b * table[B_, 1] + t * table[B_, 2] + g * table[B_, 3]
            factor = read(_place(table, WEIGHTS, b, t), like)
            looked, weight = factor != 0, full(like, factor)
            decay = exp2(dt * load(slopes, like))
            for n in range(size):
                if rates > 1:
                    decay = exp2(dt * load(slopes + n * vector, like))
                state = decay * load(states + n * vector, like) + drive * read(row + n * item, like)
                store(states + n * vector, state)
                if looked:
                    if count == LANES:
                        store(seen + n * table[SEEN, 2], state * weight)
                    else:
                        scatter(seen + n * table[SEEN, 2], item, count, state * weight)
            if looked:
                seen += width * item
        scratch[0] = 0  # It must live until here.


@torch.no_grad()
def forward(inputs: Inputs) -> Tensor:
    """float64 (G, N, N), see `state_gramian` of the package; products in float32, their sums in float64."""
    u, dt, A, B, weights, _ = inputs
    batch, length, channels = u.shape
    groups, size = B.shape[2:]
    width = channels // groups
    blocks = -(-width // LANES)
    weights = torch.ones(1, 1).expand(batch, length) if weights is None else weights.float()
    rows = (row_contiguous(tensor.float()) for tensor in (u, dt, B))
    tensors = dict(zip((U, DT, B_), rows, strict=True)) | {A_: A.float().contiguous()}
    tensors[WEIGHTS] = weights.sqrt()  # of both factors of a product
    tensors[CARRY] = torch.zeros(batch, groups, blocks, size, LANES)
    looked = weights != 0
    stretches = _stretches(looked.sum(0).tolist(), max(1, STRETCH_BYTES // (4 * groups * size * width)))
    storage = torch.empty(max((looks for *_, looks in stretches), default=0) * size * channels)
    total = torch.zeros(groups, size, size, dtype=torch.float64)
    for start, stop, looks in stretches:
        counts = looked[:, start:stop].sum(1)
        seen = storage[: looks * size * channels].view(groups, size, looks, width)
        places = (counts.cumsum(0) - counts).numpy()
        given = (_table(tensors | {SEEN: seen}), places, start, stop, channels, groups, size, A.shape[1])
        run_units(state_gramian_fwd_kernel, batch * groups * blocks, *given, np.float32(0))
        flat = seen.flatten(2)
        for low in range(0, size, TILE):
            high = min(low + TILE, size)
            total[:, low:high, :high] += flat[:, low:high] @ flat[:, :high].mT
    return total.tril() + total.tril(-1).mT


def _stretches(counts: list[int], room: int) -> list[tuple[int, int, int]]:
    """Stretches of time with at most `room` states of nonzero weight, or of one step: (start, end, number of these).

    The last one ends with the sequence.
    """
    stretches, start, looks = [], 0, 0
    for step, count in enumerate(counts):
        if looks and looks + count > room:
            stretches.append((start, step, looks))
            start, looks = step, 0
        looks += count
    return [*stretches, (start, len(counts), looks)] if looks else stretches


def _table(tensors: dict[int, Tensor]) -> Any:
    table = np.zeros((SEEN + 1, 4), dtype=np.int64)
    for which, tensor in tensors.items():
        strides = [stride * tensor.element_size() for stride in tensor.stride()[:3]]
        table[which, : len(strides) + 1] = tensor.data_ptr(), *strides
    return table
