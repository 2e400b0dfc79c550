"""The gated delta rule on the CPU: launches of the Numba kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..threads import run_units
from .chunks import most_chunks
from .cpu_kernels import CHUNK, gated_delta_scan_bwd_kernel, gated_delta_scan_fwd_kernel
from .cpu_step_kernels import gated_delta_step_kernel

if TYPE_CHECKING:
    from .op import Gradients, Inputs

ALONE = 1 << 18
"""Up to so many entries of states one thread is faster than several, which take time to start."""


def forward(inputs: Inputs) -> tuple[Tensor, ...]:
    """Output (B, L, H, V), final states (sequences, H, K, V), X (B, L, H, V) and the states before chunks."""
    batch, length, heads, width = inputs.v.shape
    dtype = torch.promote_types(inputs.v.dtype, torch.float32)
    new, (_, shape) = torch.zeros, kept_shapes(inputs)
    initial = inputs.initial_state
    if initial is None:
        sequences = batch if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
        initial = new(sequences, heads, inputs.k.shape[3], width, dtype=dtype)
    output, written = (torch.empty(inputs.v.shape, dtype=dtype) for _ in range(2))
    states, final = new(shape, dtype=dtype), torch.empty(initial.shape, dtype=dtype)
    arguments = (*_arrays(inputs, dtype), _array(initial, dtype), _bounds(inputs))
    found = (tensor.numpy() for tensor in (output, written, states, final))
    run_units(gated_delta_scan_fwd_kernel, batch * heads, *arguments, *found)
    return output.to(inputs.v.dtype), final, written, states


def backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g, beta, erase (None if there is none) and of the initial states (sequences, H, K, V)."""
    _, dfinal, written, states = gradients
    dtype, doutput = written.dtype, gradients.doutput
    batch, _, groups, _ = inputs.k.shape
    doutput = torch.zeros_like(written) if doutput is None else doutput
    sequences = batch if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    costates = states.new_zeros(sequences, inputs.v.shape[2], *states.shape[2:])
    if dfinal is not None:
        costates.copy_(dfinal)
    dq, dk, de = (torch.empty(inputs.k.shape, dtype=dtype) for _ in range(3))
    dv, dg, dbeta = (torch.empty(tensor.shape, dtype=dtype) for tensor in (inputs.v, inputs.g, inputs.beta))
    kept = (written.numpy(), states.numpy(), _array(doutput, dtype), costates.numpy())
    found = (tensor.numpy() for tensor in (dq, dk, de, dv, dg, dbeta))
    arguments = (*_arrays(inputs, dtype), _bounds(inputs), *kept, *found)
    run_units(gated_delta_scan_bwd_kernel, batch * groups, *arguments)
    if inputs.erase is None:
        return dq, dk.add_(de), dv, dg, dbeta, None, costates
    return dq, dk, dv, dg, dbeta, de, costates


def kept_shapes(inputs: Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what the forward pass keeps: X (B, L, H, V) and the states before chunks (n, B H, K, V)."""
    batch, length, heads, width = inputs.v.shape
    sequences = 1 if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    chunks = most_chunks(length, sequences, CHUNK)
    return tuple(inputs.v.shape), (chunks, batch * heads, inputs.k.shape[3], width)


def step(scale: float, state: Tensor, q: Tensor, k: Tensor, e: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Output (B, H, V) of one token, in v's dtype; updates `state` (B, H, K, V), which is contiguous.

    Args:
        q, k, e: (B, G, K). v: (B, H, V). g: (B, H) or (B, H, K). beta: (B, H).
    """
    queries, keys, values, decays, betas = (_array(tensor, state.dtype) for tensor in (q, k, v, g, beta))
    erases = keys if e is k else _array(e, state.dtype)
    decays = decays if decays.ndim == 3 else decays[..., None]
    output, units = np.empty_like(values), betas.size
    arguments = (queries, keys, erases, values, decays, betas, scale, state.detach().numpy(), output)
    if state.numel() <= ALONE:
        gated_delta_step_kernel(0, units, *arguments)
    else:
        run_units(gated_delta_step_kernel, units, *arguments)
    found = torch.from_numpy(output)
    return found if found.dtype == v.dtype else found.to(v.dtype)


def _arrays(inputs: Inputs, dtype: torch.dtype) -> tuple:
    e = inputs.k if inputs.erase is None else inputs.erase
    arrays = [_array(tensor, dtype) for tensor in (inputs.q, inputs.k, e, inputs.v, inputs.g, inputs.beta)]
    return *arrays, arrays[0].dtype.type(inputs.scale)


def _bounds(inputs: Inputs) -> np.ndarray:
    bounds = [0, inputs.v.shape[1]] if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    return np.array(bounds, dtype=np.int64)


def _array(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()
