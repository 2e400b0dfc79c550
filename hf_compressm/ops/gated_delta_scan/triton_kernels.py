"""Triton kernels of the gated delta rule in chunks: the equations of `chunks.py` on tiles.

States go from chunk to chunk through memory, in blocks of key channels that divide K, rounded up to 16, so the cost
follows that number. A table holds the first token and the number of tokens of each chunk.

Shapes: batch B, length L, G key heads, H value heads, K key channels, V value channels, n chunks of C tokens. Sums of
decays s, beta are (B, n, H, C); pairs of tokens (B, n, H, C, C); states (B, n, H, K, V).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION)


@triton.jit
def _tile(pointer, rows, columns, row_stride, row_mask, column_mask):
    """A tile of a matrix whose columns are neighbours, zero outside of it."""
    where = pointer + rows[:, None] * row_stride + columns[None, :]
    return tl.load(where, mask=row_mask[:, None] & column_mask[None, :], other=0)


@triton.jit
def _put(pointer, rows, columns, row_stride, row_mask, column_mask, value):
    where = pointer + rows[:, None] * row_stride + columns[None, :]
    tl.store(where, value.to(pointer.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit(do_not_specialize=["length", "chunks"])
def gated_delta_scan_pairs_kernel(
    q, k, e, sums, beta, table, raw, mixed, inverse,
    scale, length, heads, channels, per_group, chunks,
    C: tl.constexpr, K_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """N without beta, P, and (I + N diag(beta))^-1 of each chunk and head."""
    DTYPE: tl.constexpr = sums.dtype.element_ty
    h, n = tl.program_id(0) % heads, (tl.program_id(0) // heads) % chunks
    b = (tl.program_id(0) // heads // chunks).to(tl.int64)
    first, real = tl.load(table + 2 * n), tl.arange(0, C) < tl.load(table + 2 * n + 1)
    steps, row = tl.arange(0, C), heads // per_group * channels
    head = ((b * length + first) * (heads // per_group) + h // per_group) * channels
    erased, read = tl.zeros([C, C], DTYPE), tl.zeros([C, C], DTYPE)
    for start in range(0, channels, K_BLOCK):
        c = start + tl.arange(0, K_BLOCK)
        keys = tl.trans(_tile(k + head, steps, c, row, real, c < channels))
        erased += _dot(_tile(e + head, steps, c, row, real, c < channels), keys, OPERAND, PRECISION)
        read += _dot(_tile(q + head, steps, c, row, real, c < channels), keys, OPERAND, PRECISION)
    at = tl.program_id(0).to(tl.int64) * C
    s, weight = tl.load(sums + at + steps), tl.load(beta + at + steps)
    lower, within = steps[:, None] > steps[None, :], steps[:, None] >= steps[None, :]
    decays = tl.exp(tl.where(within, s[:, None] - s[None, :], 0.0))
    erased = tl.where(lower, erased * decays, 0.0)
    square = at * C + steps[:, None] * C + steps[None, :]
    tl.store(raw + square, erased)
    tl.store(mixed + square, tl.where(within, scale * read * decays, 0.0))
    # Row by row: the inverse of the rows above is known.
    found = tl.where(steps[:, None] == steps[None, :], 1.0, 0.0).to(DTYPE)
    erased *= weight[None, :]
    for t in range(1, C):
        line = tl.sum(tl.where(steps[:, None] == t, erased, 0.0), 0)
        line = tl.sum(line[:, None] * found, 0)
        found -= tl.where(steps[:, None] == t, line[None, :], 0.0)
    tl.store(inverse + square, found)


@triton.jit(do_not_specialize=["length", "chunks"])
def gated_delta_scan_fwd_kernel(
    k, e, v, sums, beta, inverse, table, ranges, written, states, final,
    length, heads, channels, width, per_group, chunks,
    PACKED: tl.constexpr, C: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X (B, L, H, V) and the states before chunks, from chunk to chunk; the first state of a sequence is there."""
    DTYPE: tl.constexpr = sums.dtype.element_ty
    blocks = tl.cdiv(width, V_BLOCK)
    j = tl.program_id(0) % blocks * V_BLOCK + tl.arange(0, V_BLOCK)
    h, sequence = (tl.program_id(0) // blocks) % heads, (tl.program_id(0) // blocks // heads).to(tl.int64)
    steps, row, inside = tl.arange(0, C), heads // per_group * channels, j < width
    b = sequence
    if PACKED:
        b = sequence * 0
    last = final + (sequence * heads + h) * channels * width
    begin, end = tl.load(ranges + 2 * sequence), tl.load(ranges + 2 * sequence + 1)
    for n in range(begin, end):
        first, real = tl.load(table + 2 * n), steps < tl.load(table + 2 * n + 1)
        head = ((b * length + first) * (heads // per_group) + h // per_group) * channels
        at = ((b * chunks + n) * heads + h) * C
        s, weight = tl.load(sums + at + steps), tl.load(beta + at + steps)
        total = tl.load(sums + at + C - 1)
        state = states + ((b * chunks + n) * heads + h) * channels * width
        found = tl.zeros([C, V_BLOCK], DTYPE)
        for start in range(0, channels, K_BLOCK):
            c = start + tl.arange(0, K_BLOCK)
            eraser = _tile(e + head, steps, c, row, real, c < channels)
            found += _dot(eraser, _tile(state, c, j, width, c < channels, inside), OPERAND, PRECISION)
        value = v + ((b * length + first) * heads + h) * width
        found = _tile(value, steps, j, heads * width, real, inside).to(DTYPE) - tl.exp(s)[:, None] * found
        solved = tl.load(inverse + at * C + steps[:, None] * C + steps[None, :])
        found = _dot(solved, found, OPERAND, PRECISION)
        out = written + ((b * length + first) * heads + h) * width
        _put(out, steps, j, heads * width, real, inside, found)
        found *= (weight * tl.exp(total - s))[:, None]
        after = last
        if n + 1 < end:
            after = state + tl.cast(heads, tl.int64) * channels * width
        for start in range(0, channels, K_BLOCK):
            c = start + tl.arange(0, K_BLOCK)
            keys = tl.trans(_tile(k + head, steps, c, row, real, c < channels))
            new = tl.exp(total) * _tile(state, c, j, width, c < channels, inside)
            _put(after, c, j, width, c < channels, inside, new + _dot(keys, found, OPERAND, PRECISION))
        # Other threads of this program read what was stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["length", "chunks"])
def gated_delta_scan_output_kernel(
    q, sums, beta, mixed, table, written, states, output,
    scale, length, heads, channels, width, per_group, chunks,
    C: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs (B, L, H, V) of all chunks."""
    DTYPE: tl.constexpr = sums.dtype.element_ty
    blocks = tl.cdiv(width, V_BLOCK)
    j, rest = tl.program_id(0) % blocks * V_BLOCK + tl.arange(0, V_BLOCK), tl.program_id(0) // blocks
    h, n, b = rest % heads, (rest // heads) % chunks, (rest // heads // chunks).to(tl.int64)
    first, real = tl.load(table + 2 * n), tl.arange(0, C) < tl.load(table + 2 * n + 1)
    steps, row, inside = tl.arange(0, C), heads // per_group * channels, j < width
    head = ((b * length + first) * (heads // per_group) + h // per_group) * channels
    at = rest.to(tl.int64) * C
    s, weight = tl.load(sums + at + steps), tl.load(beta + at + steps)
    state = states + rest.to(tl.int64) * channels * width
    found = tl.zeros([C, V_BLOCK], DTYPE)
    for start in range(0, channels, K_BLOCK):
        c = start + tl.arange(0, K_BLOCK)
        queries = _tile(q + head, steps, c, row, real, c < channels)
        found += _dot(queries, _tile(state, c, j, width, c < channels, inside), OPERAND, PRECISION)
    place = ((b * length + first) * heads + h) * width
    values = weight[:, None] * _tile(written + place, steps, j, heads * width, real, inside)
    pairs = tl.load(mixed + at * C + steps[:, None] * C + steps[None, :])
    found = found * (scale * tl.exp(s))[:, None] + _dot(pairs, values, OPERAND, PRECISION)
    _put(output + place, steps, j, heads * width, real, inside, found)


@triton.jit(do_not_specialize=["length", "chunks"])
def gated_delta_scan_bwd_kernel(
    q, k, e, sums, beta, raw, mixed, inverse, table, ranges, written, doutput, costates, dinitial, dx, dbeta,
    scale, batch, length, heads, channels, width, per_group, chunks,
    PACKED: tl.constexpr, C: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of X (B, L, H, V), of the states after chunks, from chunk to chunk, and of beta, in parts.

    The gradient of the last state of a sequence is there.
    """
    DTYPE: tl.constexpr = sums.dtype.element_ty
    blocks = tl.cdiv(width, V_BLOCK)
    block = tl.program_id(0) % blocks
    j = block * V_BLOCK + tl.arange(0, V_BLOCK)
    h, sequence = (tl.program_id(0) // blocks) % heads, (tl.program_id(0) // blocks // heads).to(tl.int64)
    steps, row, inside = tl.arange(0, C), heads // per_group * channels, j < width
    b = sequence
    if PACKED:
        b = sequence * 0
    begin, end = tl.load(ranges + 2 * sequence), tl.load(ranges + 2 * sequence + 1)
    for turn in range(0, end - begin):
        n = end - 1 - turn
        first, real = tl.load(table + 2 * n), steps < tl.load(table + 2 * n + 1)
        head = ((b * length + first) * (heads // per_group) + h // per_group) * channels
        at = ((b * chunks + n) * heads + h) * C
        s, weight = tl.load(sums + at + steps), tl.load(beta + at + steps)
        total = tl.load(sums + at + C - 1)
        costate = costates + ((b * chunks + n) * heads + h) * channels * width
        place = ((b * length + first) * heads + h) * width
        square = at * C + steps[:, None] * C + steps[None, :]
        slopes = _tile(doutput + place, steps, j, heads * width, real, inside).to(DTYPE)
        found = tl.zeros([C, V_BLOCK], DTYPE)
        for start in range(0, channels, K_BLOCK):
            c = start + tl.arange(0, K_BLOCK)
            keys = _tile(k + head, steps, c, row, real, c < channels)
            found += _dot(keys, _tile(costate, c, j, width, c < channels, inside), OPERAND, PRECISION)
        found *= tl.exp(total - s)[:, None]
        found += _dot(tl.trans(tl.load(mixed + square)), slopes, OPERAND, PRECISION)
        into = _dot(tl.trans(tl.load(inverse + square)), found * weight[:, None], OPERAND, PRECISION)
        _put(dx + place, steps, j, heads * width, real, inside, into)
        found -= _dot(tl.trans(tl.load(raw + square)), into, OPERAND, PRECISION)
        found *= _tile(written + place, steps, j, heads * width, real, inside)
        tl.store(dbeta + tl.cast(block, tl.int64) * batch * chunks * heads * C + at + steps, tl.sum(found, 1))
        before = dinitial + (sequence * heads + h) * channels * width
        if n > begin:
            before = costate - tl.cast(heads, tl.int64) * channels * width
        slopes *= (scale * tl.exp(s))[:, None]
        into *= tl.exp(s)[:, None]
        for start in range(0, channels, K_BLOCK):
            c = start + tl.arange(0, K_BLOCK)
            new = tl.exp(total) * _tile(costate, c, j, width, c < channels, inside)
            queries = tl.trans(_tile(q + head, steps, c, row, real, c < channels))
            new += _dot(queries, slopes, OPERAND, PRECISION)
            eraser = tl.trans(_tile(e + head, steps, c, row, real, c < channels))
            new -= _dot(eraser, into, OPERAND, PRECISION)
            _put(before, c, j, width, c < channels, inside, new)
        # Other threads of this program read what was stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["length", "chunks"])
def gated_delta_scan_bwd_pairs_kernel(
    sums, beta, raw, mixed, table, written, doutput, dx, into_raw, into_mixed, flow,
    scale, length, heads, width, chunks,
    C: tl.constexpr, V_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What flows into e_t . k_j and q_t . k_j of each chunk and head, and by them into s."""
    DTYPE: tl.constexpr = sums.dtype.element_ty
    h, n = tl.program_id(0) % heads, (tl.program_id(0) // heads) % chunks
    b = (tl.program_id(0) // heads // chunks).to(tl.int64)
    first, real = tl.load(table + 2 * n), tl.arange(0, C) < tl.load(table + 2 * n + 1)
    steps, at = tl.arange(0, C), tl.program_id(0).to(tl.int64) * C
    s, weight = tl.load(sums + at + steps), tl.load(beta + at + steps)
    place = ((b * length + first) * heads + h) * width
    erased, read = tl.zeros([C, C], DTYPE), tl.zeros([C, C], DTYPE)
    for start in range(0, width, V_BLOCK):
        j = start + tl.arange(0, V_BLOCK)
        inside = j < width
        values = weight[:, None] * _tile(written + place, steps, j, heads * width, real, inside)
        values = tl.trans(values)
        slopes = _tile(doutput + place, steps, j, heads * width, real, inside)
        read += _dot(slopes, values, OPERAND, PRECISION)
        erased -= _dot(_tile(dx + place, steps, j, heads * width, real, inside), values, OPERAND, PRECISION)
    square = at * C + steps[:, None] * C + steps[None, :]
    lower, within = steps[:, None] > steps[None, :], steps[:, None] >= steps[None, :]
    product = erased * tl.load(raw + square) + read * tl.load(mixed + square)
    product = tl.where(lower, product, 0.0)
    tl.store(flow + at + steps, tl.sum(product, 1) - tl.sum(product, 0))
    decays = tl.exp(tl.where(within, s[:, None] - s[None, :], 0.0))
    tl.store(into_raw + square, tl.where(lower, erased * decays, 0.0))
    tl.store(into_mixed + square, tl.where(within, scale * read * decays, 0.0))


@triton.jit(do_not_specialize=["length", "chunks"])
def gated_delta_scan_bwd_keys_kernel(
    q, k, e, sums, beta, into_raw, into_mixed, table, written, doutput, dx, states, costates, dq, dk, de, flows,
    scale, batch, length, heads, channels, width, per_group, chunks,
    C: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and e for each value head, (B, L, H, K); in parts what flows into s from the start of a chunk,
    up to its end, and by the decay of the whole chunk.
    """
    DTYPE: tl.constexpr = sums.dtype.element_ty
    blocks = tl.cdiv(channels, K_BLOCK)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    h, n, b = rest % heads, (rest // heads) % chunks, (rest // heads // chunks).to(tl.int64)
    first, real = tl.load(table + 2 * n), tl.arange(0, C) < tl.load(table + 2 * n + 1)
    c, steps, at = block * K_BLOCK + tl.arange(0, K_BLOCK), tl.arange(0, C), rest.to(tl.int64) * C
    known = c < channels
    s, weight, total = tl.load(sums + at + steps), tl.load(beta + at + steps), tl.load(sums + at + C - 1)
    place, plane = ((b * length + first) * heads + h) * width, rest.to(tl.int64) * channels * width
    sum_q, sum_k, sum_e = tl.zeros([C, K_BLOCK], DTYPE), tl.zeros([C, K_BLOCK], DTYPE), tl.zeros([C, K_BLOCK], DTYPE)
    keep = tl.zeros([K_BLOCK], DTYPE)
    for start in range(0, width, V_BLOCK):
        j = start + tl.arange(0, V_BLOCK)
        inside = j < width
        state = _tile(states + plane, c, j, width, known, inside)
        costate = _tile(costates + plane, c, j, width, known, inside)
        keep += tl.sum(state * costate, 1)
        state = tl.trans(state)
        slopes = _tile(doutput + place, steps, j, heads * width, real, inside)
        sum_q += _dot(slopes, state, OPERAND, PRECISION)
        sum_e += _dot(_tile(dx + place, steps, j, heads * width, real, inside), state, OPERAND, PRECISION)
        values = weight[:, None] * _tile(written + place, steps, j, heads * width, real, inside)
        sum_k += _dot(values, tl.trans(costate), OPERAND, PRECISION)
    sum_q *= (scale * tl.exp(s))[:, None]
    sum_e *= -tl.exp(s)[:, None]
    sum_k *= tl.exp(total - s)[:, None]
    row = heads // per_group * channels
    head = ((b * length + first) * (heads // per_group) + h // per_group) * channels
    queries, keys = _tile(q + head, steps, c, row, real, known), _tile(k + head, steps, c, row, real, known)
    eraser = _tile(e + head, steps, c, row, real, known)
    part = flows + tl.cast(block, tl.int64) * 3 * batch * chunks * heads * C + at + steps
    kind = tl.cast(batch, tl.int64) * chunks * heads * C
    tl.store(part, tl.sum(sum_q * queries + sum_e * eraser, 1))
    tl.store(part + kind, tl.sum(sum_k * keys, 1))
    tl.store(part + 2 * kind, tl.where(steps == 0, tl.exp(total) * tl.sum(keep, 0), 0.0))
    square = at * C + steps[:, None] * C + steps[None, :]
    pairs = tl.load(into_mixed + square)
    sum_q += _dot(pairs, keys, OPERAND, PRECISION)
    sum_k += _dot(tl.trans(pairs), queries, OPERAND, PRECISION)
    pairs = tl.load(into_raw + square)
    sum_e += _dot(pairs, keys, OPERAND, PRECISION)
    sum_k += _dot(tl.trans(pairs), eraser, OPERAND, PRECISION)
    out = ((b * length + first) * heads + h) * channels
    _put(dq + out, steps, c, heads * channels, real, known, sum_q)
    _put(dk + out, steps, c, heads * channels, real, known, sum_k)
    _put(de + out, steps, c, heads * channels, real, known, sum_e)
