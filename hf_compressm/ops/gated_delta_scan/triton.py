"""The gated delta rule by Triton kernels: their launches, and the sums over single tokens in between."""

from __future__ import annotations

import contextlib
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .chunks import Layout, chunk_layout, most_chunks
from .triton_kernels import (
    gated_delta_scan_bwd_kernel,
    gated_delta_scan_bwd_keys_kernel,
    gated_delta_scan_bwd_pairs_kernel,
    gated_delta_scan_fwd_kernel,
    gated_delta_scan_output_kernel,
    gated_delta_scan_pairs_kernel,
)

if TYPE_CHECKING:
    from .op import Gradients, Inputs

CHUNK = 32
OPERANDS = {
    torch.float16: (tl.float16, "tf32"),
    torch.bfloat16: (tl.bfloat16, "tf32"),
    torch.float32: (tl.float32, "tf32x3"),
    torch.float64: (tl.float64, "ieee"),
}
"""dtype of what is multiplied, and how: three products of tf32 are as exact as float32."""
BLOCKS = {torch.float16: (32, 32), torch.bfloat16: (32, 32), torch.float32: (16, 32), torch.float64: (16, 16)}
"""Most key and value channels of a tile that leave all kernels without spills."""
LAUNCH = {"num_warps": 4, "num_stages": 1}
LAUNCH_BACKWARD = LAUNCH | {"num_warps": 8}
"""Of the kernel that goes from chunk to chunk in the backward pass, which holds most."""


def tiles(channels: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """What kernels are compiled for; blocks of channels divide their number, rounded up to 16."""
    operand, precision = OPERANDS[dtype]
    fitting = [
        most if -(-size // 16) * 16 % most == 0 else 16
        for size, most in zip((channels, width), BLOCKS[dtype], strict=True)
    ]
    sizes = {"C": CHUNK, "K_BLOCK": fitting[0], "V_BLOCK": fitting[1]}
    return sizes | {"OPERAND": operand, "PRECISION": precision}


def kept_shapes(inputs: Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what the forward pass keeps: X (B, L, H, V) and the states before chunks (B, n, H, K, V)."""
    batch, length, heads, width = inputs.v.shape
    sequences = 1 if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    chunks = most_chunks(length, sequences, CHUNK)
    return tuple(inputs.v.shape), (batch, chunks, heads, inputs.k.shape[3], width)


class _Prepared(NamedTuple):
    """What all kernels read: q, k, e, v, contiguous; s and beta (B, n, H, C); first token and number of tokens of each
    chunk (n, 2); first chunk and the one after the last of each sequence (sequences, 2).
    """

    tensors: tuple[Tensor, ...]
    sums: Tensor
    beta: Tensor
    table: Tensor
    ranges: Tensor
    sizes: tuple[int, ...]
    constants: dict[str, Any]

    def programs(self, *more: int) -> tuple[int]:
        """A grid of one program for each sequence of a batch, chunk and head, times more."""
        return (math.prod(self.sums.shape[:3]) * math.prod(more),)


def forward(inputs: Inputs) -> tuple[Tensor, ...]:
    """Output (B, L, H, V), final states (sequences, H, K, V), X (B, L, H, V) and the states before chunks."""
    made = _prepare(inputs)
    written, states = (made.sums.new_zeros(shape) for shape in kept_shapes(inputs))
    output = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    final = made.sums.new_zeros(len(made.ranges), *states.shape[2:])
    if inputs.initial_state is not None:
        final.copy_(inputs.initial_state)
    _place(states, final, made, last=False)
    blocks = -(-inputs.v.shape[3] // made.constants["V_BLOCK"])
    q, k, e, v = made.tensors
    with _on(v):
        _, mixed, inverse = _pairs(made, inputs.scale)
        gated_delta_scan_fwd_kernel[(final.shape[0] * final.shape[1] * blocks,)](
            k, e, v, made.sums, made.beta, inverse, made.table, made.ranges, written, states, final, *made.sizes,
            PACKED=inputs.cu_seqlens is not None, **made.constants, **LAUNCH,
        )  # fmt: skip
        gated_delta_scan_output_kernel[made.programs(blocks)](
            q, made.sums, made.beta, mixed, made.table, written, states, output, inputs.scale, *made.sizes,
            **made.constants, **LAUNCH,
        )  # fmt: skip
    return output, final, written, states


def backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g, beta, erase (None if there is none) and of the initial states (sequences, H, K, V)."""
    made, written, states = _prepare(inputs), gradients.written, gradients.states
    doutput = torch.zeros_like(inputs.v) if gradients.doutput is None else gradients.doutput
    doutput = doutput.contiguous()
    dinitial = states.new_zeros(len(made.ranges), *states.shape[2:])
    if gradients.dfinal is not None:
        dinitial.copy_(gradients.dfinal)
    costates = torch.zeros_like(states)
    _place(costates, dinitial, made, last=True)
    batch, (length, heads, channels, width, _, chunks) = len(inputs.v), made.sizes
    v_blocks, k_blocks = -(-width // made.constants["V_BLOCK"]), -(-channels // made.constants["K_BLOCK"])
    dx, dbeta = torch.zeros_like(written), made.sums.new_zeros(v_blocks, *made.sums.shape)
    dq, dk, de = (written.new_empty(*written.shape[:3], channels) for _ in range(3))
    inner, flows = torch.empty_like(made.sums), made.sums.new_empty(k_blocks, 3, *made.sums.shape)
    options = made.constants | LAUNCH
    q, k, e, _ = made.tensors
    with _on(inputs.v):
        raw, mixed, inverse = _pairs(made, inputs.scale)
        gated_delta_scan_bwd_kernel[(len(dinitial) * heads * v_blocks,)](
            q, k, e, made.sums, made.beta, raw, mixed, inverse, made.table, made.ranges, written, doutput, costates,
            dinitial, dx, dbeta, inputs.scale, batch, *made.sizes, PACKED=inputs.cu_seqlens is not None,
            **(options | LAUNCH_BACKWARD),
        )  # fmt: skip
        into_raw, into_mixed = torch.empty_like(raw), torch.empty_like(mixed)
        fitting = {name: value for name, value in options.items() if name != "K_BLOCK"}
        gated_delta_scan_bwd_pairs_kernel[made.programs()](
            made.sums, made.beta, raw, mixed, made.table, written, doutput, dx, into_raw, into_mixed, inner,
            inputs.scale, length, heads, width, chunks, **fitting,
        )  # fmt: skip
        gated_delta_scan_bwd_keys_kernel[made.programs(k_blocks)](
            q, k, e, made.sums, made.beta, into_raw, into_mixed, made.table, written, doutput, dx, states, costates,
            dq, dk, de, flows, inputs.scale, batch, *made.sizes, **options,
        )  # fmt: skip
    dg = _decay_gradient(inner, flows.sum(0))
    dg, dbeta = (_to_tokens(found, inputs) for found in (dg, dbeta.sum(0)))
    dq, dk, de = (found.unflatten(2, (inputs.k.shape[2], -1)).sum(3) for found in (dq, dk, de))
    if inputs.erase is None:
        return dq, dk + de, dx, dg, dbeta, None, dinitial
    return dq, dk, dx, dg, dbeta, de, dinitial


def _decay_gradient(inner: Tensor, flows: Tensor) -> Tensor:
    """Gradient of g (B, n, H, C): a decay is in s of later tokens, and in the decays of earlier ones up to the end."""
    starts, ends, whole = flows.unbind(0)
    later = (inner + starts).flip(-1).cumsum(-1).flip(-1)
    return later + F.pad(ends, (1, 0))[..., :-1].cumsum(-1) + whole.sum(-1, keepdim=True)


def _to_tokens(tensor: Tensor, inputs: Inputs) -> Tensor:
    """(B, n, H, C) into (B, L, H)."""
    batch, length = inputs.v.shape[:2]
    layout = chunk_layout(length, inputs.cu_seqlens, CHUNK)
    return layout.join(tensor[:, : layout.bounds[-1]].movedim(1, 0).flatten(1, 2), batch, length)


def _place(states: Tensor, ends: Tensor, made: _Prepared, last: bool) -> None:
    """Copies the first or last states of sequences that have tokens to their chunks."""
    for sequence, (begin, end) in enumerate(made.ranges.tolist()):
        if end > begin:
            b = sequence if len(states) > 1 else 0
            states[b, end - 1 if last else begin] = ends[sequence]


def _pairs(made: _Prepared, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """N without beta, P and (I + N diag(beta))^-1, (B, n, H, C, C)."""
    raw, mixed, inverse = (made.sums.new_empty(*made.sums.shape, CHUNK) for _ in range(3))
    length, heads, channels, _, per_group, chunks = made.sizes
    fitting = {name: value for name, value in made.constants.items() if name != "V_BLOCK"}
    gated_delta_scan_pairs_kernel[made.programs()](
        *made.tensors[:3], made.sums, made.beta, made.table, raw, mixed, inverse, scale, length, heads, channels,
        per_group, chunks, **fitting, **LAUNCH,
    )  # fmt: skip
    return raw, mixed, inverse


def _prepare(inputs: Inputs) -> _Prepared:
    v, dtype = inputs.v, torch.promote_types(inputs.v.dtype, torch.float32)
    layout, (_, shape) = chunk_layout(v.shape[1], inputs.cu_seqlens, CHUNK), kept_shapes(inputs)
    e, count = inputs.k if inputs.erase is None else inputs.erase, shape[1]
    tensors = tuple(tensor.to(v.dtype).contiguous() for tensor in (inputs.q, inputs.k, e, v))
    ends = [0, v.shape[1]] if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    table = [(n, min(CHUNK, end - n)) for begin, end in pairwise(ends) for n in range(begin, end, CHUNK)]
    table += [(0, 0)] * (count - len(table))
    ranges = list(pairwise(layout.bounds)) * (len(v) if inputs.cu_seqlens is None else 1)
    sums, beta = (_per_token(tensor.to(dtype), layout, count) for tensor in (inputs.g, inputs.beta))
    return _Prepared(
        tensors=tensors,
        sums=sums.cumsum(-1),
        beta=beta,
        table=torch.tensor(table, device=v.device),
        ranges=torch.tensor(ranges, device=v.device),
        sizes=(*v.shape[1:3], inputs.k.shape[3], v.shape[3], v.shape[2] // inputs.k.shape[2], count),
        constants=tiles(inputs.k.shape[3], v.shape[3], v.dtype),
    )


def _per_token(tensor: Tensor, layout: Layout, count: int) -> Tensor:
    """(B, L, H) into (B, n, H, C)."""
    parts = layout.split(tensor).unflatten(1, (len(tensor), -1)).movedim(0, 1)
    return F.pad(parts, (0, 0, 0, 0, 0, count - parts.shape[1])).contiguous()


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
