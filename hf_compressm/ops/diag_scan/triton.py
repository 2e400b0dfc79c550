"""Triton kernels of the diagonal scan: one thread per state of a sequence ("lane"), in order of time.

Complex numbers are pairs of reals in the last dimension. Where B * N lanes are too few to keep the memory busy, time is
cut into chunks: a first kernel finds the state that each chunk ends in when it starts from zero, and the main kernels
start each chunk from what the chunks before it leave. Inputs are read once more then. All sums have a fixed order.

Shapes: batch B, length L, N states, K chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 64
TILE = 16
"""Time steps loaded ahead of their use: 128 bytes of float32 per lane under way."""
SHORTEST_CHUNK = 64


@triton.jit
def _pair(pointer, mask):
    """Real and imaginary parts from the addresses (LANES, 2) of pairs."""
    re, im = tl.split(tl.load(pointer, mask=mask, other=0.0))
    return re, im


@triton.jit
def _lanes(N, lanes, LANES: tl.constexpr):
    """Batch and state of each lane, (LANES, 2) offsets of pairs of (B, N, 2), and a mask."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    part = tl.arange(0, 2)[None, :]
    return lane // N, lane % N, 2 * lane[:, None] + part, (lane < lanes)[:, None] & (part < 2)


@triton.jit
def _poles(lam_ptr, n, mask, CONJUGATE: tl.constexpr):
    re, im = _pair(lam_ptr + 2 * n[:, None] + tl.arange(0, 2)[None, :], mask)
    if CONJUGATE:
        im = -im
    return re, im


@triton.jit
def _carry(start_ptr, ends_ptr, pair, mask, lanes, lam_re, lam_im, doublings, SPLIT: tl.constexpr):
    """State before chunk k: `start` advanced by k chunks of 2^doublings steps, with what each of them adds."""
    re, im = _pair(start_ptr + pair, mask)
    if SPLIT:
        for _ in range(doublings):
            lam_re, lam_im = lam_re * lam_re - lam_im * lam_im, 2 * lam_re * lam_im
        for k in range(tl.program_id(1)):
            x_re, x_im = _pair(ends_ptr + 2 * lanes * k + pair, mask)
            re, im = lam_re * re - lam_im * im + x_re, lam_re * im + lam_im * re + x_im
    return re, im


@triton.jit
def diag_scan_ends_kernel(
    lam_ptr,  # (N, 2)
    x_ptr,  # (B, L, N, 2), strides in reals
    ends_ptr,  # (K, B, N, 2)
    N,
    lanes,  # B * N, int64
    length,
    doublings,  # a chunk has 2^doublings steps
    stride_b,
    stride_t,
    stride_n,
    REVERSE: tl.constexpr,  # from the last step to the first, with conjugate poles
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    b, n, pair, mask = _lanes(N, lanes, LANES)
    lam_re, lam_im = _poles(lam_ptr, n, mask, REVERSE)
    done = tl.program_id(1).to(tl.int64) << doublings
    steps = tl.minimum(length - done, tl.full([], 1, tl.int64) << doublings).to(tl.int32)
    x_ptr += (b * stride_b + n * stride_n)[:, None] + tl.arange(0, 2)[None, :]
    if REVERSE:
        x_ptr += (length - 1 - done) * stride_t
        stride_t = -stride_t
    else:
        x_ptr += done * stride_t
    re = tl.zeros([LANES], lam_re.dtype)
    im = tl.zeros([LANES], lam_re.dtype)
    for _ in range(steps // TILE):
        xs = ()
        for i in tl.static_range(TILE):
            xs = xs + (tl.load(x_ptr + i * stride_t, mask=mask, other=0.0),)
        for i in tl.static_range(TILE):
            x_re, x_im = tl.split(xs[i])
            re, im = lam_re * re - lam_im * im + x_re, lam_re * im + lam_im * re + x_im
        x_ptr += TILE * stride_t
    for _ in range(steps % TILE):
        x_re, x_im = _pair(x_ptr, mask)
        re, im = lam_re * re - lam_im * im + x_re, lam_re * im + lam_im * re + x_im
        x_ptr += stride_t
    if REVERSE:
        # What the chunk's first step hands on to the one before it.
        re, im = lam_re * re - lam_im * im, lam_re * im + lam_im * re
    tl.store(ends_ptr + 2 * lanes * tl.program_id(1) + pair, tl.join(re, im), mask=mask)


@triton.jit
def diag_scan_fwd_kernel(
    lam_ptr,  # (N, 2)
    u_ptr,  # (B, L, N, 2), strides in reals
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
    b, n, pair, mask = _lanes(N, lanes, LANES)
    lam_re, lam_im = _poles(lam_ptr, n, mask, False)
    re, im = _carry(start_ptr, ends_ptr, pair, mask, lanes, lam_re, lam_im, doublings, SPLIT)
    done = tl.program_id(1).to(tl.int64) << doublings
    steps = tl.minimum(length - done, tl.full([], 1, tl.int64) << doublings).to(tl.int32)
    part = tl.arange(0, 2)[None, :]
    u_ptr += (b * stride_b + n * stride_n + done * stride_t)[:, None] + part
    states_ptr += 2 * ((b * length + done) * N + n)[:, None] + part
    for _ in range(steps // TILE):
        us = ()
        for i in tl.static_range(TILE):
            us = us + (tl.load(u_ptr + i * stride_t, mask=mask, other=0.0),)
        for i in tl.static_range(TILE):
            u_re, u_im = tl.split(us[i])
            re, im = lam_re * re - lam_im * im + u_re, lam_re * im + lam_im * re + u_im
            tl.store(states_ptr + 2 * i * N, tl.join(re, im), mask=mask)
        u_ptr += TILE * stride_t
        states_ptr += 2 * TILE * N
    for _ in range(steps % TILE):
        u_re, u_im = _pair(u_ptr, mask)
        re, im = lam_re * re - lam_im * im + u_re, lam_re * im + lam_im * re + u_im
        tl.store(states_ptr, tl.join(re, im), mask=mask)
        u_ptr += stride_t
        states_ptr += 2 * N
    if done + steps == length:
        tl.store(final_ptr + pair, tl.join(re, im), mask=mask)


@triton.jit
def diag_scan_bwd_kernel(
    lam_ptr,  # (N, 2)
    states_ptr,  # (B, L, N, 2), contiguous
    initial_ptr,  # (B, N, 2)
    grad_ptr,  # (B, L, N, 2), strides in reals: gradient of the states
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
    # Chunks count from the end of time. (re, im) is the gradient that a step hands to the state before it.
    b, n, pair, mask = _lanes(N, lanes, LANES)
    lam_re, lam_im = _poles(lam_ptr, n, mask, True)
    re, im = _carry(start_ptr, ends_ptr, pair, mask, lanes, lam_re, lam_im, doublings, SPLIT)
    done = tl.program_id(1).to(tl.int64) << doublings
    steps = tl.minimum(length - done, tl.full([], 1, tl.int64) << doublings).to(tl.int32)
    last = length - 1 - done
    part = tl.arange(0, 2)[None, :]
    grad_ptr += (b * stride_b + n * stride_n + last * stride_t)[:, None] + part
    place = 2 * ((b * length + last) * N + n)[:, None] + part
    adjoint_ptr += place
    before_ptr = states_ptr + place - 2 * N
    sum_re = tl.zeros([LANES], lam_re.dtype)
    sum_im = tl.zeros([LANES], lam_re.dtype)
    # The first step of all has no state before it in `states`; it is left to the loop of single steps.
    tiles = tl.minimum(steps, last).to(tl.int32) // TILE
    for _ in range(tiles):
        gs = ()
        hs = ()
        for i in tl.static_range(TILE):
            gs = gs + (tl.load(grad_ptr - i * stride_t, mask=mask, other=0.0),)
            hs = hs + (tl.load(before_ptr - 2 * i * N, mask=mask, other=0.0),)
        for i in tl.static_range(TILE):
            g_re, g_im = tl.split(gs[i])
            h_re, h_im = tl.split(hs[i])
            g_re += re
            g_im += im
            tl.store(adjoint_ptr - 2 * i * N, tl.join(g_re, g_im), mask=mask)
            sum_re += g_re * h_re + g_im * h_im
            sum_im += g_im * h_re - g_re * h_im
            re, im = lam_re * g_re - lam_im * g_im, lam_re * g_im + lam_im * g_re
        grad_ptr -= TILE * stride_t
        before_ptr -= 2 * TILE * N
        adjoint_ptr -= 2 * TILE * N
    for step in range(tiles * TILE, steps):
        g_re, g_im = _pair(grad_ptr, mask)
        first = step == last
        h_re, h_im = _pair(before_ptr, mask & (step < last))
        i_re, i_im = _pair(initial_ptr + pair, mask & first)
        h_re += i_re
        h_im += i_im
        g_re += re
        g_im += im
        tl.store(adjoint_ptr, tl.join(g_re, g_im), mask=mask)
        sum_re += g_re * h_re + g_im * h_im
        sum_im += g_im * h_re - g_re * h_im
        re, im = lam_re * g_re - lam_im * g_im, lam_re * g_im + lam_im * g_re
        grad_ptr -= stride_t
        before_ptr -= 2 * N
        adjoint_ptr -= 2 * N
    tl.store(dlam_ptr + 2 * lanes * tl.program_id(1) + pair, tl.join(sum_re, sum_im), mask=mask)
    if done + steps == length:
        tl.store(dinitial_ptr + pair, tl.join(re, im), mask=mask)


def scan_forward(
    lam: Tensor, u: Tensor, initial: Tensor | None, doublings: int | None = None
) -> tuple[Tensor, Tensor]:
    """States (B, L, N) and the final state (B, N), as in `diag_scan`; in chunks of 2^doublings steps if given."""
    lam, u = _pairs(lam).contiguous(), _pairs(u)
    start = _state(initial, u)
    states, final = torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(start)
    with torch.cuda.device_of(u):
        grid, sizes, ends = _launch(lam, u, doublings, reverse=False)
        split = grid[1] > 1
        diag_scan_fwd_kernel[grid](
            lam, u, start, ends, states, final, *sizes, SPLIT=split, LANES=LANES, TILE=TILE, num_warps=LANES // 32
        )
    return torch.view_as_complex(states), torch.view_as_complex(final)


def scan_backward(
    lam: Tensor,
    states: Tensor,
    initial: Tensor | None,
    dstates: Tensor | None,
    dfinal: Tensor | None,
    doublings: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lam (N,), u (B, L, N) and the initial state (B, N), complex."""
    lam, states = _pairs(lam).contiguous(), _pairs(states).contiguous()
    # Without a gradient of the states: one zero with strides of zero, which costs no memory.
    grad = lam.new_zeros(()).expand(states.shape) if dstates is None else _pairs(dstates)
    start, first = _state(dfinal, states), _state(initial, states)
    adjoint, dinitial = torch.empty_like(states), torch.empty_like(start)
    with torch.cuda.device_of(states):
        grid, sizes, ends = _launch(lam, grad, doublings, reverse=True)
        split = grid[1] > 1
        dlam = lam.new_empty(grid[1], *start.shape)
        tensors = (lam, states, first, grad, start, ends, adjoint, dlam, dinitial)
        diag_scan_bwd_kernel[grid](
            *tensors, *sizes, SPLIT=split, LANES=LANES, TILE=TILE, num_warps=LANES // 32
        )
    gradients = dlam.sum((0, 1)), adjoint, dinitial
    return tuple(torch.view_as_complex(gradient) for gradient in gradients)  # type: ignore[return-value]


def _launch(lam: Tensor, x: Tensor, doublings: int | None, reverse: bool) -> tuple[tuple[int, int], tuple, Tensor]:
    """Grid and sizes for the main kernels, and where each chunk ends if there are several."""
    batch, length, size, _ = x.shape
    lanes = batch * size
    if doublings is None:
        doublings = _doublings(lanes, length, x.device)
    grid = triton.cdiv(lanes, LANES), triton.cdiv(length, 1 << doublings)
    sizes = (size, lanes, length, doublings, *x.stride()[:3])
    ends = lam.new_empty(grid[1] if grid[1] > 1 else 0, batch, size, 2)
    if grid[1] > 1:
        diag_scan_ends_kernel[grid](
            lam, x, ends, *sizes, REVERSE=reverse, LANES=LANES, TILE=TILE, num_warps=LANES // 32
        )
    return grid, sizes, ends


def _doublings(lanes: int, length: int, device: torch.device) -> int:
    """log2 of the steps of a chunk: all steps, unless lanes are fewer than it takes to keep the memory busy."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = 1 if lanes >= 256 * cores else triton.cdiv(512 * cores, lanes)
    return (max(SHORTEST_CHUNK, triton.cdiv(length, wanted)) - 1).bit_length()


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


def _state(state: Tensor | None, u: Tensor) -> Tensor:
    batch, _, size, _ = u.shape
    return u.new_zeros(batch, size, 2) if state is None else _pairs(state).contiguous()
