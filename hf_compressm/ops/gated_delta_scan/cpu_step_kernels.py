"""Numba kernel of one token of the gated delta rule."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered; NaN and infinity keep their meaning."""
ROWS = 4
"""Rows of a state that are read at once, as the kernel is written."""


@njit(nogil=True, fastmath=FAST, cache=True)
def _read(state, scalars, sums):
    """sums_v = sum over rows of scalar times state (K, V)."""
    channels, width = state.shape
    sums[:] = 0
    for c in range(0, channels - ROWS + 1, ROWS):
        r0, r1, r2, r3 = state[c], state[c + 1], state[c + 2], state[c + 3]
        a0, a1, a2, a3 = scalars[c], scalars[c + 1], scalars[c + 2], scalars[c + 3]
        for j in range(width):
            sums[j] += (a0 * r0[j] + a1 * r1[j]) + (a2 * r2[j] + a3 * r3[j])
    for c in range(channels // ROWS * ROWS, channels):
        for j in range(width):
            sums[j] += scalars[c] * state[c, j]


@njit(nogil=True, fastmath=FAST, cache=True)
def _write(state, keep, k, written, q, sums):
    """state <- keep state + k written^T; sums_v = sum over rows of q times the new state."""
    channels, width = state.shape
    sums[:] = 0
    for c in range(0, channels - ROWS + 1, ROWS):
        r0, r1, r2, r3 = state[c], state[c + 1], state[c + 2], state[c + 3]
        a0, a1, a2, a3 = keep[c], keep[c + 1], keep[c + 2], keep[c + 3]
        k0, k1, k2, k3 = k[c], k[c + 1], k[c + 2], k[c + 3]
        q0, q1, q2, q3 = q[c], q[c + 1], q[c + 2], q[c + 3]
        for j in range(width):
            n0, n1 = a0 * r0[j] + k0 * written[j], a1 * r1[j] + k1 * written[j]
            n2, n3 = a2 * r2[j] + k2 * written[j], a3 * r3[j] + k3 * written[j]
            r0[j], r1[j], r2[j], r3[j] = n0, n1, n2, n3
            sums[j] += (q0 * n0 + q1 * n1) + (q2 * n2 + q3 * n3)
    for c in range(channels // ROWS * ROWS, channels):
        for j in range(width):
            new = keep[c] * state[c, j] + k[c] * written[j]
            state[c, j] = new
            sums[j] += q[c] * new


@njit(nogil=True, fastmath=FAST, cache=True)
def gated_delta_step_kernel(begin, end, q, k, e, v, g, beta, scale, state, output):
    """One token of heads `begin` to `end` of all B H: q, k, e (B, G, K), v, output (B, H, V), state (B, H, K, V).

    g: (B, H, 1 or K), log decays. beta: (B, H). A state comes from far memory once: the second pass finds it in a
    cache.
    """
    heads, channels = state.shape[1:3]
    per_group = heads // k.shape[1]
    keep, scalars, queries, sums = np.empty_like(k[0, 0]), k[0, 0].copy(), k[0, 0].copy(), v[0, 0].copy()
    for unit in range(begin, end):
        b, h = unit // heads, unit % heads
        group = h // per_group
        keep[:] = math.exp(g[b, h, 0])
        if g.shape[2] > 1:
            keep[:] = np.exp(g[b, h])
        for c in range(channels):
            scalars[c] = keep[c] * e[b, group, c]
            queries[c] = scale * q[b, group, c]
        _read(state[b, h], scalars, sums)
        for j in range(len(sums)):
            sums[j] = beta[b, h] * (v[b, h, j] - sums[j])
        _write(state[b, h], keep, k[b, group], sums, queries, output[b, h])
