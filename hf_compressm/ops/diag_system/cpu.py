"""The diagonal system on the CPU, tile by tile: the states of a tile stay in the processor's cache from the input map
to the read-out, and the next tile uses the same memory.

A tile is a group of sequences by a span of time; its size does not depend on the number of threads.

Shapes: batch B, length L, H features, N states, K spans of time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..diag_scan.cpu import diag_scan_bwd_kernel, diag_scan_fwd_kernel, initial_pairs, real_pairs, run
from ..threads import map_calls
from .op import Gradients, Inputs

CHUNK = 512
"""Most time steps of a span."""
TILE_BYTES = 1 << 21
"""Bytes of the states of a tile: well below a last-level cache, and enough work for the threads."""


def kept_shape(inputs: Inputs) -> tuple[int, ...]:
    """Shape of the real tensor that the forward pass keeps, see `Inputs`."""
    batch, length, _ = inputs.u.shape
    size = inputs.lam.shape[0]
    shapes = {"states": (batch, length, size, 2), "checkpoints": (-(-length // CHUNK), batch, size, 2)}
    return shapes.get(inputs.keep, (0,))


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H), the final state (B, N) complex, and what the backward pass needs, see `Inputs`."""
    u, lam, B, C, D, initial, keep = inputs
    groups, spans = _tiles(u, lam)
    poles, carry = real_pairs(lam), initial_pairs(initial, u, lam)
    y, kept = torch.empty_like(u, memory_format=torch.contiguous_format), poles.new_empty(kept_shape(inputs))

    def work(group: slice) -> None:
        for k, span in enumerate(spans):
            if keep == "checkpoints":
                kept[k, group] = carry[group]
            rows = _rows(u, group, span)
            states = _states(rows, B, poles, carry[group])
            if keep == "states":
                kept[group, span] = states
            out = (states.flatten(2).flatten(0, 1).to(u.dtype) @ C.t()).addcmul_(rows, D)
            y[group, span] = out.view_as(y[group, span])

    for _ in map_calls(work, groups):
        pass
    return y, torch.view_as_complex(carry), kept


def backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients of u (B, L, H), lam (N,), B (2 N, H), C (H, 2 N), D (H,) and the initial state (B, N)."""
    u, lam, B, C, D, initial, keep = inputs
    dy, dfinal, kept = gradients
    groups, spans = _tiles(u, lam)
    poles, start, carry = real_pairs(lam), initial_pairs(initial, u, lam), initial_pairs(dfinal, u, lam)
    dlam, du = torch.zeros_like(carry), torch.empty_like(u, memory_format=torch.contiguous_format)
    dy = torch.zeros_like(u) if dy is None else dy

    def work(group: slice) -> list[Tensor]:
        sums = [torch.zeros_like(B), torch.zeros_like(C), torch.zeros_like(D)]
        for k, span in reversed(list(enumerate(spans))):
            rows, grad = _rows(u, group, span), _rows(dy, group, span)
            if keep == "states":
                states = kept[group, span].contiguous()
                before = kept[group, span.start - 1].contiguous() if k else start[group]
            else:
                before = kept[k, group]
                states = _states(rows, B, poles, before.clone())
            adjoint = (grad @ C).to(poles.dtype).view_as(states)
            run(diag_scan_bwd_kernel, poles, states, before, adjoint, carry[group], adjoint, dlam[group])
            adjoint = adjoint.flatten(2).flatten(0, 1).to(u.dtype)
            sums[0].addmm_(adjoint.t(), rows)
            sums[1].addmm_(grad.t(), states.flatten(2).flatten(0, 1).to(u.dtype))
            sums[2] += (grad * rows).sum(0)
            du[group, span] = (adjoint @ B).addcmul_(grad, D).view_as(du[group, span])
        return sums

    dB, dC, dD = torch.zeros_like(B), torch.zeros_like(C), torch.zeros_like(D)
    for sums in map_calls(work, groups):
        for total, part in zip((dB, dC, dD), sums, strict=True):
            total += part
    return du, torch.view_as_complex(dlam.sum(0)), dB, dC, dD, torch.view_as_complex(carry)


def _tiles(u: Tensor, lam: Tensor) -> tuple[list[slice], list[slice]]:
    """Groups of sequences, and `ceil(L / CHUNK)` spans of time of about equal length."""
    batch, length, _ = u.shape
    span = -(-length // -(-length // CHUNK))
    group = max(1, TILE_BYTES // (span * lam.nbytes))
    return [slice(i, min(i + group, batch)) for i in range(0, batch, group)], [
        slice(k, min(k + span, length)) for k in range(0, length, span)
    ]


def _rows(x: Tensor, group: slice, span: slice) -> Tensor:
    return x[group, span].reshape(-1, x.shape[2])


def _states(rows: Tensor, B: Tensor, poles: Tensor, carry: Tensor) -> Tensor:
    """States (b, t, N, 2) of a tile, from its rows of u and the states before it, `carry`; updates `carry`."""
    states = (rows @ B.t()).to(poles.dtype).view(len(carry), -1, *poles.shape)
    run(diag_scan_fwd_kernel, poles, states, carry, states)
    return states
