"""The diagonal scan on the CPU, by Numba: threads over sequences and blocks of states, vectors over states.

Complex numbers are pairs of reals, (real, imaginary), in the last dimension. A unit of work, one block of states of
one sequence, goes through time alone, so results do not depend on the number of threads.

Shapes: batch B, length L, N states.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import njit
from torch import Tensor

from ..threads import run_units
from .op import Gradients, Inputs, Saved

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning."""
BLOCK = 64
"""States of one unit of work."""


@njit(nogil=True, fastmath=FAST, cache=True)
def diag_scan_fwd_kernel(begin, end, lam, u, carry, states):
    """states_k = lam * states_{k-1} + u_k from the state `carry` (B, N, 2), which becomes the last one.

    `states` may be `u`.
    """
    length, size = u.shape[1:3]
    blocks = (size + BLOCK - 1) // BLOCK
    # Slices of flat arrays: LLVM finds no constant stride in slices of the others and would not vectorise.
    lam, u, carry, states = lam.reshape(-1), u.reshape(-1), carry.reshape(-1), states.reshape(-1)
    for unit in range(begin, end):
        b, first = unit // blocks, (unit % blocks) * BLOCK
        width = min(BLOCK, size - first)
        lam_re, lam_im = lam[2 * first : 2 * (first + width) : 2].copy(), lam[2 * first + 1 :: 2][:width].copy()
        ends = carry[2 * (b * size + first) : 2 * (b * size + first + width)]
        re, im = ends[::2].copy(), ends[1::2].copy()
        for t in range(length):
            offset = 2 * ((b * length + t) * size + first)
            row, out = u[offset : offset + 2 * width], states[offset : offset + 2 * width]
            # Two loops: one that reads and writes arrays which may be the same would not vectorise.
            for n in range(width):
                product = lam_re[n] * re[n] - lam_im[n] * im[n]
                im[n] = lam_re[n] * im[n] + lam_im[n] * re[n] + row[2 * n + 1]
                re[n] = product + row[2 * n]
            for n in range(width):
                out[2 * n] = re[n]
                out[2 * n + 1] = im[n]
        ends[::2], ends[1::2] = re, im


@njit(nogil=True, fastmath=FAST, cache=True)
def diag_scan_bwd_kernel(begin, end, lam, states, initial, grad, carry, adjoint, dlam):
    """adjoint_k = grad_k + carry_k with carry_{k-1} = conj(lam) * adjoint_k, from the last step to the first.

    `carry` (B, N, 2) enters as the gradient of the final state and leaves as that of `initial`; `dlam` (B, N, 2)
    gains the sums of adjoint_k * conj(states_{k-1}). `adjoint` may be `grad`.
    """
    length, size = grad.shape[1:3]
    blocks = (size + BLOCK - 1) // BLOCK
    lam, states, initial, grad = lam.reshape(-1), states.reshape(-1), initial.reshape(-1), grad.reshape(-1)
    carry, adjoint, dlam = carry.reshape(-1), adjoint.reshape(-1), dlam.reshape(-1)
    for unit in range(begin, end):
        b, first = unit // blocks, (unit % blocks) * BLOCK
        width = min(BLOCK, size - first)
        lam_re, lam_im = lam[2 * first : 2 * (first + width) : 2].copy(), lam[2 * first + 1 :: 2][:width].copy()
        start, stop = 2 * (b * size + first), 2 * (b * size + first + width)
        ends, sums = carry[start:stop], dlam[start:stop]
        re, im = ends[::2].copy(), ends[1::2].copy()
        sum_re, sum_im = sums[::2].copy(), sums[1::2].copy()
        for t in range(length - 1, -1, -1):
            offset = 2 * ((b * length + t) * size + first)
            row, out = grad[offset : offset + 2 * width], adjoint[offset : offset + 2 * width]
            before = states[offset - 2 * size : offset - 2 * size + 2 * width] if t else initial[start:stop]
            for n in range(width):
                re[n] += row[2 * n]
                im[n] += row[2 * n + 1]
            for n in range(width):
                out[2 * n] = re[n]
                out[2 * n + 1] = im[n]
            for n in range(width):
                sum_re[n] += re[n] * before[2 * n] + im[n] * before[2 * n + 1]
                sum_im[n] += im[n] * before[2 * n] - re[n] * before[2 * n + 1]
                product = lam_re[n] * re[n] + lam_im[n] * im[n]
                im[n] = lam_re[n] * im[n] - lam_im[n] * re[n]
                re[n] = product
        ends[::2], ends[1::2] = re, im
        sums[::2], sums[1::2] = sum_re, sum_im


def run(kernel: Any, lam: Tensor, *tensors: Tensor) -> None:
    """Run a kernel on contiguous real tensors: lam (N, 2), then a tensor with B rows, then others."""
    units = len(tensors[0]) * -(-len(lam) // BLOCK)
    run_units(kernel, units, *(tensor.detach().numpy() for tensor in (lam, *tensors)))


def real_pairs(x: Tensor) -> Tensor:
    """Complex x, of any shape, as contiguous pairs of reals in a new last dimension."""
    return torch.view_as_real(x.resolve_conj().contiguous())


def initial_pairs(state: Tensor | None, u: Tensor, lam: Tensor) -> Tensor:
    """A new copy of a state (B, N) as pairs of reals (B, N, 2); zeros if it is None. B is that of u, N that of lam."""
    if state is None:
        return lam.real.new_zeros(u.shape[0], lam.shape[0], 2)
    return torch.view_as_real(state.resolve_conj()).clone(memory_format=torch.contiguous_format)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """States (B, L, N) and the final state (B, N), complex, as in `diag_scan`."""
    lam, u, initial, _ = inputs
    carry, drive = initial_pairs(initial, u, lam), real_pairs(u)
    states = torch.empty_like(drive)
    run(diag_scan_fwd_kernel, real_pairs(lam), drive, carry, states)
    return torch.view_as_complex(states), torch.view_as_complex(carry)


def backward(gradients: Gradients, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lam (N,), u (B, L, N) and the initial state (B, N), complex."""
    (dstates, dfinal), (lam, states, initial, _) = gradients, saved
    carry, dlam = initial_pairs(dfinal, states, lam), initial_pairs(None, states, lam)
    start, kept = initial_pairs(initial, states, lam), real_pairs(states)
    grad = torch.zeros_like(kept) if dstates is None else real_pairs(dstates)
    adjoint = torch.empty_like(kept)
    run(diag_scan_bwd_kernel, real_pairs(lam), kept, start, grad, carry, adjoint, dlam)
    return torch.view_as_complex(dlam.sum(0)), torch.view_as_complex(adjoint), torch.view_as_complex(carry)
