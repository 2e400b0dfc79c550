"""The diagonal complex scan in plain PyTorch, with its adjoint written out and all steps done in place.

Buffers are time-major, (L, B, N), so that one step is one contiguous block. While a step's block is so small
that calling an operation costs more than its arithmetic, the sequence is cut into about sqrt(L) chunks that
advance together: fewer, larger operations for at most twice the arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BELOW_ON_CPU = 2048
"""States per step (B * N) up to which chunks are faster on a CPU, forward and backward."""
CHUNK_BELOW_ELSEWHERE = 1 << 19
"""The same for accelerators, where launching a kernel costs as much as moving megabytes."""
SHORTEST_CHUNKED = 16
"""Below this length there is nothing to gain from chunks."""
REDUCTION_BLOCK = 1 << 18
"""Elements multiplied at once for the gradient of the poles on a CPU, so that products stay in its cache."""


def _steps_(blocks: list[Tensor], lam: Tensor, carry: Tensor | None) -> None:
    """blocks[k] += lam * blocks[k-1], in place and in order, with blocks[-1] = carry (zero if None)."""
    for block in blocks:
        if carry is not None:
            block.addcmul_(carry, lam)
        carry = block


def _chunk_length(x: Tensor) -> int | None:
    """Steps per chunk for a buffer (L, B, N), or None where single steps are faster."""
    L, B, N = x.shape
    below = CHUNK_BELOW_ON_CPU if x.device.type == "cpu" else CHUNK_BELOW_ELSEWHERE
    return math.isqrt(L) if L >= SHORTEST_CHUNKED and below >= B * N else None


def _scan_(x: Tensor, lam: Tensor, carry: Tensor | None, reverse: bool = False) -> None:
    """Turn x (L, B, N) from inputs into states, in place; from the last step to the first if `reverse`."""
    order = slice(None, None, -1 if reverse else 1)
    length = _chunk_length(x)
    if length is None:
        _steps_(list(x.unbind(0))[order], lam, carry)
        return
    count, remainder = divmod(x.shape[0], length)
    rest, body = x.split([remainder, count * length]) if reverse else x.split([count * length, remainder])[::-1]
    chunks = body.view(count, length, *x.shape[1:])

    # Each chunk as if from zero; then the chunks' last states; then what they add to the next chunk.
    _steps_(list(chunks.unbind(1))[order], lam, None)
    powers = lam.expand(length, -1).cumprod(0)
    last = 0 if reverse else -1
    ends = list(chunks[:, last].unbind(0))[order]
    _steps_(ends, powers[-1], carry)
    if reverse:
        inner, inner_powers = chunks[:, 1:], powers[:-1, None].flip(0)
        inner[:-1].addcmul_(chunks[1:, :1], inner_powers)
    else:
        inner, inner_powers = chunks[:, :-1], powers[:-1, None]
        inner[1:].addcmul_(chunks[:-1, -1:], inner_powers)
    if carry is not None:
        inner[-1 if reverse else 0].addcmul_(carry, inner_powers)
    _steps_(list(rest.unbind(0))[order], lam, ends[-1])


def _pole_gradient(adjoint: Tensor, states: Tensor, initial_state: Tensor | None) -> Tensor:
    """sum over k and batch of adjoint_k * conj(h_{k-1}); adjoint and states are (L, B, N)."""
    L, B, N = adjoint.shape
    total = torch.zeros_like(adjoint[0, 0])
    if initial_state is not None:
        total += (adjoint[0] * initial_state.conj()).sum(0)
    block = max(1, REDUCTION_BLOCK // (B * N)) if adjoint.device.type == "cpu" else L
    for start in range(1, L, block):
        stop = min(start + block, L)
        total += (adjoint[start:stop] * states[start - 1 : stop - 1].conj()).sum((0, 1))
    return total


def _time_major(x: Tensor) -> Tensor:
    """A fresh contiguous (L, B, N) copy of x (B, L, N)."""
    x = x.transpose(0, 1)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


class _DiagScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lam: Tensor, u: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        buffer = _time_major(u)
        _scan_(buffer, lam.resolve_conj(), initial_state)
        states = buffer.transpose(0, 1)
        ctx.save_for_backward(lam, states, initial_state)
        return states, buffer[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if grad_states is None and grad_final is None:
            return None, None, None
        lam, states, initial_state = ctx.saved_tensors
        states = states.transpose(0, 1)
        adjoint = torch.zeros_like(states) if grad_states is None else _time_major(grad_states)
        if grad_final is not None:
            adjoint[-1] += grad_final
        conjugate = lam.conj().resolve_conj()
        _scan_(adjoint, conjugate, None, reverse=True)
        needs_lam, needs_u, needs_initial = ctx.needs_input_grad
        return (
            _pole_gradient(adjoint, states, initial_state) if needs_lam else None,
            adjoint.transpose(0, 1) if needs_u else None,
            conjugate * adjoint[0] if needs_initial else None,
        )


# torch.compile would unroll the loop into thousands of nodes.
@torch.compiler.disable
def loop_diag_scan(lam: Tensor, u: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Diagonal complex linear recurrence with an explicit adjoint; see `naive_diag_scan` for the shapes.

    h_k = lam * h_{k-1} + u_k. Backward, with g_k = conj(lam) g_{k+1} + dL/dh_k: dL/du_k = g_k,
    dL/dlam = sum_k g_k conj(h_{k-1}), dL/dh_{-1} = conj(lam) g_0. Fast if u.transpose(0, 1) is contiguous.

    Raises:
        RuntimeError: in a second differentiation, which is not supported.
    """
    return _DiagScan.apply(lam, u, initial_state)
