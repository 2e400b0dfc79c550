"""Triton kernels of Mamba-2's scan in chunks: matrix products of tiles, states between chunks by a pass over time.

With s the running sum of dt A within a chunk and S the state before it, y_t = sum_{u <= t} exp(s_t - s_u) (C_t . B_u)
dt_u x_u + exp(s_t) S C_t. The blocks of states divide N, rounded up to 16, so the cost follows that number. Sums over
the steps of a chunk, which the gradient of the decay needs, leave out the terms that would cancel.

Shapes: batch B, H heads of P channels, G groups, N states, K chunks of T steps. Step sizes, running sums and all else
that there is per step and head are (B, H, K T), zero steps at the end; states are (B, K, H, P, N).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION)


@triton.jit
def _tile(pointer, rows, columns, row_stride, column_stride, row_mask, column_mask):
    """A tile of a matrix, zero outside of it."""
    where = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(where, mask=row_mask[:, None] & column_mask[None, :], other=0)


@triton.jit
def _decays(later, earlier, lower):
    """exp(s_t - s_u) where `lower`, else 0, without an overflow elsewhere."""
    return tl.where(lower, tl.exp(tl.where(lower, later - earlier, 0.0)), 0.0)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_scan_outer_kernel(
    x, matrix, weight, out,
    length, heads, width, size, per_group, chunks, x_b, x_t, x_h, m_b, m_t, m_g,
    T: tl.constexpr, P_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_k (P, N) = sum_t weight_t x_t matrix_t^T over the steps of each chunk."""
    p_blocks, n_blocks = tl.cdiv(width, P_BLOCK), tl.cdiv(size, N_BLOCK)
    tile = tl.program_id(0) % (p_blocks * n_blocks)
    rest = tl.program_id(0) // (p_blocks * n_blocks)
    h, k, b = rest % heads, (rest // heads) % chunks, (rest // heads // chunks).to(tl.int64)
    steps, start = tl.arange(0, T), k.to(tl.int64) * T
    p = (tile // n_blocks) * P_BLOCK + tl.arange(0, P_BLOCK)
    n = (tile % n_blocks) * N_BLOCK + tl.arange(0, N_BLOCK)
    real = steps < length - k * T
    values = _tile(x + b * x_b + start * x_t + h * x_h, steps, p, x_t, 1, real, p < width)
    w = tl.load(weight + (b * heads + h) * chunks * T + start + steps)
    rows = _tile(matrix + b * m_b + start * m_t + h // per_group * m_g, steps, n, m_t, 1, real, n < size)
    found = _dot(tl.trans(values * w[:, None]), rows, OPERAND, PRECISION)
    out += rest.to(tl.int64) * width * size
    tl.store(out + p[:, None] * size + n[None, :], found, mask=(p < width)[:, None] & (n < size)[None, :])


@triton.jit(do_not_specialize=["elements", "chunks"])
def ssd_scan_pass_kernel(
    states, sums, start, end, before, products,
    elements, heads, chunks,
    T: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replaces what each chunk adds to a state (or, in reverse, to a costate) by the state that it is added to.

    In reverse it writes the sum over P and N of exp(s_T) S_k E_k per chunk, with S_k from `before`, in parts.
    """
    blocks = tl.cdiv(elements, BLOCK)
    block, h = tl.program_id(0) % blocks, (tl.program_id(0) // blocks) % heads
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    within = place < elements
    head = (b * heads + h) * elements
    state = tl.zeros([BLOCK], states.dtype.element_ty)
    if start is not None:
        state = tl.load(start + head + place, mask=within, other=0)
    for turn in range(chunks):
        k = turn
        if REVERSE:
            k = chunks - 1 - turn
        at = ((b * chunks + k) * heads + h) * elements + place
        keep = tl.exp(tl.load(sums + (b * heads + h) * chunks * T + tl.cast(k, tl.int64) * T + T - 1))
        gain = tl.load(states + at, mask=within, other=0)
        tl.store(states + at, state, mask=within)
        if REVERSE:
            kept = tl.load(before + at, mask=within, other=0)
            product = tl.sum(kept * state, 0) * keep
            tl.store(products + (block * (tl.num_programs(0) // blocks) + b * heads + h) * chunks + k, product)
        state = keep * state + gain
    tl.store(end + head + place, state, mask=within)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_scan_fwd_kernel(
    x, step, sums, B, C, D, states, y,
    length, heads, width, size, per_group, chunks, x_b, x_t, x_h, b_b, b_t, b_g, c_b, c_t, c_g,
    T: tl.constexpr, P_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, L, H, P), from the states before each chunk."""
    DTYPE: tl.constexpr = states.dtype.element_ty
    p_blocks = tl.cdiv(width, P_BLOCK)
    p = tl.program_id(0) % p_blocks * P_BLOCK + tl.arange(0, P_BLOCK)
    rest = tl.program_id(0) // p_blocks
    h, k, b = rest % heads, (rest // heads) % chunks, (rest // heads // chunks).to(tl.int64)
    steps, start = tl.arange(0, T), k.to(tl.int64) * T
    real = steps < length - k * T
    B += b * b_b + start * b_t + h // per_group * b_g
    C += b * c_b + start * c_t + h // per_group * c_g
    states += rest.to(tl.int64) * width * size
    products = tl.zeros([T, T], DTYPE)
    found = tl.zeros([T, P_BLOCK], DTYPE)
    for first in range(0, size, N_BLOCK):
        n = first + tl.arange(0, N_BLOCK)
        read = _tile(C, steps, n, c_t, 1, real, n < size)
        into = _tile(B, steps, n, b_t, 1, real, n < size)
        products += _dot(read, tl.trans(into), OPERAND, PRECISION)
        state = _tile(states, p, n, size, 1, p < width, n < size)
        found += _dot(read, tl.trans(state), OPERAND, PRECISION)
    head = (b * heads + h) * chunks * T + start + steps
    s, dt = tl.load(sums + head), tl.load(step + head)
    products *= _decays(s[:, None], s[None, :], steps[:, None] >= steps[None, :]) * dt[None, :]
    values = _tile(x + b * x_b + start * x_t + h * x_h, steps, p, x_t, 1, real, p < width)
    found = found * tl.exp(s)[:, None] + _dot(products, values, OPERAND, PRECISION)
    if D is not None:
        found += values.to(DTYPE) * tl.load(D + h)
    y += ((b * length + start) * heads + h) * width
    out = y + steps[:, None] * (heads * width) + p[None, :]
    tl.store(out, found.to(y.dtype.element_ty), mask=real[:, None] & (p < width)[None, :])


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_scan_bwd_x_kernel(
    x, step, sums, B, C, D, states, costates, dy, dx, per_step,
    batch, length, heads, width, size, per_group, chunks,
    x_b, x_t, x_h, b_b, b_t, b_g, c_b, c_t, c_g, dy_b, dy_t, dy_h,
    T: tl.constexpr, P_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx, and per step, head and block of channels: what flows into s by products within the chunk and with S; what
    flows into the decay up to the chunk's end; the gradient of dt but for the decay; dy . x.
    """
    DTYPE: tl.constexpr = states.dtype.element_ty
    p_blocks = tl.cdiv(width, P_BLOCK)
    block, rest = tl.program_id(0) % p_blocks, tl.program_id(0) // p_blocks
    p = block * P_BLOCK + tl.arange(0, P_BLOCK)
    h, k, b = rest % heads, (rest // heads) % chunks, (rest // heads // chunks).to(tl.int64)
    steps, start = tl.arange(0, T), k.to(tl.int64) * T
    real = steps < length - k * T
    B += b * b_b + start * b_t + h // per_group * b_g
    C += b * c_b + start * c_t + h // per_group * c_g
    states += rest.to(tl.int64) * width * size
    costates += rest.to(tl.int64) * width * size
    products = tl.zeros([T, T], DTYPE)  # (u, t)
    through = tl.zeros([T, P_BLOCK], DTYPE)
    found = tl.zeros([T, P_BLOCK], DTYPE)
    for first in range(0, size, N_BLOCK):
        n = first + tl.arange(0, N_BLOCK)
        into = _tile(B, steps, n, b_t, 1, real, n < size)
        read = _tile(C, steps, n, c_t, 1, real, n < size)
        products += _dot(into, tl.trans(read), OPERAND, PRECISION)
        costate = _tile(costates, p, n, size, 1, p < width, n < size)
        through += _dot(into, tl.trans(costate), OPERAND, PRECISION)
        state = _tile(states, p, n, size, 1, p < width, n < size)
        found += _dot(read, tl.trans(state), OPERAND, PRECISION)
    head = (b * heads + h) * chunks * T + start
    s, dt = tl.load(sums + head + steps), tl.load(step + head + steps)
    to_end = tl.exp(tl.load(sums + head + T - 1) - s)
    dy += b * dy_b + start * dy_t + h * dy_h
    values = _tile(x + b * x_b + start * x_t + h * x_h, steps, p, x_t, 1, real, p < width)
    slopes = _tile(dy, steps, p, dy_t, 1, real, p < width)
    flow = tl.exp(s) * tl.sum(found * slopes, 1)
    through *= to_end[:, None]
    to_later = dt * tl.sum(through * values, 1)
    products *= _decays(s[None, :], s[:, None], steps[None, :] >= steps[:, None])
    through += _dot(products, slopes, OPERAND, PRECISION)
    pulled = _dot(values, tl.trans(slopes), OPERAND, PRECISION)
    pulled *= tl.where(steps[None, :] > steps[:, None], products * dt[:, None], 0.0)
    out = per_step + (block * batch + b) * heads * chunks * T + h * chunks * T + start + steps
    kind = tl.cast(p_blocks, tl.int64) * batch * heads * chunks * T
    tl.store(out, flow - tl.sum(pulled, 1))
    tl.store(out + kind, tl.sum(pulled, 0))
    tl.store(out + 2 * kind, to_later)
    tl.store(out + 3 * kind, tl.sum(through * values, 1))
    found = through * dt[:, None]
    if D is not None:
        tl.store(out + 4 * kind, tl.sum(values.to(DTYPE) * slopes, 1))
        found += slopes.to(DTYPE) * tl.load(D + h)
    dx += ((b * length + start) * heads + h) * width
    out = dx + steps[:, None] * (heads * width) + p[None, :]
    tl.store(out, found.to(dx.dtype.element_ty), mask=real[:, None] & (p < width)[None, :])


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_scan_bwd_pairs_kernel(
    x, step, sums, dy, pairs,
    length, heads, width, per_group, chunks, splits, each, x_b, x_t, x_h, dy_b, dy_t, dy_h,
    T: tl.constexpr, P_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What flows into C_t . B_u, summed over `each` heads of a group: (B, K, G, splits, T, T)."""
    groups, program = heads // per_group, tl.program_id(0)
    split, g, k = program % splits, (program // splits) % groups, (program // splits // groups) % chunks
    b = (program // splits // groups // chunks).to(tl.int64)
    steps, start = tl.arange(0, T), k.to(tl.int64) * T
    real = steps < length - k * T
    total = tl.zeros([T, T], pairs.dtype.element_ty)
    for h in range(g * per_group + split * each, g * per_group + tl.minimum((split + 1) * each, per_group)):
        found = tl.zeros([T, T], pairs.dtype.element_ty)
        for first in range(0, width, P_BLOCK):
            p = first + tl.arange(0, P_BLOCK)
            slopes = _tile(dy + b * dy_b + start * dy_t + h * dy_h, steps, p, dy_t, 1, real, p < width)
            values = _tile(x + b * x_b + start * x_t + h * x_h, steps, p, x_t, 1, real, p < width)
            found += _dot(slopes, tl.trans(values), OPERAND, PRECISION)
        head = (b * heads + h) * chunks * T + start + steps
        s, dt = tl.load(sums + head), tl.load(step + head)
        total += found * _decays(s[:, None], s[None, :], steps[:, None] >= steps[None, :]) * dt[None, :]
    out = pairs + program.to(tl.int64) * T * T
    tl.store(out + steps[:, None] * T + steps[None, :], total)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_scan_bwd_bc_kernel(
    x, step, sums, B, C, states, costates, dy, pairs, dB, dC,
    batch, length, heads, width, size, per_group, chunks, splits, each,
    x_b, x_t, x_h, b_b, b_t, b_g, c_b, c_t, c_g, dy_b, dy_t, dy_h,
    T: tl.constexpr, P_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB and dC (splits, B, L, G, N), sums over `each` heads of a group."""
    DTYPE: tl.constexpr = states.dtype.element_ty
    n_blocks, groups = tl.cdiv(size, N_BLOCK), heads // per_group
    n = tl.program_id(0) % n_blocks * N_BLOCK + tl.arange(0, N_BLOCK)
    rest = tl.program_id(0) // n_blocks
    split, g, k = rest % splits, (rest // splits) % groups, (rest // splits // groups) % chunks
    b = (rest // splits // groups // chunks).to(tl.int64)
    steps, start = tl.arange(0, T), k.to(tl.int64) * T
    real = steps < length - k * T
    sum_B = tl.zeros([T, N_BLOCK], DTYPE)
    sum_C = tl.zeros([T, N_BLOCK], DTYPE)
    for h in range(g * per_group + split * each, g * per_group + tl.minimum((split + 1) * each, per_group)):
        head = (b * heads + h) * chunks * T + start
        s, dt = tl.load(sums + head + steps), tl.load(step + head + steps)
        to_end = tl.exp(tl.load(sums + head + T - 1) - s) * dt
        plane = ((b * chunks + k) * heads + h) * width * size
        for first in range(0, width, P_BLOCK):
            p = first + tl.arange(0, P_BLOCK)
            slopes = _tile(dy + b * dy_b + start * dy_t + h * dy_h, steps, p, dy_t, 1, real, p < width)
            state = _tile(states + plane, p, n, size, 1, p < width, n < size)
            sum_C += _dot(slopes, state, OPERAND, PRECISION) * tl.exp(s)[:, None]
            values = _tile(x + b * x_b + start * x_t + h * x_h, steps, p, x_t, 1, real, p < width)
            costate = _tile(costates + plane, p, n, size, 1, p < width, n < size)
            sum_B += _dot(values, costate, OPERAND, PRECISION) * to_end[:, None]
    found = tl.load(pairs + rest.to(tl.int64) * T * T + steps[:, None] * T + steps[None, :])
    into = _tile(B + b * b_b + start * b_t + g * b_g, steps, n, b_t, 1, real, n < size)
    sum_C += _dot(found, into, OPERAND, PRECISION)
    read = _tile(C + b * c_b + start * c_t + g * c_g, steps, n, c_t, 1, real, n < size)
    sum_B += _dot(tl.trans(found), read, OPERAND, PRECISION)
    out = (((split * batch + b) * length + start) * groups + g) * size
    here = out + steps[:, None] * (groups * size) + n[None, :]
    mask = real[:, None] & (n < size)[None, :]
    tl.store(dB + here, sum_B, mask=mask)
    tl.store(dC + here, sum_C, mask=mask)
