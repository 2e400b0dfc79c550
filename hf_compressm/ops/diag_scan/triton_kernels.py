"""Triton kernels of the diagonal scan: one thread per state of a sequence ("lane"), in order of time.

Complex numbers are pairs of reals in the last dimension. Where B * N lanes are too few to keep the memory busy, time is
cut into chunks: a first kernel finds the state that each chunk ends in when it starts from zero, and the main kernels
start each chunk from what the chunks before it leave. Inputs are read once more then. All sums have a fixed order.

Shapes: batch B, length L, N states, K chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(pointer, mask):
    """Real and imaginary parts; `pointer` is one of `_complex`."""
    if pointer.dtype.element_ty == tl.int64:
        pair = tl.load(pointer, mask=mask, other=0)
        re = pair.to(tl.int32).to(tl.float32, bitcast=True)
        im = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        re = tl.load(pointer, mask=mask, other=0.0)
        im = tl.load(pointer + 1, mask=mask, other=0.0)
    return re, im


@triton.jit
def _store(pointer, re, im, mask):
    if pointer.dtype.element_ty == tl.int64:
        low = re.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        high = im.to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(pointer, low | high, mask=mask)
    else:
        tl.store(pointer, re, mask=mask)
        tl.store(pointer + 1, im, mask=mask)


@triton.jit
def _complex(pointer):
    """A pointer to pairs of float32 as one to integers of the same size, so that a pair is moved as a whole."""
    if pointer.dtype.element_ty == tl.float32:
        pointer = pointer.to(tl.pointer_type(tl.int64), bitcast=True)
    return pointer


@triton.jit
def _unit(pointer):
    """Elements of `_complex(pointer)` that make a pair."""
    return 1 if pointer.dtype.element_ty == tl.float32 else 2


@triton.jit
def _lanes(N, lanes, LANES: tl.constexpr):
    """Number, batch and state of each lane, and a mask."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    return lane, lane // N, lane % N, lane < lanes


@triton.jit
def _steps(length, doublings):
    """Steps before this program's chunk and within it."""
    done = tl.program_id(1).to(tl.int64) << doublings
    return done, tl.minimum(length - done, tl.full([], 1, tl.int64) << doublings).to(tl.int32)


@triton.jit
def _advance(lam_re, lam_im, re, im):
    return lam_re * re - lam_im * im, lam_re * im + lam_im * re


@triton.jit
def _carry(start_ptr, ends_ptr, lane, mask, lanes, lam_re, lam_im, doublings, SPLIT: tl.constexpr):
    """State before chunk k: `start` advanced by k chunks of 2^doublings steps, with what each of them adds."""
    unit = _unit(start_ptr)
    re, im = _load(_complex(start_ptr) + unit * lane, mask)
    if SPLIT:
        ends = _complex(ends_ptr) + unit * lane
        for _ in range(doublings):
            lam_re, lam_im = _advance(lam_re, lam_im, lam_re, lam_im)
        for _ in range(tl.program_id(1)):
            x_re, x_im = _load(ends, mask)
            re, im = _advance(lam_re, lam_im, re, im)
            re += x_re
            im += x_im
            ends += unit * lanes
    return re, im


@triton.jit
def diag_scan_ends_kernel(
    lam_ptr,  # (N, 2)
    x_ptr,  # (B, L, N, 2), strides of pairs
    ends_ptr,  # (K, B, N, 2)
    N,
    lanes,  # B * N
    length,
    doublings,  # a chunk has 2^doublings steps
    stride_b,
    stride_t,
    stride_n,
    REVERSE: tl.constexpr,  # from the last step to the first, with conjugate poles
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The state (B, N) that each chunk ends in when it starts from zero."""
    unit = _unit(lam_ptr)
    lane, b, n, mask = _lanes(N, lanes, LANES)
    done, steps = _steps(length, doublings)
    lam_re, lam_im = _load(_complex(lam_ptr) + unit * n, mask)
    first, x_step = done, unit * stride_t
    if REVERSE:
        lam_im = -lam_im
        first, x_step = length - 1 - done, -unit * stride_t
    x = _complex(x_ptr) + unit * (b * stride_b + first * stride_t + n * stride_n)
    re = tl.zeros([LANES], lam_re.dtype)
    im = tl.zeros([LANES], lam_re.dtype)
    for _ in range(steps // TILE):
        xs = ()
        for i in tl.static_range(TILE):
            xs = xs + (_load(x + i * x_step, mask),)
        for i in tl.static_range(TILE):
            re, im = _advance(lam_re, lam_im, re, im)
            re += xs[i][0]
            im += xs[i][1]
        x += TILE * x_step
    for _ in range(steps % TILE):
        x_re, x_im = _load(x, mask)
        re, im = _advance(lam_re, lam_im, re, im)
        re += x_re
        im += x_im
        x += x_step
    if REVERSE:
        # What the chunk's first step hands on to the one before it.
        re, im = _advance(lam_re, lam_im, re, im)
    _store(_complex(ends_ptr) + unit * (tl.program_id(1).to(tl.int64) * lanes + lane), re, im, mask)


@triton.jit
def diag_scan_fwd_kernel(
    lam_ptr,  # (N, 2)
    u_ptr,  # (B, L, N, 2), strides of pairs
    start_ptr,  # (B, N, 2)
    ends_ptr,  # (K, B, N, 2), from diag_scan_ends_kernel; anything if not SPLIT
    states_ptr,  # (B, L, N, 2), contiguous
    final_ptr,  # (B, N, 2)
    N,
    lanes,
    length,
    doublings,
    stride_b,
    stride_t,
    stride_n,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """States (B, L, N) and the final state (B, N)."""
    unit = _unit(lam_ptr)
    lane, b, n, mask = _lanes(N, lanes, LANES)
    done, steps = _steps(length, doublings)
    lam_re, lam_im = _load(_complex(lam_ptr) + unit * n, mask)
    re, im = _carry(start_ptr, ends_ptr, lane, mask, lanes, lam_re, lam_im, doublings, SPLIT)
    u = _complex(u_ptr) + unit * (b * stride_b + done * stride_t + n * stride_n)
    states = _complex(states_ptr) + unit * ((b * length + done) * N + n)
    u_step, step = unit * stride_t, unit * N
    for _ in range(steps // TILE):
        us = ()
        for i in tl.static_range(TILE):
            us = us + (_load(u + i * u_step, mask),)
        for i in tl.static_range(TILE):
            re, im = _advance(lam_re, lam_im, re, im)
            re += us[i][0]
            im += us[i][1]
            _store(states + i * step, re, im, mask)
        u += TILE * u_step
        states += TILE * step
    for _ in range(steps % TILE):
        u_re, u_im = _load(u, mask)
        re, im = _advance(lam_re, lam_im, re, im)
        re += u_re
        im += u_im
        _store(states, re, im, mask)
        u += u_step
        states += step
    if done + steps == length:
        _store(_complex(final_ptr) + unit * lane, re, im, mask)


@triton.jit
def diag_scan_bwd_kernel(
    lam_ptr,  # (N, 2)
    states_ptr,  # (B, L, N, 2), contiguous
    initial_ptr,  # (B, N, 2)
    grad_ptr,  # (B, L, N, 2), strides of pairs: gradient of the states
    start_ptr,  # (B, N, 2): gradient of the final state
    ends_ptr,  # (K, B, N, 2), from diag_scan_ends_kernel in reverse; anything if not SPLIT
    adjoint_ptr,  # (B, L, N, 2), contiguous: gradient of u
    dlam_ptr,  # (K, B, N, 2): parts of the gradient of lam
    dinitial_ptr,  # (B, N, 2)
    N,
    lanes,
    length,
    doublings,
    stride_b,
    stride_t,
    stride_n,
    SPLIT: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradients of u (B, L, N) and of the initial state (B, N), and parts of that of lam."""
    # Chunks count from the end of time. (re, im) is the gradient that a step hands to the state before it.
    unit = _unit(lam_ptr)
    lane, b, n, mask = _lanes(N, lanes, LANES)
    done, steps = _steps(length, doublings)
    lam_re, lam_im = _load(_complex(lam_ptr) + unit * n, mask)
    lam_im = -lam_im
    re, im = _carry(start_ptr, ends_ptr, lane, mask, lanes, lam_re, lam_im, doublings, SPLIT)
    last = length - 1 - done
    place = unit * ((b * length + last) * N + n)
    adjoint, before = _complex(adjoint_ptr) + place, _complex(states_ptr) + place - unit * N
    grad = _complex(grad_ptr) + unit * (b * stride_b + last * stride_t + n * stride_n)
    grad_step, step = unit * stride_t, unit * N
    sum_re = tl.zeros([LANES], lam_re.dtype)
    sum_im = tl.zeros([LANES], lam_re.dtype)
    # The first step of all has no state before it in `states`; it is left to the loop of single steps.
    tiles = tl.minimum(steps, last).to(tl.int32) // TILE
    for _ in range(tiles):
        gs = ()
        hs = ()
        for i in tl.static_range(TILE):
            gs = gs + (_load(grad - i * grad_step, mask),)
            hs = hs + (_load(before - i * step, mask),)
        for i in tl.static_range(TILE):
            re += gs[i][0]
            im += gs[i][1]
            _store(adjoint - i * step, re, im, mask)
            sum_re += re * hs[i][0] + im * hs[i][1]
            sum_im += im * hs[i][0] - re * hs[i][1]
            re, im = _advance(lam_re, lam_im, re, im)
        grad -= TILE * grad_step
        before -= TILE * step
        adjoint -= TILE * step
    initial_re, initial_im = _load(_complex(initial_ptr) + unit * lane, mask)
    for k in range(tiles * TILE, steps):
        g_re, g_im = _load(grad, mask)
        h_re, h_im = _load(before, mask & (k < last))
        h_re = tl.where(k < last, h_re, initial_re)
        h_im = tl.where(k < last, h_im, initial_im)
        re += g_re
        im += g_im
        _store(adjoint, re, im, mask)
        sum_re += re * h_re + im * h_im
        sum_im += im * h_re - re * h_im
        re, im = _advance(lam_re, lam_im, re, im)
        grad -= grad_step
        before -= step
        adjoint -= step
    _store(_complex(dlam_ptr) + unit * (tl.program_id(1).to(tl.int64) * lanes + lane), sum_re, sum_im, mask)
    if done + steps == length:
        _store(_complex(dinitial_ptr) + unit * lane, re, im, mask)
