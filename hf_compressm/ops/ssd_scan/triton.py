"""Mamba-2's scan on CUDA devices: launches of the Triton kernels, and the sums over single steps between them.

Shapes: batch B, length L, H heads of P channels, G groups, N states, K chunks of T steps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..memory import row_contiguous
from .op import Gradients, Inputs
from .triton_kernels import (
    ssd_scan_bwd_bc_kernel,
    ssd_scan_bwd_pairs_kernel,
    ssd_scan_bwd_x_kernel,
    ssd_scan_fwd_kernel,
    ssd_scan_outer_kernel,
    ssd_scan_pass_kernel,
)

PASS_BLOCK = 512
PROGRAMS = 512
"""Beyond so many programs, one takes the gradients of B and C of several heads. Fixed: the sums depend on it."""
OPERANDS = {
    torch.float16: (tl.float16, "tf32"),
    torch.bfloat16: (tl.bfloat16, "tf32"),
    torch.float32: (tl.float32, "tf32x3"),
    torch.float64: (tl.float64, "ieee"),
}
"""dtype of what is multiplied, and how: three products of tf32 are as exact as float32."""
TILES = {
    torch.float16: (64, 32, 32),
    torch.bfloat16: (64, 32, 32),
    torch.float32: (32, 16, 32),
    torch.float64: (32, 16, 16),
}
"""Most steps, channels and states of a tile that leave all kernels without spills."""
LAUNCH = {"num_warps": 8, "num_stages": 1}
PAIRS = {"P_BLOCK": 16, "num_warps": 4}
"""What differs for the kernel of pairs of steps."""


def chunk_length(length: int, chunk: int, dtype: torch.dtype) -> int:
    """T, a power of two that tiles can have, at most `chunk` if that is 16 or more."""
    wanted = max(16, min(TILES[dtype][0], chunk, triton.next_power_of_2(length)))
    return 1 << (wanted.bit_length() - 1)


def tiles(width: int, size: int, T: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels of matrix products are compiled for; the block of states divides N rounded up to 16."""
    _, most_channels, most_states = TILES[dtype]
    operand, precision = OPERANDS[dtype]
    return {
        "T": T,
        "P_BLOCK": max(16, min(most_channels, triton.next_power_of_2(width))),
        "N_BLOCK": most_states if -(-size // 16) * 16 % most_states == 0 else 16,
        "OPERAND": operand,
        "PRECISION": precision,
    }


def checkpoint_shape(inputs: Inputs) -> tuple[int, ...]:
    """(B, K, H, P, N): the states before each chunk."""
    batch, length, heads, width = inputs.x.shape
    chunks = -(-length // chunk_length(length, inputs.chunk_size, inputs.x.dtype))
    return batch, chunks, heads, width, inputs.B.shape[3]


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H, P), the final state (B, H, P, N) and the states before each chunk.

    x, B and C may be of half precision.
    """
    x, dt, A, B, C, D, _, initial, *_ = inputs
    T = chunk_length(x.shape[1], inputs.chunk_size, x.dtype)
    x, B, C = row_contiguous(x), row_contiguous(B), row_contiguous(C)
    step, sums = _per_step(dt, A, T)
    states = dt.new_empty(checkpoint_shape(inputs))
    final = dt.new_empty(states.shape[0], *states.shape[2:])
    with torch.cuda.device_of(x):
        _outer(x, B, step * _to_end(sums, T), states, T)
        _pass(states, sums, initial, final, T)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid, constants = _tiles(x, B, T)
        arguments = (*_sizes(x, B, T), *_strides(x, B, C))
        ssd_scan_fwd_kernel[(grid * -(-x.shape[3] // constants["P_BLOCK"]),)](
            x, step, sums, B, C, D, states, y, *arguments, **constants
        )
    return y, final, states


def backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and the initial state, of their shapes, from those of y and the final state."""
    x, dt, A, B, C, D, *_ = inputs
    dy, dfinal, states = gradients
    assert dy is not None
    batch, length, heads, width = x.shape
    groups, size, chunks = *B.shape[2:], states.shape[1]
    T = chunk_length(length, inputs.chunk_size, x.dtype)
    x, B, C, dy = (row_contiguous(tensor) for tensor in (x, B, C, dy))
    dfinal = None if dfinal is None else dfinal.contiguous()
    step, sums = _per_step(dt, A, T)
    costates, dinitial = torch.empty_like(states), torch.empty_like(states[:, 0])
    ends = dt.new_empty(-(-width * size // PASS_BLOCK), batch, heads, chunks)
    grid, constants = _tiles(x, B, T)
    p_blocks = -(-width // constants["P_BLOCK"])
    per_step = dt.new_empty(5, p_blocks, batch, heads, chunks * T)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_blocks = -(-size // constants["N_BLOCK"])
    splits = min(heads // groups, -(-PROGRAMS // (batch * chunks * groups * n_blocks)))
    each = -(-(heads // groups) // splits)
    dB, dC = (dt.new_empty(splits, batch, length, groups, size) for _ in range(2))
    pairs = dt.new_empty(batch, chunks, groups, splits, T, T)
    sizes, strides = _sizes(x, B, T), _strides(x, B, C, dy)
    with torch.cuda.device_of(x):
        _outer(dy, C, sums.exp(), costates, T)
        _pass(costates, sums, dfinal, dinitial, T, before=states, products=ends)
        ssd_scan_bwd_x_kernel[(grid * p_blocks,)](
            x, step, sums, B, C, D, states, costates, dy, dx, per_step, batch, *sizes, *strides, **constants
        )
        shares = (length, heads, width, heads // groups, chunks, splits, each, *_strides(x, dy))
        fitting = {name: value for name, value in (constants | PAIRS).items() if name != "N_BLOCK"}
        ssd_scan_bwd_pairs_kernel[(batch * chunks * groups * splits,)](x, step, sums, dy, pairs, *shares, **fitting)
        arguments = (x, step, sums, B, C, states, costates, dy, pairs, dB, dC, batch, *sizes, splits, each, *strides)
        ssd_scan_bwd_bc_kernel[(batch * chunks * groups * splits * n_blocks,)](*arguments, **constants)
    kinds = per_step.sum(1).unflatten(-1, (chunks, T))
    # s_t is a sum over steps up to t, so each step gets what flows into later ones.
    later = (kinds[0] + kinds[1]).flip(-1).cumsum(-1).flip(-1)
    earlier = F.pad(kinds[2], (1, 0))[..., :-1].cumsum(-1)
    into_log = (later + earlier + ends.sum(0)[..., None]).flatten(2)[..., :length].transpose(1, 2)
    ddt = into_log * A + kinds[3].flatten(2)[..., :length].transpose(1, 2)
    dD = torch.zeros_like(A) if D is None else kinds[4].sum((0, 2, 3))
    return dx, ddt, (into_log * dt).sum((0, 1)), dB.sum(0), dC.sum(0), dD, dinitial


def _per_step(dt: Tensor, A: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Step sizes, and their sums times A within each chunk: (B, H, K T)."""
    step = F.pad(dt.transpose(1, 2), (0, -dt.shape[1] % T)).contiguous()
    return step, (step * A[:, None]).unflatten(-1, (-1, T)).cumsum(-1).flatten(2)


def _to_end(sums: Tensor, T: int) -> Tensor:
    """Decay from each step to the end of its chunk."""
    sums = sums.unflatten(-1, (-1, T))
    return (sums[..., -1:] - sums).exp().flatten(2)


def _tiles(x: Tensor, B: Tensor, T: int) -> tuple[int, dict[str, Any]]:
    """B K H, and the settings of the kernels of matrix products."""
    batch, length, heads, width = x.shape
    return batch * -(-length // T) * heads, tiles(width, B.shape[3], T, x.dtype) | LAUNCH


def _sizes(x: Tensor, B: Tensor, T: int) -> tuple[int, ...]:
    _, length, heads, width = x.shape
    return length, heads, width, B.shape[3], heads // B.shape[2], -(-length // T)


def _outer(x: Tensor, matrix: Tensor, weight: Tensor, out: Tensor, T: int) -> None:
    grid, constants = _tiles(x, matrix, T)
    blocks = -(-x.shape[3] // constants["P_BLOCK"]) * -(-matrix.shape[3] // constants["N_BLOCK"])
    arguments = (*_sizes(x, matrix, T), *_strides(x, matrix))
    ssd_scan_outer_kernel[(grid * blocks,)](x, matrix, weight, out, *arguments, **constants)


def _pass(
    states: Tensor,
    sums: Tensor,
    start: Tensor | None,
    end: Tensor,
    T: int,
    before: Tensor | None = None,
    products: Tensor | None = None,
) -> None:
    batch, chunks, heads, width, size = states.shape
    start = None if start is None else start.contiguous()
    grid = (-(-width * size // PASS_BLOCK) * batch * heads,)
    constants = {"T": T, "BLOCK": PASS_BLOCK, "REVERSE": before is not None}
    ssd_scan_pass_kernel[grid](states, sums, start, end, before, products, width * size, heads, chunks, **constants)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride(axis) for tensor in tensors for axis in range(3))
