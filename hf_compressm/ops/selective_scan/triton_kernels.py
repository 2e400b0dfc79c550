"""Triton kernels of the selective scan: a program per sequence and block of channels, an associative scan over tiles.

A program goes through time in tiles of (T, H_BLOCK) and, within a tile, through the states one by one, so the cost is
linear in N. The states at the end of a tile go through memory to the next one; every `CHUNK` steps they are kept, and
the backward pass recomputes those between. No quantity is divided by a decay or found by subtraction: the backward
pass scans with the decays of the steps before and after instead. Sums over channels are formed per program and added
in a fixed order outside.

Shapes: batch B, length L, H channels, N states, K chunks. Decays are powers of two, with rates A log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _compose(decay, state, next_decay, next_state):
    return decay * next_decay, state * next_decay + next_state


@triton.jit
def _sigmoid(x):
    small = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _softplus(x, TERMS: tl.constexpr):
    # log(1 + e) = 2 artanh(e / (2 + e)), with small relative error for small step sizes.
    small = tl.exp2(-tl.abs(x) * LOG2E)
    s = small / (2.0 + small)
    square = s * s
    series = tl.zeros_like(x) + 2.0 / (2 * TERMS - 1)
    for k in tl.static_range(1, TERMS):
        series = series * square + 2.0 / (2 * TERMS - 1 - 2 * k)
    return tl.where(x > 20, x, tl.where(x < 0, 0.0, x) + s * series)


@triton.jit
def _step_sizes(delta, mask, SOFTPLUS: tl.constexpr, TERMS: tl.constexpr):
    """From delta + bias; zero where masked, which leaves a state as it is."""
    if SOFTPLUS:
        delta = _softplus(delta, TERMS)
    return tl.where(mask, delta, 0.0)


@triton.jit
def _tile(pointer, stride, rows, columns, mask, DTYPE: tl.constexpr):
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0).to(DTYPE)


@triton.jit
def _optional(pointer, columns, mask, DTYPE: tl.constexpr):
    """Per-channel numbers; zeros if there are none."""
    if pointer is None:
        return tl.zeros_like(columns).to(DTYPE)
    return tl.load(pointer + columns, mask=mask, other=0).to(DTYPE)


@triton.jit
def _rows(pointer, stride, columns, left, within, DTYPE: tl.constexpr, T: tl.constexpr):
    """T rows of a tensor as a tuple; zeros from row `left` on."""
    rows = ()
    for t in tl.static_range(T):
        rows = rows + (tl.load(pointer + columns, mask=within & (t < left), other=0).to(DTYPE),)
        # Step by step: the offsets of all rows, hoisted out of the loops, would fill the registers.
        pointer += stride
    return rows


@triton.jit
def _store_row(pointer, tile, row: tl.constexpr, columns, within):
    """One row of a tile, without a reduction."""
    rows = tl.arange(0, tile.shape[0])[:, None]
    tl.store(pointer + columns[None, :] + 0 * rows, tile, mask=(rows == row) & within[None, :])


@triton.jit(do_not_specialize=["length", "size"])
def selective_scan_fwd_kernel(
    u, delta, A, B, C, D, z, bias, y, checkpoints,
    length, channels, size,
    u_b, u_t, delta_b, delta_t, z_b, z_t,
    SOFTPLUS: tl.constexpr, TERMS: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr, H_BLOCK: tl.constexpr,
):  # fmt: skip
    """y (B, L, H), the states before each chunk and the last ones; arguments as `triton.py` makes them."""
    DTYPE: tl.constexpr = checkpoints.dtype.element_ty
    blocks = tl.cdiv(channels, H_BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * H_BLOCK + tl.arange(0, H_BLOCK)
    rows = tl.arange(0, T)
    within = columns < channels
    offset = _optional(bias, columns, within, DTYPE)
    direct = _optional(D, columns, within, DTYPE)
    chunks = tl.cdiv(length, CHUNK)
    padded = tl.cast(chunks, tl.int64) * CHUNK
    plane = tl.cast(size, tl.int64) * channels
    hop = tl.full([], T, tl.int64)
    checkpoints += b * (chunks + 2) * plane
    carry = checkpoints
    u += b * u_b
    delta += b * delta_b
    B += b * size * padded
    C += b * size * padded
    y += b * length * channels
    if z is not None:
        z += b * z_b
    tiles = tl.cdiv(length, T)
    for tile in range(tiles):
        mask = (rows < length - tile * T)[:, None] & within[None, :]
        # Half-way through a chunk the states go through the plane after the last one.
        kept = ((tile + 1) % (CHUNK // T) == 0) | (tile == tiles - 1)
        ends = checkpoints + tl.where(kept, tl.cdiv((tile + 1) * T, CHUNK), chunks + 1) * plane
        dt = _tile(delta, delta_t, rows, columns, mask, DTYPE) + offset[None, :]
        dt = _step_sizes(dt, mask, SOFTPLUS, TERMS)
        value = _tile(u, u_t, rows, columns, mask, DTYPE)
        drive = dt * value
        output = value * direct[None, :]
        for n in range(size):
            at = tl.cast(n, tl.int64) * channels
            rate = tl.load(A + at + columns, mask=within, other=0)
            before = tl.load(carry + at + columns, mask=within, other=0)
            into = tl.load(B + n * padded + rows)
            read = tl.load(C + n * padded + rows)
            decay = tl.exp2(dt * rate[None, :])
            driven = drive * into[:, None] + tl.where(rows[:, None] == 0, decay * before[None, :], 0.0)
            _, state = tl.associative_scan((decay, driven), 0, _compose)
            output += state * read[:, None]
            _store_row(ends + at, state, T - 1, columns, within)
        if z is not None:
            gate = _tile(z, z_t, rows, columns, mask, DTYPE)
            output *= gate * _sigmoid(gate)
            z += hop * z_t
        tl.store(y + rows[:, None] * channels + columns[None, :], output.to(y.dtype.element_ty), mask=mask)
        u += hop * u_t
        delta += hop * delta_t
        B += T
        C += T
        y += hop * channels
        carry = ends
        # Other threads of this program read what these have just stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["length", "size", "each"])
def selective_scan_bwd_kernel(
    u, delta, A, B, C, D, z, bias, dy, checkpoints, between, costates, du, ddelta, dA, dB, dC, dD, dz, dbias,
    length, channels, size, groups, each,
    u_b, u_t, delta_b, delta_t, z_b, z_t, dy_b, dy_t,
    SOFTPLUS: tl.constexpr, TERMS: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr, H_BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients; arguments as `triton.py` makes them."""
    DTYPE: tl.constexpr = checkpoints.dtype.element_ty
    b = (tl.program_id(0) // groups).to(tl.int64)
    first = (tl.program_id(0) % groups) * each
    chunks = tl.cdiv(length, CHUNK)
    padded = tl.cast(chunks, tl.int64) * CHUNK
    plane = tl.cast(size, tl.int64) * channels
    checkpoints += b * (chunks + 2) * plane
    between += b * (CHUNK // T) * plane
    costates += b * plane
    dA += b * plane
    # Of this program: (N, L).
    dB += tl.program_id(0).to(tl.int64) * size * padded
    dC += tl.program_id(0).to(tl.int64) * size * padded
    for i in range(each):
        columns = (first + i) * H_BLOCK + tl.arange(0, H_BLOCK)
        within = columns < channels
        offset = _optional(bias, columns, within, DTYPE)
        direct = _optional(D, columns, within, DTYPE)
        sum_direct = tl.zeros([H_BLOCK], DTYPE)
        sum_offset = tl.zeros([H_BLOCK], DTYPE)
        for earlier in range(chunks):
            chunk = chunks - 1 - earlier
            kept = checkpoints + chunk * plane
            tiles = tl.minimum(tl.cdiv(length - chunk * CHUNK, T), CHUNK // T)
            # First the states at the ends of this chunk's tiles but the last, then the tiles backwards.
            for turn in range(2 * tiles - 1):
                tile = tl.where(turn < tiles - 1, turn, 2 * tiles - 2 - turn)
                start = tl.cast(chunk, tl.int64) * CHUNK + tile * T
                left = length - chunk * CHUNK - tile * T
                carry = tl.where(tile == 0, kept, between + tile * plane)
                values = _rows(u + b * u_b + start * u_t, u_t, columns, left, within, DTYPE, T)
                raw = _rows(delta + b * delta_b + start * delta_t, delta_t, columns, left, within, DTYPE, T)
                steps = ()
                drives = ()
                for t in tl.static_range(T):
                    dt = _step_sizes(raw[t] + offset, within & (t < left), SOFTPLUS, TERMS)
                    steps = steps + (dt,)
                    drives = drives + (dt * values[t],)
                if turn < tiles - 1:
                    for n in range(size):
                        at = tl.cast(n, tl.int64) * channels + columns
                        rate = tl.load(A + at, mask=within, other=0)
                        state = tl.load(carry + at, mask=within, other=0)
                        B_row = B + (b * size + n) * padded + start
                        for t in tl.static_range(T):
                            state = tl.exp2(steps[t] * rate) * state + drives[t] * tl.load(B_row + t)
                        tl.store(between + (tile + 1) * plane + at, state, mask=within)
                else:
                    grads = _rows(dy + b * dy_b + start * dy_t, dy_t, columns, left, within, DTYPE, T)
                    if z is not None:
                        gates = _rows(z + b * z_b + start * z_t, z_t, columns, left, within, DTYPE, T)
                        gated = ()
                        for t in tl.static_range(T):
                            gated = gated + (grads[t] * gates[t] * _sigmoid(gates[t]),)
                        grads = gated
                    outputs = ()
                    into_drives = ()
                    into_steps = ()
                    for t in tl.static_range(T):
                        outputs = outputs + (values[t] * direct,)
                        into_drives = into_drives + (tl.zeros([H_BLOCK], DTYPE),)
                        into_steps = into_steps + (tl.zeros([H_BLOCK], DTYPE),)
                    for n in range(size):
                        at = tl.cast(n, tl.int64) * channels + columns
                        rate = tl.load(A + at, mask=within, other=0)
                        state = tl.load(carry + at, mask=within, other=0)
                        B_row = B + (b * size + n) * padded + start
                        C_row = C + (b * size + n) * padded + start
                        into = ()
                        read = ()
                        decays = ()
                        states = (state,)
                        sums = ()
                        for t in tl.static_range(T):
                            into = into + (tl.load(B_row + t),)
                            read = read + (tl.load(C_row + t),)
                            decays = decays + (tl.exp2(steps[t] * rate),)
                            state = decays[t] * state + drives[t] * into[t]
                            states = states + (state,)
                            sums = sums + (outputs[t] + state * read[t],)
                        outputs = sums
                        costate = tl.load(costates + at, mask=within, other=0)
                        slope = tl.load(dA + at, mask=within & (left > T), other=0)
                        place = n * padded + start
                        drive_sums = ()
                        step_sums = ()
                        for t in tl.static_range(T - 1, -1, -1):
                            pulled = costate + grads[t] * read[t]
                            sum_into = tl.sum(pulled * drives[t], 0) + tl.load(dB + place + t, mask=i > 0, other=0)
                            sum_read = tl.sum(grads[t] * states[t + 1], 0)
                            sum_read += tl.load(dC + place + t, mask=i > 0, other=0)
                            tl.store(dB + place + t, sum_into)
                            tl.store(dC + place + t, sum_read)
                            costate = pulled * decays[t]
                            through = costate * states[t]
                            slope += through * steps[t]
                            drive_sums = (into_drives[t] + pulled * into[t],) + drive_sums
                            step_sums = (into_steps[t] + through * rate,) + step_sums
                        into_drives = drive_sums
                        into_steps = step_sums
                        tl.store(costates + at, costate, mask=within)
                        tl.store(dA + at, slope, mask=within)
                    out = (b * length + start) * channels + columns
                    raw = _rows(delta + b * delta_b + start * delta_t, delta_t, columns, left, within, DTYPE, T)
                    if z is not None:
                        gates = _rows(z + b * z_b + start * z_t, z_t, columns, left, within, DTYPE, T)
                        above = _rows(dy + b * dy_b + start * dy_t, dy_t, columns, left, within, DTYPE, T)
                    for t in tl.static_range(T):
                        valid = within & (t < left)
                        slope = into_drives[t] * steps[t] + grads[t] * direct
                        tl.store(du + out, slope.to(du.dtype.element_ty), mask=valid)
                        slope = into_drives[t] * values[t] + into_steps[t] * LN2
                        if SOFTPLUS:
                            slope *= tl.where(raw[t] + offset > 20, 1.0, _sigmoid(raw[t] + offset))
                        slope = tl.where(valid, slope, 0.0)
                        tl.store(ddelta + out, slope.to(ddelta.dtype.element_ty), mask=valid)
                        sum_offset += slope
                        sum_direct += grads[t] * values[t]
                        if z is not None:
                            opening = _sigmoid(gates[t])
                            slope = above[t] * outputs[t] * opening * (1.0 + gates[t] * (1.0 - opening))
                            tl.store(dz + out, slope.to(dz.dtype.element_ty), mask=valid)
                        out += channels
                # Other threads of this program may read what these have just stored.
                tl.debug_barrier()
        tl.store(dD + b * channels + columns, sum_direct, mask=within)
        tl.store(dbias + b * channels + columns, sum_offset, mask=within)
