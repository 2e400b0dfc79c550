"""The selective scan on CUDA devices: launches of the Triton kernels.

Shapes: batch B, length L, H channels, N states, K chunks.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from ..memory import row_contiguous
from .op import Gradients, Inputs
from .triton_kernels import LOG2E, selective_scan_bwd_kernel, selective_scan_fwd_kernel

CHUNK, H_BLOCK = 64, 32
FORWARD = {"T": 32, "H_BLOCK": H_BLOCK, "num_warps": 1, "num_stages": 1}
BACKWARD = {"T": 8, "H_BLOCK": H_BLOCK, "num_warps": 1, "num_stages": 1}
"""One warp has all steps of a channel in one thread: no scan then goes across threads."""
PROGRAMS = 1024
"""Beyond so many programs, one of the backward pass takes several blocks. Fixed: the order of sums depends on it."""


def checkpoint_shape(inputs: Inputs) -> tuple[int, ...]:
    """(B, K + 2, N, H): the states before each chunk, those at the end, and room for one more plane."""
    batch, length, channels = inputs.u.shape
    return batch, -(-length // CHUNK) + 2, inputs.A.shape[1], channels


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H), the final state (B, H, N) and the checkpoints; see `selective_scan`."""
    _, _, A, B, C, D, _, delta_bias, initial_state, delta_softplus, _ = inputs
    batch, length, channels = inputs.u.shape
    dtype = torch.promote_types(inputs.u.dtype, torch.float32)
    u, delta, z = _rows(inputs)
    y = u.new_empty(batch, length, channels)
    checkpoints = u.new_empty(checkpoint_shape(inputs), dtype=dtype)
    checkpoints[:, 0] = 0 if initial_state is None else initial_state.mT
    checkpoints[:, -1] = 0
    with torch.cuda.device_of(u):
        selective_scan_fwd_kernel[(batch * triton.cdiv(channels, H_BLOCK),)](
            u, delta, _rates(A, dtype), _padded(B, dtype), _padded(C, dtype), _whole(D), z, _whole(delta_bias), y,
            checkpoints, length, channels, A.shape[1], *_strides(u, delta, z),
            SOFTPLUS=delta_softplus, TERMS=_terms(dtype), CHUNK=CHUNK, **FORWARD,
        )  # fmt: skip
    return y, checkpoints[:, -2].mT.clone(memory_format=torch.contiguous_format), checkpoints


def backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Gradients of the eight tensors (None for z if there is none) and of the initial state, of their shapes."""
    _, _, A, B, C, D, _, delta_bias, _, delta_softplus, _ = inputs
    dy, dfinal, checkpoints = gradients
    assert dy is not None
    batch, length, channels = inputs.u.shape
    size, dtype, new = A.shape[1], checkpoints.dtype, checkpoints.new_empty
    blocks = triton.cdiv(channels, H_BLOCK)
    each = max(1, batch * blocks // PROGRAMS)
    groups = triton.cdiv(blocks, each)
    (u, delta, z), dy = _rows(inputs), row_contiguous(dy)
    du, ddelta = torch.empty_like(u, memory_format=torch.contiguous_format), delta.new_empty(delta.shape)
    dz = None if z is None else z.new_empty(z.shape)
    costates, dA = new(batch, size, channels), new(batch, size, channels)
    costates[:] = 0 if dfinal is None else dfinal.mT
    between = new(batch, CHUNK // BACKWARD["T"], size, channels)
    dB, dC = (new(batch, groups, size, triton.cdiv(length, CHUNK) * CHUNK) for _ in "BC")
    # Blocks beyond the last one write nothing here.
    dD, dbias = new(batch, channels), new(batch, channels)
    with torch.cuda.device_of(u):
        selective_scan_bwd_kernel[(batch * groups,)](
            u, delta, _rates(A, dtype), _padded(B, dtype), _padded(C, dtype), _whole(D), z, _whole(delta_bias), dy,
            checkpoints, between, costates, du, ddelta, dA, dB, dC, dD, dz, dbias,
            length, channels, size, groups, each, *_strides(u, delta, z, dy),
            SOFTPLUS=delta_softplus, TERMS=_terms(dtype), CHUNK=CHUNK, **BACKWARD,
        )  # fmt: skip
    dB, dC = (partial.sum(1)[..., :length].mT for partial in (dB, dC))
    dinitial = costates.mT.clone(memory_format=torch.contiguous_format)
    return du, ddelta, dA.sum(0).t(), dB, dC, dD.sum(0), dz, dbias.sum(0), dinitial


def _rows(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    return (
        row_contiguous(inputs.u),
        row_contiguous(inputs.delta),
        None if inputs.z is None else row_contiguous(inputs.z),
    )


def _padded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, N) as (B, N, K CHUNK), with zeros at the end, so that loads of tiles need no mask."""
    return F.pad(rows.to(dtype).mT, (0, -rows.shape[1] % CHUNK)).contiguous()


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _rates(A: Tensor, dtype: torch.dtype) -> Tensor:
    return (A.to(dtype) * LOG2E.value).t().contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]


def _terms(dtype: torch.dtype) -> int:
    """Terms of the series of log(1 + e)."""
    return 17 if dtype == torch.float64 else 8
