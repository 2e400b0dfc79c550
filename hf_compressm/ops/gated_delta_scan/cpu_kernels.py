"""Numba kernels of the gated delta rule in chunks: matrix products of tiles that stay in the caches.

The equations are those of `chunks.py`. A tile has `CHUNK` tokens; channels are padded with zeros to multiples of
`LANES`. Tokens beyond the end of a sequence have zeros and neither decay nor write.

Shapes: batch B, length L, G key heads, H value heads, K and V channels; n chunks of all sequences; C = `CHUNK`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ..lanes import LANES, bytes_of, load, read, store
from .cpu_step_kernels import FAST

CHUNK = 64
ROWS = 4
"""Rows of a product that are formed at once, as `_add_product` is written."""


@njit(nogil=True, fastmath=FAST, cache=True)
def _add_product(c, a, b, rows, depth, columns, c_row, a_row, a_step, b_row, zero):
    """c += a b, of addresses; `columns` is in bytes, and so are the distances of rows and, in a, of columns."""
    vector = LANES * bytes_of(zero)
    for j in range(0, columns, vector):
        for i in range(0, rows, ROWS):
            out, left, right = c + i * c_row + j, a + i * a_row, b + j
            s0, s1 = load(out, zero), load(out + c_row, zero)
            s2, s3 = load(out + 2 * c_row, zero), load(out + 3 * c_row, zero)
            for _ in range(depth):
                row = load(right, zero)
                s0 = s0 + read(left, zero) * row
                s1 = s1 + read(left + a_row, zero) * row
                s2 = s2 + read(left + 2 * a_row, zero) * row
                s3 = s3 + read(left + 3 * a_row, zero) * row
                left, right = left + a_step, right + b_row
            store(out, s0)
            store(out + c_row, s1)
            store(out + 2 * c_row, s2)
            store(out + 3 * c_row, s3)


@njit(nogil=True, fastmath=FAST, cache=True)
def _add(c, a, b):
    """c += a b, of whole arrays, but as many columns of a as b has rows."""
    zero, item = c.dtype.type(0), c.itemsize
    addresses = c.ctypes.data, a.ctypes.data, b.ctypes.data
    sizes = len(c), len(b), c.shape[1] * item
    _add_product(*addresses, *sizes, c.shape[1] * item, a.shape[1] * item, item, b.shape[1] * item, zero)


@njit(nogil=True, fastmath=FAST, cache=True)
def _add_turned(c, a, b):
    """c += a^T b, in as many columns as b has."""
    zero, item = c.dtype.type(0), c.itemsize
    addresses = c.ctypes.data, a.ctypes.data, b.ctypes.data
    sizes = a.shape[1], len(a), b.shape[1] * item
    _add_product(*addresses, *sizes, c.shape[1] * item, item, a.shape[1] * item, b.shape[1] * item, zero)


@njit(nogil=True, fastmath=FAST, cache=True)
def _add_lower(c, a, b):
    """c += a b where the entries of c (C, C) above the diagonal do not matter."""
    zero, item = c.dtype.type(0), c.itemsize
    row, depth_row = CHUNK * item, a.shape[1] * item
    for i in range(0, CHUNK, LANES):
        addresses = c.ctypes.data + i * row, a.ctypes.data + i * depth_row, b.ctypes.data
        _add_product(*addresses, LANES, a.shape[1], (i + LANES) * item, row, depth_row, item, row, zero)


@njit(nogil=True, fastmath=FAST, cache=True)
def _solve(x, negative):
    """x <- (I - negative)^-1 x, `negative` (C, C) being strictly lower triangular and x (C, V)."""
    zero, item, columns = x.dtype.type(0), x.itemsize, x.shape[1]
    row, at = CHUNK * item, x.ctypes.data
    for i in range(0, CHUNK, ROWS):
        out, left = at + i * columns * item, negative.ctypes.data + i * row
        _add_product(out, left, at, ROWS, i, columns * item, columns * item, row, item, columns * item, zero)
        for t in range(i + 1, i + ROWS):
            for u in range(i, t):
                factor = negative[t, u]
                for j in range(columns):
                    x[t, j] += factor * x[u, j]


@njit(nogil=True, fastmath=FAST, cache=True)
def _solve_turned(x, negative):
    """x <- (I - negative)^-T x."""
    zero, item, columns = x.dtype.type(0), x.itemsize, x.shape[1]
    row, at, width = CHUNK * item, x.ctypes.data, x.shape[1] * x.itemsize
    for i in range(CHUNK - ROWS, -1, -ROWS):
        after = i + ROWS
        left = negative.ctypes.data + after * row + i * item
        _add_product(
            at + i * width, left, at + after * width, ROWS, CHUNK - after, width, width, item, row, width, zero
        )
        for t in range(after - 2, i - 1, -1):
            for u in range(t + 1, after):
                factor = negative[u, t]
                for j in range(columns):
                    x[t, j] += factor * x[u, j]


@njit(nogil=True, fastmath=FAST, cache=True)
def _fill(tile, source, b, first, count, head):
    """Rows of a tile from tokens of source (B, L, heads, channels)."""
    for t in range(count):
        for c in range(source.shape[3]):
            tile[t, c] = source[b, first + t, head, c]
    for t in range(count, CHUNK):
        for c in range(source.shape[3]):
            tile[t, c] = 0


@njit(nogil=True, fastmath=FAST, cache=True)
def _turn(target, source):
    """target = source^T."""
    for t in range(source.shape[0]):
        for c in range(source.shape[1]):
            target[c, t] = source[t, c]


@njit(nogil=True, fastmath=FAST, cache=True)
def _scale_rows(target, source, factors, factor):
    for t in range(source.shape[0]):
        each = factors[t] * factor
        for c in range(source.shape[1]):
            target[t, c] = each * source[t, c]


@njit(nogil=True, fastmath=FAST, cache=True)
def _decays(g, beta, b, first, count, head, start, end, betas, decays):
    """exp(s), exp(s_C - s), beta (C,) and exp(s_t - s_j) for j <= t of a chunk."""
    # In float64: under strong decays, small differences of large sums matter.
    sums, total, dtype = np.empty(CHUNK), 0.0, start.dtype.type
    for t in range(CHUNK):
        betas[t] = beta[b, first + t, head] if t < count else 0
        total += g[b, first + t, head] if t < count else 0
        sums[t] = total
    for t in range(CHUNK):
        start[t], end[t] = math.exp(dtype(sums[t])), math.exp(dtype(total - sums[t]))
        for j in range(t + 1):
            decays[t, j] = math.exp(dtype(sums[t] - sums[j]))


@njit
def _apart(columns):
    """A row length at which the rows of a tile fall into different sets of a cache: an odd number of vectors."""
    return columns + (columns // LANES % 2 == 0) * LANES


@njit(nogil=True, fastmath=FAST, cache=True)
def gated_delta_scan_fwd_kernel(
    begin, stop, q, k, e, v, g, beta, scale, initial, bounds, output, written, states, final
):  # fmt: skip
    """Heads `begin` to `stop` of all B H.

    q, k, e: (B, L, G, K). v, output, written (X): (B, L, H, V). g, beta: (B, L, H). initial, final: (sequences, H, K,
    V). bounds: first tokens of the sequences, and L. states: (n, B H, K, V), those before chunks.
    """
    heads, width = v.shape[2:]
    channels, per_group, dtype = k.shape[3], heads // k.shape[2], v.dtype
    depth, columns = (channels + LANES - 1) // LANES * LANES, (width + LANES - 1) // LANES * LANES
    keys, queries, erases = np.zeros((3, CHUNK, depth), dtype=dtype)
    turned, state = np.empty((depth, CHUNK), dtype=dtype), np.zeros((depth, _apart(columns)), dtype=dtype)
    x, u, o = np.zeros((3, CHUNK, columns), dtype=dtype)
    erased, mixed, decays = np.zeros((3, CHUNK, CHUNK), dtype=dtype)
    start, end, betas = np.empty((3, CHUNK), dtype=dtype)
    one = dtype.type(1)
    for unit in range(begin, stop):
        b, h, n = unit // heads, unit % heads, 0
        group = h // per_group
        for sequence in range(len(bounds) - 1):
            state[:channels, :width] = initial[b + sequence, h]
            for first in range(bounds[sequence], bounds[sequence + 1], CHUNK):
                count = min(CHUNK, bounds[sequence + 1] - first)
                states[n, unit] = state[:channels, :width]
                n += 1
                _decays(g, beta, b, first, count, h, start, end, betas, decays)
                _fill(keys, k, b, first, count, group)
                _fill(queries, q, b, first, count, group)
                _fill(erases, e, b, first, count, group)
                _fill(x, v, b, first, count, h)
                _turn(turned, keys)
                erased[:], mixed[:] = 0, 0
                _add_lower(erased, erases, turned)
                _add_lower(mixed, queries, turned)
                for t in range(CHUNK):
                    for j in range(CHUNK):
                        erased[t, j] = -erased[t, j] * decays[t, j] * betas[j] if j < t else 0
                        mixed[t, j] = scale * mixed[t, j] * decays[t, j] if j <= t else 0
                _scale_rows(erases, erases, start, -one)
                _scale_rows(queries, queries, start, scale)
                _scale_rows(keys, keys, end, one)
                _add(x, erases, state)
                _solve(x, erased)
                _scale_rows(u, x, betas, one)
                o[:] = 0
                _add(o, queries, state)
                _add(o, mixed, u)
                for c in range(depth):
                    for j in range(columns):
                        state[c, j] *= start[CHUNK - 1]
                _add_turned(state, keys, u)
                for t in range(count):
                    for j in range(width):
                        output[b, first + t, h, j] = o[t, j]
                        written[b, first + t, h, j] = x[t, j]
            final[b + sequence, h] = state[:channels, :width]


@njit(nogil=True, fastmath=FAST, cache=True)
def _flow(inner, starts, ends, keep, dg, b, first, count, head):
    """Gradient of g from those of s: of pairs and of decays from the start, up to the end, and of the whole chunk."""
    total = keep
    for t in range(CHUNK):
        total += inner[t] + starts[t]
    for t in range(count):
        dg[b, first + t, head] = total
        total += ends[t] - inner[t] - starts[t]


@njit(nogil=True, fastmath=FAST, cache=True)
def _gather(target, flows, rows, factors, factor, tile):
    """target += factors tile, flows_t += sum over channels of what is added times rows; tiles (K, C)."""
    for c in range(target.shape[0]):
        for t in range(CHUNK):
            value = factor * factors[t] * tile[c, t]
            target[c, t] += value
            flows[t] += value * rows[c, t]


@njit(nogil=True, fastmath=FAST, cache=True)
def gated_delta_scan_bwd_kernel(
    begin, stop, q, k, e, v, g, beta, scale, bounds, written, states, doutput, costates, dq, dk, de, dv, dg, dbeta
):  # fmt: skip
    """Key heads `begin` to `stop` of all B G; shapes as in the forward kernel, gradients as what they belong to.

    costates: (sequences, H, K, V), enters as the gradient of the final states and leaves as that of the initial ones.
    """
    heads, width = v.shape[2:]
    groups, channels, dtype = k.shape[2], k.shape[3], v.dtype
    per_group = heads // groups
    depth, columns = (channels + LANES - 1) // LANES * LANES, (width + LANES - 1) // LANES * LANES
    keys, queries, erases, scaled = np.zeros((4, CHUNK, depth), dtype=dtype)
    sum_q, sum_k, sum_e = np.zeros((3, CHUNK, depth), dtype=dtype)
    keys_t, queries_t, erases_t, tile = np.zeros((4, depth, CHUNK), dtype=dtype)
    turned_q, turned_k, turned_e = np.zeros((3, depth, CHUNK), dtype=dtype)
    state, costate = np.zeros((2, depth, _apart(columns)), dtype=dtype)
    x, u, slopes, du = np.zeros((4, CHUNK, columns), dtype=dtype)
    u_t, slopes_t, dx_t = np.zeros((3, columns, CHUNK), dtype=dtype)
    raw_e, raw_q, erased, mixed, decays, into_e, into_q, pairs_e, pairs_q = np.zeros((9, CHUNK, CHUNK), dtype=dtype)
    start, end, betas, inner, starts, ends = np.zeros((6, CHUNK), dtype=dtype)
    one, n = dtype.type(1), len(states)
    for unit in range(begin, stop):
        b, group = unit // groups, unit % groups
        n = 0
        for sequence in range(len(bounds) - 1):
            n += (bounds[sequence + 1] - bounds[sequence] + CHUNK - 1) // CHUNK
        for sequence in range(len(bounds) - 2, -1, -1):
            low, high = bounds[sequence], bounds[sequence + 1]
            for first in range(low + (high - low - 1) // CHUNK * CHUNK, low - 1, -CHUNK):
                count = min(CHUNK, high - first)
                n -= 1
                _fill(keys, k, b, first, count, group)
                _fill(queries, q, b, first, count, group)
                _fill(erases, e, b, first, count, group)
                _turn(keys_t, keys)
                _turn(queries_t, queries)
                _turn(erases_t, erases)
                raw_e[:], raw_q[:], pairs_e[:], pairs_q[:] = 0, 0, 0, 0
                turned_q[:], turned_k[:], turned_e[:] = 0, 0, 0
                _add_lower(raw_e, erases, keys_t)
                _add_lower(raw_q, queries, keys_t)
                for h in range(group * per_group, (group + 1) * per_group):
                    _decays(g, beta, b, first, count, h, start, end, betas, decays)
                    state[:channels, :width] = states[n, b * heads + h]
                    costate[:channels, :width] = costates[b + sequence, h]
                    _fill(x, written, b, first, count, h)
                    _fill(slopes, doutput, b, first, count, h)
                    for t in range(CHUNK):
                        for j in range(CHUNK):
                            mixed[t, j] = scale * raw_q[t, j] * decays[t, j] if j <= t else 0
                            erased[t, j] = -raw_e[t, j] * decays[t, j] * betas[t] if j < t else 0
                    du[:] = 0
                    _add_turned(du, mixed, slopes)
                    _scale_rows(scaled, keys, end, one)
                    _add(du, scaled, costate)
                    _solve_turned(du, erased)
                    _scale_rows(u, x, betas, one)
                    _turn(u_t, u)
                    _turn(slopes_t, slopes)
                    for t in range(count):
                        total = du[t, 0] * x[t, 0]
                        for j in range(1, width):
                            total += du[t, j] * x[t, j]
                        dbeta[b, first + t, h] = total
                    # From here du is dx.
                    _scale_rows(du, du, betas, one)
                    _turn(dx_t, du)
                    for t in range(count):
                        for j in range(width):
                            dv[b, first + t, h, j] = du[t, j]
                    into_e[:], into_q[:], inner[:], starts[:], ends[:] = 0, 0, 0, 0, 0
                    _add_lower(into_e, du, u_t)
                    _add_lower(into_q, slopes, u_t)
                    for t in range(CHUNK):
                        for j in range(t):
                            from_e, from_q = -into_e[t, j] * decays[t, j], scale * into_q[t, j] * decays[t, j]
                            pairs_e[t, j] += from_e
                            pairs_q[t, j] += from_q
                            product = from_e * raw_e[t, j] + from_q * raw_q[t, j]
                            inner[t] += product
                            inner[j] -= product
                        pairs_q[t, t] += scale * into_q[t, t]
                    tile[:] = 0
                    _add(tile, state, dx_t)
                    _gather(turned_e, starts, erases_t, start, -one, tile)
                    tile[:] = 0
                    _add(tile, state, slopes_t)
                    _gather(turned_q, starts, queries_t, start, scale, tile)
                    tile[:] = 0
                    _add(tile, costate, u_t)
                    _gather(turned_k, ends, keys_t, end, one, tile)
                    keep = dtype.type(0)
                    for c in range(depth):
                        for j in range(columns):
                            keep += state[c, j] * costate[c, j]
                            costate[c, j] *= start[CHUNK - 1]
                    _flow(inner, starts, ends, keep * start[CHUNK - 1], dg, b, first, count, h)
                    _scale_rows(scaled, queries, start, scale)
                    _add_turned(costate, scaled, slopes)
                    _scale_rows(scaled, erases, start, -one)
                    _add_turned(costate, scaled, du)
                    costates[b + sequence, h] = costate[:channels, :width]
                sum_q[:], sum_k[:], sum_e[:] = 0, 0, 0
                _add(sum_q, pairs_q, keys)
                _add(sum_e, pairs_e, keys)
                _add_turned(sum_k, pairs_q, queries)
                _add_turned(sum_k, pairs_e, erases)
                for t in range(count):
                    for c in range(channels):
                        dq[b, first + t, group, c] = sum_q[t, c] + turned_q[c, t]
                        dk[b, first + t, group, c] = sum_k[t, c] + turned_k[c, t]
                        de[b, first + t, group, c] = sum_e[t, c] + turned_e[c, t]
