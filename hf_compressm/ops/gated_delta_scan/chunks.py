"""The gated delta rule in chunks of C tokens, by matrix products: plain PyTorch, with a backward pass by hand.

Within a chunk let s_t be the running sum of log decays, S the state before the chunk, and x_t = v_t - exp(g_t)
S_{t-1}^T e_t what a token writes before beta. Then

    (I + N diag(beta)) X = V - exp(s) E S,    N_tj = exp(s_t - s_j) e_t . k_j for j < t,
    O = scale exp(s) Q S + P diag(beta) X,    P_tj = scale exp(s_t - s_j) q_t . k_j for j <= t,
    S <- exp(s_C) S + (exp(s_C - s) K)^T diag(beta) X.

X and the states before chunks are kept for the backward pass. Decays enter as differences of s only: none overflows.
Gradients of decays leave out the terms that would cancel.

Shapes: n chunks of C tokens, M = batch times value heads, K key channels, V value channels; G key heads. A decay has
one number per token or one per token and key channel.

Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, section 3.3; Yang et al. 2024, arXiv 2406.06484, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .op import Gradients, Inputs

CHUNK = 64
"""C where a decay is one number per token."""
CHUNK_PER_CHANNEL = 16
"""C where each key channel has a decay: C numbers per token and channel are formed."""


class Layout(NamedTuple):
    """Where the tokens of sequences go: each sequence begins with a chunk of its own.

    `slots` (L,) is the place of each token among n C places, None where places are the tokens and a padding at the end;
    `bounds` holds the first chunk of each sequence and at last n.
    """

    chunk: int
    slots: Tensor | None
    bounds: list[int]

    def split(self, tensor: Tensor) -> Tensor:
        """(B, L, H, ...) into (n, B H, C, ...), with zeros where there is no token."""
        places = self.bounds[-1] * self.chunk
        if self.slots is None:
            tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, places - tensor.shape[1]))
        else:
            padded = tensor.new_zeros(tensor.shape[0], places, *tensor.shape[2:])
            tensor = padded.index_copy_(1, self.slots, tensor)
        parts = tensor.unflatten(1, (-1, self.chunk))  # (B, n, C, H, ...)
        return parts.movedim(1, 0).movedim(3, 2).flatten(1, 2)

    def join(self, tensor: Tensor, batch: int, length: int) -> Tensor:
        """The inverse of `split`."""
        parts = tensor.unflatten(1, (batch, -1)).movedim(2, 3).movedim(0, 1).flatten(1, 2)
        return parts[:, :length] if self.slots is None else parts[:, self.slots]


def chunk_layout(length: int, cu_seqlens: Tensor | None, chunk: int) -> Layout:
    """The layout of sequences of `length` tokens, or of packed ones, whose bounds `cu_seqlens` have shape (n + 1,)."""
    if cu_seqlens is None:
        return Layout(chunk, None, [0, -(-length // chunk)])
    ends = cu_seqlens.tolist()
    bounds, slots = [0], []
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        slots.append(torch.arange(end - begin, device=cu_seqlens.device) + bounds[-1] * chunk)
        bounds.append(bounds[-1] - (begin - end) // chunk)
    return Layout(chunk, torch.cat(slots), bounds)


def most_chunks(length: int, sequences: int, chunk: int) -> int:
    """The most chunks that `length` tokens in so many sequences can take, known without their lengths."""
    return -(-length // chunk) if sequences == 1 else min(length, length // chunk + sequences)


class Chunk(NamedTuple):
    """Tensors of chunks: (n, M, C, ...) of all of them.

    `into` and `reads` (.., C, K), erase keys and queries, meet the state before the chunk and hold the decay since
    then; `writes` (.., C, K), keys, hold the decay up to its end. `keep` (.., 1 or K, 1) is the decay of the whole
    chunk, and `erased` N and `mixed` P (.., C, C) belong to pairs of its tokens.
    """

    into: Tensor
    reads: Tensor
    writes: Tensor
    keep: Tensor
    erased: Tensor
    mixed: Tensor


def prepare(q: Tensor, k: Tensor, e: Tensor, g: Tensor, scale: float) -> Chunk:
    """What a chunk's states need, of q, k, e (n, M, C, K) and g (n, M, C) or (n, M, C, K)."""
    sums = (g if g.ndim == 4 else g[..., None]).cumsum(2)
    start, end = sums.exp(), (sums[:, :, -1:] - sums).exp()
    if g.ndim == 4:
        read, erased = (_channel_pairs(rows, k, sums) for rows in (q, e))
    else:
        decays = pair_decays(sums)
        read, erased = (q @ k.mT) * decays, (e @ k.mT) * decays
    return Chunk(e * start, q * (scale * start), k * end, start[:, :, -1:].mT, erased.tril(-1), scale * read.tril())


def pair_decays(sums: Tensor) -> Tensor:
    """exp(s_t - s_j) (.., C, C) for j <= t, else 0, of s (.., C, 1)."""
    later = torch.ones(sums.shape[2], sums.shape[2], dtype=torch.bool, device=sums.device).triu(1)
    return (sums - sums.mT).masked_fill(later, -torch.inf).exp()


def _channel_decays(sums: Tensor) -> Tensor:
    """exp(s_tc - s_jc) (.., C, C, K) for j <= t, else 0, of s (.., C, K)."""
    later = torch.ones(sums.shape[-2], sums.shape[-2], 1, dtype=torch.bool, device=sums.device)
    later = later.squeeze(-1).triu(1)[..., None]
    return (sums[..., :, None, :] - sums[..., None, :, :]).masked_fill(later, -torch.inf).exp()


def _channel_pairs(rows: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    parts = zip(rows, k, sums, strict=True)
    return torch.stack([torch.einsum("mtc,mjc,mtjc->mtj", r, key, _channel_decays(s)) for r, key, s in parts])


def advance(chunk: Chunk, v: Tensor, beta: Tensor, n: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """X (M, C, V) of chunk n and the state after it (M, K, V), from that before it; arguments as in `run_chunks`."""
    system = chunk.erased[n] * beta[n, :, None]
    right = torch.baddbmm(v[n], chunk.into[n], state, alpha=-1)
    found = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return found, torch.baddbmm(chunk.keep[n] * state, chunk.writes[n].mT, found * beta[n, ..., None])


def run_chunks(
    chunk: Chunk, v: Tensor, beta: Tensor, state: Tensor, bounds: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X and O (n, M, C, V), the states before chunks (n, M, K, V) and the last ones (sequences M, K, V).

    Args:
        v: (n, M, C, V). beta: (n, M, C). state: (sequences M, K, V), the initial states. bounds: as in `Layout`.
    """
    found, states, finals = [v[:0]], [state.new_empty(0, v.shape[1], *state.shape[1:])], []
    for sequence, now in enumerate(state.unflatten(0, (len(bounds) - 1, -1))):
        for n in range(bounds[sequence], bounds[sequence + 1]):
            states.append(now[None])
            written, now = advance(chunk, v, beta, n, now)
            found.append(written[None])
        finals.append(now)
    written, before = torch.cat(found), torch.cat(states)
    outputs = chunk.reads @ before + chunk.mixed @ (written * beta[..., None])
    return written, outputs, before, torch.cat(finals)


def run_chunks_backward(
    chunk: Chunk, beta: Tensor, slopes: Tensor, costate: Tensor, bounds: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of U = diag(beta) X (n, M, C, V), of the state after each chunk (n, M, K, V), of the initial states.

    Args:
        slopes: gradient of O (n, M, C, V). costate: that of the last states of sequences (sequences M, K, V).
    """
    system = (chunk.erased * beta[..., :, None]).mT
    found, after, initial = torch.empty_like(slopes), [], []
    for sequence, last in reversed(list(enumerate(costate.unflatten(0, (len(bounds) - 1, -1))))):
        now = last
        for n in range(bounds[sequence + 1] - 1, bounds[sequence] - 1, -1):
            after.append(now)
            right = torch.baddbmm(torch.bmm(chunk.mixed[n].mT, slopes[n]), chunk.writes[n], now)
            torch.linalg.solve_triangular(system[n], right, upper=True, unitriangular=True, out=found[n])
            now = torch.baddbmm(chunk.keep[n] * now, chunk.reads[n].mT, slopes[n])
            now.baddbmm_(chunk.into[n].mT, found[n] * beta[n, ..., None], alpha=-1)
        initial.append(now)
    return found, torch.stack(after[::-1]), torch.cat(initial[::-1])


def pull_back(
    q: Tensor, k: Tensor, e: Tensor, g: Tensor, scale: float, chunk: Chunk, slopes: Chunk
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, e (n, M, C, K) and g (n, M, C) or (n, M, C, K) from those of what `prepare` returned.

    Those of pairs (n, M, C, C) may be full matrices.
    """
    sums = (g if g.ndim == 4 else g[..., None]).cumsum(2)
    start, end = sums.exp(), (sums[:, :, -1:] - sums).exp()
    erased, mixed = slopes.erased.tril(-1), slopes.mixed.tril() * scale
    if g.ndim == 4:
        dq, dk, de, flow = _pull_back_channels(q, k, e, sums, erased, mixed)
    else:
        decays = pair_decays(sums)
        flow = slopes.mixed.tril(-1) * chunk.mixed + erased * chunk.erased
        flow = (flow.sum(-1) - flow.sum(-2))[..., None]
        mixed, erased = mixed * decays, erased * decays
        dq, de, dk = mixed @ k, erased @ k, mixed.mT @ q + erased.mT @ e
    flow = flow + _fit(slopes.into * chunk.into + slopes.reads * chunk.reads, g)
    flow = flow.flip(2).cumsum(2).flip(2) + (slopes.keep * chunk.keep).mT
    flow = flow + F.pad(_fit(slopes.writes * chunk.writes, g), (0, 0, 1, 0))[:, :, :-1].cumsum(2)
    dq, de, dk = dq + slopes.reads * (scale * start), de + slopes.into * start, dk + slopes.writes * end
    return dq, dk, de, flow if g.ndim == 4 else flow[..., 0]


def _fit(product: Tensor, g: Tensor) -> Tensor:
    return product if g.ndim == 4 else product.sum(-1, keepdim=True)


def _pull_back_channels(
    q: Tensor, k: Tensor, e: Tensor, sums: Tensor, erased: Tensor, mixed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = []
    for n in range(len(q)):
        decays, earlier = _channel_decays(sums[n]), mixed[n].tril(-1)
        dq, de = (torch.einsum("mtj,mjc,mtjc->mtc", pairs, k[n], decays) for pairs in (earlier, erased[n]))
        dk = torch.einsum("mtj,mtc,mtjc->mjc", earlier, q[n], decays)
        dk += torch.einsum("mtj,mtc,mtjc->mjc", erased[n], e[n], decays)
        flow = dq * q[n] + de * e[n] - dk * k[n]
        own = mixed[n].diagonal(dim1=-2, dim2=-1)[..., None]
        found.append((dq + own * k[n], dk + own * q[n], de, flow))
    dq, dk, de, flow = (torch.stack(parts) for parts in zip(*found, strict=True))
    return dq, dk, de, flow


def forward(inputs: Inputs) -> tuple[Tensor, ...]:
    """Output (B, L, H, V), final states (sequences, H, K, V), X (n, M, C, V) and the states before chunks (n, M, K, V).

    n is the most chunks that there can be; the last ones hold zeros if there are fewer.
    """
    layout, scan = _layout(inputs), _tensors(inputs)
    v, batch, length = inputs.v, *inputs.v.shape[:2]
    written, states = (v.new_empty(shape, dtype=scan.v.dtype) for shape in kept_shapes(inputs))
    state = states.new_zeros(_sequences(inputs) * v.shape[2], *states.shape[2:])
    if inputs.initial_state is not None:
        state = inputs.initial_state.to(state.dtype).flatten(0, 1)
    chunk = prepare(scan.q, scan.k, scan.e, scan.g, inputs.scale)
    found, outputs, before, final = run_chunks(chunk, scan.v, scan.beta, state, layout.bounds)
    for kept, value in ((written, found), (states, before)):
        kept[: len(value)], kept[len(value) :] = value, 0
    output = layout.join(outputs, batch, length).to(v.dtype)
    return output.contiguous(), final.unflatten(0, (-1, v.shape[2])), written, states


def backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g, beta, erase (None if there is none) and of the initial states (sequences, H, K, V)."""
    layout, scan = _layout(inputs), _tensors(inputs)
    n, dtype = layout.bounds[-1], scan.v.dtype
    written, states = gradients.written[:n], gradients.states[:n]
    doutput = torch.zeros_like(inputs.v) if gradients.doutput is None else gradients.doutput
    slopes = layout.split(doutput.to(dtype)).contiguous()
    costate = states.new_zeros(_sequences(inputs) * inputs.v.shape[2], *states.shape[2:])
    if gradients.dfinal is not None:
        costate = gradients.dfinal.to(dtype).flatten(0, 1)
    chunk = prepare(scan.q, scan.k, scan.e, scan.g, inputs.scale)
    into_written, after, dinitial = run_chunks_backward(chunk, scan.beta, slopes, costate, layout.bounds)
    beta = scan.beta[..., None]
    dbeta, dv, scaled = (into_written * written).sum(-1), into_written * beta, written * beta
    flows = Chunk(
        into=-dv @ states.mT,
        reads=slopes @ states.mT,
        writes=scaled @ after.mT,
        keep=(after * states).sum((-1, -2) if scan.g.ndim == 3 else -1).view_as(chunk.keep),
        erased=-dv @ scaled.mT,
        mixed=slopes @ scaled.mT,
    )
    dq, dk, de, dg = pull_back(scan.q, scan.k, scan.e, scan.g, inputs.scale, chunk, flows)
    if inputs.erase is None:
        dk = dk + de
    batch, length, groups = inputs.k.shape[:3]
    dq, dk, de, dv, dg, dbeta = (layout.join(found, batch, length) for found in (dq, dk, de, dv, dg, dbeta))
    dq, dk, de = (found.unflatten(2, (groups, -1)).sum(3) for found in (dq, dk, de))
    return dq, dk, dv, dg, dbeta, None if inputs.erase is None else de, dinitial.unflatten(0, (-1, dv.shape[2]))


def kept_shapes(inputs: Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what the forward pass keeps: X (n, M, C, V) and states (n, M, K, V)."""
    (batch, length, heads, width), size = inputs.v.shape, _chunk_size(inputs)
    chunks = most_chunks(length, 1 if inputs.cu_seqlens is None else _sequences(inputs), size)
    return (chunks, batch * heads, size, width), (chunks, batch * heads, inputs.k.shape[3], width)


class _Tensors(NamedTuple):
    """Inputs in chunks, (n, M, C, ...), of one dtype; keys are repeated for the value heads of a key head."""

    q: Tensor
    k: Tensor
    e: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def _tensors(inputs: Inputs) -> _Tensors:
    layout, dtype = _layout(inputs), torch.promote_types(inputs.v.dtype, torch.float32)
    per_group = inputs.v.shape[2] // inputs.k.shape[2]
    q, k, e = (
        layout.split(tensor.to(dtype).repeat_interleave(per_group, 2)).contiguous()
        for tensor in (inputs.q, inputs.k, inputs.k if inputs.erase is None else inputs.erase)
    )
    v, g, beta = (layout.split(tensor.to(dtype)).contiguous() for tensor in (inputs.v, inputs.g, inputs.beta))
    return _Tensors(q, k, e, v, g, beta)


def _layout(inputs: Inputs) -> Layout:
    return chunk_layout(inputs.v.shape[1], inputs.cu_seqlens, _chunk_size(inputs))


def _chunk_size(inputs: Inputs) -> int:
    """At most the length, so that short sequences cost little."""
    return min(CHUNK if inputs.g.ndim == 3 else CHUNK_PER_CHANNEL, inputs.v.shape[1])


def _sequences(inputs: Inputs) -> int:
    return len(inputs.v) if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
