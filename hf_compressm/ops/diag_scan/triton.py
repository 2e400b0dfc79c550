"""The diagonal scan on CUDA devices: launches of the Triton kernels.

Shapes: batch B, length L, N states.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .op import Gradients, Inputs, Saved
from .triton_kernels import diag_scan_bwd_kernel, diag_scan_ends_kernel, diag_scan_fwd_kernel

LANES = 64
TILE = 16
"""Time steps loaded ahead of their use: 128 bytes of float32 per lane under way."""
SHORTEST_CHUNK = 64


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """States (B, L, N) and the final state (B, N), complex, as in `diag_scan`."""
    lam, u = _pairs(inputs.lam).contiguous(), _pairs(inputs.u)
    start = _state(inputs.initial_state, u)
    states, final = torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(start)
    with torch.cuda.device_of(u):
        grid, sizes, ends = _launch(lam, u, reverse=False)
        split = grid[1] > 1
        diag_scan_fwd_kernel[grid](
            lam, u, start, ends, states, final, *sizes, SPLIT=split, LANES=LANES, TILE=TILE, num_warps=LANES // 32
        )
    return torch.view_as_complex(states), torch.view_as_complex(final)


def backward(gradients: Gradients, saved: Saved) -> tuple[Tensor, ...]:
    """Gradients of lam (N,), u (B, L, N) and the initial state (B, N), complex."""
    lam, states = _pairs(saved.lam).contiguous(), _pairs(saved.states).contiguous()
    # Without a gradient of the states: one zero with strides of zero, which costs no memory.
    grad = lam.new_zeros(()).expand(states.shape) if gradients.dstates is None else _pairs(gradients.dstates)
    start, first = _state(gradients.dfinal, states), _state(saved.initial_state, states)
    adjoint, dinitial = torch.empty_like(states), torch.empty_like(start)
    with torch.cuda.device_of(states):
        grid, sizes, ends = _launch(lam, grad, reverse=True)
        split = grid[1] > 1
        dlam = lam.new_empty(grid[1], *start.shape)
        tensors = (lam, states, first, grad, start, ends, adjoint, dlam, dinitial)
        diag_scan_bwd_kernel[grid](*tensors, *sizes, SPLIT=split, LANES=LANES, TILE=TILE, num_warps=LANES // 32)
    return tuple(torch.view_as_complex(found) for found in (dlam.sum((0, 1)), adjoint, dinitial))


def _launch(lam: Tensor, x: Tensor, reverse: bool) -> tuple[tuple[int, int], tuple, Tensor]:
    """Grid and sizes for the main kernels, and where each chunk ends if there are several."""
    batch, length, size, _ = x.shape
    lanes = batch * size
    doublings = chunk_doublings(lanes, length, x.device)
    grid = triton.cdiv(lanes, LANES), triton.cdiv(length, 1 << doublings)
    sizes = (size, lanes, length, doublings, *(stride // 2 for stride in x.stride()[:3]))
    ends = lam.new_empty(grid[1] if grid[1] > 1 else 0, batch, size, 2)
    if grid[1] > 1:
        diag_scan_ends_kernel[grid](
            lam, x, ends, *sizes, REVERSE=reverse, LANES=LANES, TILE=TILE, num_warps=LANES // 32
        )
    return grid, sizes, ends


def chunk_doublings(lanes: int, length: int, device: torch.device) -> int:
    """log2 of the steps of a chunk: all steps, unless lanes are fewer than it takes to keep the memory busy."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = 1 if lanes >= 256 * cores else triton.cdiv(512 * cores, lanes)
    return (max(SHORTEST_CHUNK, triton.cdiv(length, wanted)) - 1).bit_length()


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


def _state(state: Tensor | None, u: Tensor) -> Tensor:
    batch, _, size, _ = u.shape
    return u.new_zeros(batch, size, 2) if state is None else _pairs(state).contiguous()
