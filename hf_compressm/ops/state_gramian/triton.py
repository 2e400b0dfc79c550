"""The state Gramian on CUDA devices: launches of the Triton kernel.

Shapes: batch B, length L, channels I in G groups, N states.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .op import Inputs
from .triton_kernels import state_gramian_fwd_kernel

LOG2E = 1.4426950408889634
SCHEDULE = {"H_BLOCK": 16, "T": 2, "SPAN": 256}
WARPS = 4096
"""Number of warps beyond which a program takes several blocks of channels. Fixed: the order of sums depends on it."""


def forward(inputs: Inputs) -> Tensor:
    """float64 (G, N, N), the weighted sum of h_t h_t^T; see `state_gramian` of the package."""
    u, dt, A, B, weights, _ = inputs
    groups, size = B.shape[2:]
    tile = tile_of(size)
    tiles = triton.cdiv(size, tile)
    total = u.new_zeros(groups, tiles * tile, tiles * tile, dtype=torch.float64)
    rates = (A.float() * LOG2E).contiguous()
    for diagonal in (True, False)[: min(tiles, 2)]:
        pairs = [(i, j) for i in range(tiles) for j in range(tiles) if (i == j if diagonal else i > j)]
        sums = _launch(u, dt, rates, B, weights, len(pairs), tile, diagonal).sum(2)
        for pair, (i, j) in enumerate(pairs):
            total[:, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] = sums[:, pair]
    total = total[:, :size, :size]
    return total.tril() + total.tril(-1).mT


def tile_of(size: int) -> int:
    """Number of states on each side of a program's tile, 16 to 64, for N = size."""
    return min(64, max(16, triton.next_power_of_2(size)))


def options(tile: int) -> dict[str, int]:
    """Options that a program with `tile` states on each side is compiled with."""
    # Left to itself, ptxas would rather spill a few of its registers than run two programs at a time instead of three.
    return {"num_warps": tile // 16, "num_stages": 1, "maxnreg": 255 if tile > 32 else 128}


def _launch(
    u: Tensor,
    dt: Tensor,
    rates: Tensor,
    B: Tensor,
    weights: Tensor | None,
    pairs: int,
    tile: int,
    diagonal: bool,
) -> Tensor:
    """The programs' sums: float64 (G, pairs, programs, tile, tile)."""
    batch, length, channels = u.shape
    groups, size = B.shape[2:]
    width = channels // groups
    blocks = triton.cdiv(width, SCHEDULE["H_BLOCK"])
    units = batch * blocks
    each = max(1, triton.cdiv(units, max(1, WARPS // (options(tile)["num_warps"] * groups * pairs))))
    sums = u.new_zeros(groups, pairs, triton.cdiv(units, each), tile, tile, dtype=torch.float64)
    with torch.cuda.device_of(u):
        state_gramian_fwd_kernel[sums.shape[2], pairs, groups](
            u, dt, rates, B, weights, sums, length, size, width, blocks, units, each,
            *u.stride(), *dt.stride(), *B.stride(), *((0, 0) if weights is None else weights.stride()),
            DIAGONAL=diagonal, SHARED=rates.shape[1] == 1, TILES=triton.cdiv(size, tile), TILE=tile,
            **SCHEDULE, **options(tile),
        )  # fmt: skip
    return sums
