"""The gated delta rule: checks, custom ops and the choice of the backend."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS, choose_backend, kernels
from ..checks import check_devices, check_real
from ..custom_ops import custom_op, empty_gradients, fitted_gradients, register_gradient


def gated_delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    erase: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule with a matrix per value head, differentiable once in all tensors.

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T e_t)^T and o_t = scale S_t^T q_t, S (K, V). Value head
    h has the queries, keys and erase keys of key head h // (H // G).

    Args:
        q, k: (B, L, G, K), float16, bfloat16, float32 or float64, any strides. The caller normalises them.
        v: (B, L, H, V), with H a multiple of G.
        g: log decay, <= 0: (B, L, H), or (B, L, H, K) with one per key channel.
        beta: (B, L, H), how much of a token is written, usually in (0, 1) or (0, 2).
        erase: e (B, L, G, K), the key that a token reads the state with before it writes; k if None.
        scale: of the output; K**-0.5 if None.
        initial_state: (B, H, K, V); zero if None. With `cu_seqlens` (n, H, K, V).
        cu_seqlens: int64 (n + 1,), from 0 to L, not decreasing: B is 1, and n sequences lie one after the other along
            L, each with a state of its own.
        backend: "naive" (PyTorch), "cpu" (PyTorch and Numba), "triton" or, where installed, "fla"; by device if None.
            The environment variable HF_COMPRESSM_GATED_DELTA_SCAN sets one too. With one decay per key channel, "cpu"
            and "triton" compute as "naive".

    Returns:
        o (B, L, H, V) in v's dtype, and the final state (B, H, K, V), or (n, H, K, V), in float32, or float64 if v is.
        All sums are in the latter precision.

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend is unknown or cannot run here.
        RuntimeError: if gradients of gradients are asked for; `naive_gated_delta_scan` has them.

    Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10; decays per key channel: Kimi Team 2025,
    arXiv 2510.26692, section 3.
    """
    _check(q, k, v, g, beta, erase, initial_state, cu_seqlens)
    backend = choose_backend("gated_delta_scan", backend, v.device.type, (*BACKENDS, "fla"))
    scale = k.shape[3] ** -0.5 if scale is None else float(scale)
    inputs = Inputs(q, k, v, g, beta, erase, initial_state, cu_seqlens, scale, backend)
    if backend == "fla":
        return _fla(inputs)
    output, final, _, _ = _scan(*inputs)
    return output, final


class Inputs(NamedTuple):
    """Arguments of the custom op, as in `gated_delta_scan`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    erase: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    backend: str


class Gradients(NamedTuple):
    """What the backward pass gets besides the inputs.

    Gradients of o (B, L, H, V) and of the final state (B, H, K, V), and what the forward pass kept: what tokens write
    and states along the way.
    """

    doutput: Tensor | None
    dfinal: Tensor | None
    written: Tensor
    states: Tensor


def _fla(inputs: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta, erase, initial_state, cu_seqlens, scale, _ = inputs
    if erase is not None or g.ndim == 4 or v.dtype == torch.float64 or k.shape[3] > 256:
        raise ValueError(
            "the backend 'fla' of gated_delta_scan runs without erase keys, decays per key channel and float64 and "
            f"with at most 256 key channels, here {k.shape[3]}; use the backend 'triton'"
        )
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k = (tensor.to(v.dtype).repeat_interleave(v.shape[2] // k.shape[2], 2) for tensor in (q, k))
    initial_state = None if initial_state is None else initial_state.float()
    return chunk_gated_delta_rule(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    check_keys(q, k, erase, v, 4)
    batch, length, heads, width = v.shape
    channels = k.shape[3]
    if g.shape not in ((batch, length, heads), (batch, length, heads, channels)):
        raise ValueError(
            f"g must be {(batch, length, heads)}, one log decay per head, or {(batch, length, heads, channels)}, one "
            f"per key channel; got {tuple(g.shape)}"
        )
    if beta.shape != (batch, length, heads):
        raise ValueError(f"beta must be {(batch, length, heads)}, (B, L, H) as in v; got {tuple(beta.shape)}")
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    expected = (sequences, heads, channels, width)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"initial_state must be {expected}, (sequences, H, K, V); got {tuple(initial_state.shape)}. A cache from "
            "before a cut does not fit the model after it"
        )
    if cu_seqlens is not None and (
        batch != 1 or cu_seqlens.ndim != 1 or sequences < 1 or cu_seqlens.dtype != torch.int64
    ):
        raise ValueError(
            "cu_seqlens must be int64 (n + 1,), with a batch of 1 whose sequences lie packed along L; got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} and a batch of {batch}"
        )
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "erase": erase, "initial_state": initial_state}
    check_real(**tensors)
    check_devices(**tensors, cu_seqlens=cu_seqlens)


def check_keys(q: Tensor | None, k: Tensor, erase: Tensor | None, v: Tensor, dimensions: int) -> None:
    """Check the shapes of keys and values.

    Args:
        q, k, erase: (..., G, K), q and erase None or as k. v: (..., H, V), with H a multiple of G.
        dimensions: number of dimensions that they must have.

    Raises:
        ValueError: if a shape does not fit, or a size is 0.
    """
    letters = "B, L, " if dimensions == 4 else "B, "
    if v.ndim != dimensions or v.numel() == 0:
        raise ValueError(f"v must have shape ({letters}H, V), all >= 1; got {tuple(v.shape)}")
    if k.ndim != dimensions or k.shape[:-2] != v.shape[:-2] or k.numel() == 0 or v.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"k must have shape ({letters}G, K) with B and L as in v, G a divisor of {v.shape[-2]} and K >= 1; got "
            f"{tuple(k.shape)}"
        )
    for name, tensor in (("q", q), ("erase", erase)):
        if tensor is not None and tensor.shape != k.shape:
            raise ValueError(f"{name} must have the shape of k, {tuple(k.shape)}; got {tuple(tensor.shape)}")


def _module(inputs: Inputs) -> ModuleType:
    """The module with `forward`, `backward` and `kept_shapes` that fits."""
    if inputs.backend == "naive" or inputs.g.ndim == 4:
        return kernels(__package__, "chunks")
    return kernels(__package__, inputs.backend)


def _fake(inputs: Inputs) -> tuple[Tensor, ...]:
    v, dtype = inputs.v, torch.promote_types(inputs.v.dtype, torch.float32)
    sequences = len(v) if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    final = v.new_empty(sequences, v.shape[2], inputs.k.shape[3], v.shape[3], dtype=dtype)
    written, states = (v.new_empty(shape, dtype=dtype) for shape in _module(inputs).kept_shapes(inputs))
    return v.new_empty(v.shape), final, written, states


def _fake_backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    return *empty_gradients(inputs[:6]), _fake(inputs)[1]


@custom_op("gated_delta_scan", Inputs, returns=4, fake=_fake)
def _scan(inputs: Inputs) -> tuple[Tensor, ...]:
    if inputs.cu_seqlens is not None:
        _check_bounds(inputs.cu_seqlens.tolist(), inputs.v.shape[1])
    return _module(inputs).forward(inputs)


@custom_op("gated_delta_scan_backward", Gradients, Inputs, returns=7, fake=_fake_backward)
def _scan_backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    *found, dinitial = _module(inputs).backward(gradients, inputs)
    return *fitted_gradients(found, inputs[:6]), dinitial


def _saved(inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple:
    # A cache may overwrite the initial state, and the first states are kept.
    return *outputs[2:], *inputs._replace(initial_state=None)


register_gradient(_scan, _scan_backward, Inputs, _saved, outputs=2)


def _check_bounds(bounds: list[int], length: int) -> None:
    increasing = all(begin <= end for begin, end in zip(bounds[:-1], bounds[1:], strict=True))
    if bounds[0] != 0 or bounds[-1] != length or not increasing:
        raise ValueError(f"cu_seqlens must rise from 0 to L = {length} without decreasing; got {bounds}")
