"""The Triton kernel of the state Gramian: a program per share of the channels and pair of tiles of states.

A program goes through time with the states of two tiles, each (H_BLOCK, TILE), in registers, and adds the products of
those of nonzero weight. These sums are float32 over `SPAN` steps of one block of channels, and float64 in memory over
all blocks of the program; the programs' sums are added in a fixed order outside.

Shapes: batch B, length L, G groups of H channels each, N states. Decays are powers of two, with rates A log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(pointer, stride, offsets, within, left, T: tl.constexpr):
    """T rows of a tensor as a tuple of float32; zeros from row `left` on."""
    rows = ()
    for t in tl.static_range(T):
        rows = rows + (tl.load(pointer + offsets, mask=within & (t < left), other=0).to(tl.float32),)
        pointer += stride
    return rows


@triton.jit
def _factors(weights, stride, left, T: tl.constexpr):
    """The weights at T steps, zeros from step `left` on; ones if there are none."""
    factors = ()
    for t in tl.static_range(T):
        if weights is None:
            factors = factors + ((t < left).to(tl.float32),)
        else:
            factors = factors + (tl.load(weights, mask=t < left, other=0).to(tl.float32),)
            weights += stride
    return factors


@triton.jit
def _rates(A, channels, states, within, size, SHARED: tl.constexpr):
    """(H_BLOCK, 1) if all states of a channel decay alike, else (H_BLOCK, TILE)."""
    if SHARED:
        rates = tl.load(A + channels, mask=within, other=0)[:, None]
    else:
        valid = within[:, None] & (states < size)[None, :]
        rates = tl.load(A + channels[:, None] * size + states[None, :], mask=valid, other=0)
    return rates


@triton.jit(do_not_specialize=["length", "size", "width", "blocks", "units", "each"])
def state_gramian_fwd_kernel(
    u, dt, A, B, weights, sums,
    length, size, width, blocks, units, each,
    u_b, u_t, u_h, dt_b, dt_t, dt_h, B_b, B_t, B_g, B_n, w_b, w_t,
    DIAGONAL: tl.constexpr, SHARED: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, H_BLOCK: tl.constexpr,
    T: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Sums (G, pairs, programs, TILE, TILE) of products of states, a tile for each pair of tiles of states."""
    group = tl.program_id(2).to(tl.int64)
    pair = tl.program_id(1)
    # The pairs in the order (0, 0), (1, 1), ... or (1, 0), (2, 0), (2, 1), ...
    i = pair
    j = pair
    if not DIAGONAL:
        i = 1
        for row in tl.static_range(2, TILES):
            i += (pair >= row * (row - 1) // 2).to(tl.int32)
        j = pair - i * (i - 1) // 2
    states = tl.arange(0, TILE)
    first = (i * TILE + states).to(tl.int64)
    second = (j * TILE + states).to(tl.int64)
    program = (group * tl.num_programs(1) + pair) * tl.num_programs(0) + tl.program_id(0)
    place = sums + program * TILE * TILE + states[:, None] * TILE + states[None, :]
    hop = tl.full([], T, tl.int64)
    for unit in range(tl.program_id(0) * each, tl.minimum(units, (tl.program_id(0) + 1) * each)):
        b = (unit // blocks).to(tl.int64)
        channels = (unit % blocks) * H_BLOCK + tl.arange(0, H_BLOCK)
        within = channels < width
        channels = group * width + channels
        rate_i = _rates(A, channels, first, within, size, SHARED)
        rate_j = rate_i if SHARED or DIAGONAL else _rates(A, channels, second, within, size, SHARED)
        state_i = tl.zeros([H_BLOCK, TILE], tl.float32)
        state_j = tl.zeros([H_BLOCK, TILE], tl.float32)
        u_rows = u + b * u_b
        dt_rows = dt + b * dt_b
        B_rows = B + b * B_b + group * B_g
        w_rows = weights
        if weights is not None:
            w_rows += b * w_b
        steps = _rows(dt_rows, dt_t, channels * dt_h, within, length, T)
        values = _rows(u_rows, u_t, channels * u_h, within, length, T)
        into_i = _rows(B_rows, B_t, first * B_n, first < size, length, T)
        into_j = into_i if DIAGONAL else _rows(B_rows, B_t, second * B_n, second < size, length, T)
        factors = _factors(w_rows, w_t, length, T)
        for start in range(0, tl.cast(length, tl.int64), SPAN):
            total = tl.zeros([TILE, TILE], tl.float32)
            for at in range(start, tl.minimum(start + SPAN, length), T):
                left = length - at
                dt_rows += hop * dt_t
                u_rows += hop * u_t
                B_rows += hop * B_t
                if weights is not None:
                    w_rows += hop * w_t
                # Loaded one tile ahead, and not only for speed: where Triton sees operands of a product arise from
                # narrower numbers within a loop, it takes tensor cores and their ten bits on Blackwell, "ieee" or not.
                next_steps = _rows(dt_rows, dt_t, channels * dt_h, within, left - T, T)
                next_values = _rows(u_rows, u_t, channels * u_h, within, left - T, T)
                next_i = _rows(B_rows, B_t, first * B_n, first < size, left - T, T)
                next_j = next_i if DIAGONAL else _rows(B_rows, B_t, second * B_n, second < size, left - T, T)
                next_factors = _factors(w_rows, w_t, left - T, T)
                for t in tl.static_range(T):
                    drive = (steps[t] * values[t])[:, None]
                    decay_i = tl.exp2(steps[t][:, None] * rate_i)
                    state_i = decay_i * state_i + drive * into_i[t][None, :]
                    if not DIAGONAL:
                        decay_j = decay_i if SHARED else tl.exp2(steps[t][:, None] * rate_j)
                        state_j = decay_j * state_j + drive * into_j[t][None, :]
                    if factors[t] != 0:
                        counted = state_i * factors[t]
                        seen = state_i if DIAGONAL else state_j
                        total = tl.dot(tl.trans(counted), seen, total, input_precision="ieee")
                steps = next_steps
                values = next_values
                into_i = next_i
                into_j = next_j
                factors = next_factors
            tl.store(place, tl.load(place) + total.to(tl.float64))
            # Other threads of this program may read what these have just stored.
            tl.debug_barrier()
