"""Mamba-2's scan: checks, custom ops and the choice of the backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS, choose_backend, kernels
from ..checks import check_devices, check_real
from ..custom_ops import custom_op, empty_gradients, fitted_gradients, register_gradient
from .naive import Limits, naive_ssd_scan, time_steps, time_steps_backward

AVAILABLE = (*BACKENDS, "mamba_ssm")


class Inputs(NamedTuple):
    """Arguments of the custom op, as in `ssd_scan`; `low` and `high` are `dt_limit`.

    Backends get the time step itself as `dt`, and `dt`, `A`, `D` and `initial_state` in the precision of the states.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    dt_softplus: bool
    low: float
    high: float
    chunk_size: int
    backend: str


class Gradients(NamedTuple):
    """Gradients of y (B, L, H, P) and of the final state (B, H, P, N), and states that the forward pass kept."""

    dy: Tensor | None
    dfinal: Tensor | None
    checkpoints: Tensor


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Any:
    """Scan of Mamba-2, differentiable once in all tensors.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t per head, h (P, N). B and C are shared by the
    heads of a group.

    Args:
        x: (B, L, H, P), float16, bfloat16, float32 or float64, any strides.
        dt: (B, L, H). The time step is dt + dt_bias, after softplus if `dt_softplus`, clamped to `dt_limit`.
        A: (H,), usually negative.
        B, C: (B, L, G, N), with H divisible by G and N >= 1.
        D: (H,), or None for no direct term.
        dt_bias: (H,), or None.
        dt_softplus: whether softplus is applied to the time step.
        dt_limit: smallest and largest time step.
        initial_state: (B, H, P, N); zero if None.
        chunk_size: most steps, >= 1, that one matrix product treats. It changes the result by rounding only. The
            backend "cpu" ignores it, since it goes step by step, and "triton" chooses smaller chunks where they are
            faster.
        return_final_state: whether to return the state after the last step too.
        backend: "naive", "cpu" (Numba), "triton" or, where installed, "mamba_ssm"; chosen by device if None. The
            environment variable HF_COMPRESSM_SSD_SCAN sets one too.

    Returns:
        y (B, L, H, P) in x's dtype; with `return_final_state` also the final state, float32, or float64 if x is.

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend is unknown or cannot run.
        RuntimeError: if gradients of gradients are asked for, except of the naive backend.

    Source: Dao and Gu 2024, arXiv 2405.21060, section 6.
    """
    backend = choose_backend("ssd_scan", backend, x.device.type, AVAILABLE)
    low, high = map(float, dt_limit)
    inputs = Inputs(x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, low, high, chunk_size, backend)
    _check(inputs)
    if backend == "naive":
        y, final = naive_ssd_scan(*inputs[:7], dt_softplus, (low, high), initial_state, chunk_size)
    elif backend == "mamba_ssm":
        y, final = _mamba_ssm(inputs)
    else:
        y, final, _ = _scan(*inputs)
    return (y, final) if return_final_state else y


def _mamba_ssm(inputs: Inputs) -> tuple[Tensor, Tensor]:
    if inputs.x.dtype == torch.float64:
        raise ValueError("the backend 'mamba_ssm' of ssd_scan does not run in float64; use the backend 'triton'")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        *inputs[:5], inputs.chunk_size, D=inputs.D, dt_bias=inputs.dt_bias, initial_states=inputs.initial_state,
        dt_softplus=inputs.dt_softplus, dt_limit=(inputs.low, inputs.high), return_final_states=True,
    )  # fmt: skip


def _check(inputs: Inputs) -> None:
    x, dt, A, B, C, D, dt_bias, initial_state, *_ = inputs
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must have shape (B, L, H, P), all >= 1; got {tuple(x.shape)}")
    batch, length, heads, width = x.shape
    if dt.shape != (batch, length, heads):
        raise ValueError(f"dt must be {(batch, length, heads)}, (B, L, H) as in x; got {tuple(dt.shape)}")
    for name, tensor in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if tensor is not None and tensor.shape != (heads,):
            raise ValueError(f"{name} must be {(heads,)}, one number per head; got {tuple(tensor.shape)}")
    fits = B.ndim == 4 and B.shape[:2] == (batch, length) and B.numel() > 0 and heads % B.shape[2] == 0
    if not fits or C.shape != B.shape:
        raise ValueError(
            f"B and C must both be ({batch}, {length}, G, N) with G a divisor of {heads} and N >= 1; got "
            f"{tuple(B.shape)} and {tuple(C.shape)}"
        )
    expected = (batch, heads, width, B.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be {expected}, (B, H, P, N); got {tuple(initial_state.shape)}")
    if inputs.chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {inputs.chunk_size}")
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    check_real(**tensors)
    check_devices(**tensors)


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x, dtype = inputs.x, torch.promote_types(inputs.x.dtype, torch.float32)
    kept = kernels(__package__, inputs.backend).checkpoint_shape(inputs)
    return x.new_empty(x.shape), x.new_empty(_state_shape(inputs), dtype=dtype), x.new_empty(kept, dtype=dtype)


def _fake_backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    return *empty_gradients(inputs[:7]), gradients.checkpoints.new_empty(_state_shape(inputs))


@custom_op("ssd_scan", Inputs, returns=3, fake=_fake)
def _scan(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(__package__, inputs.backend).forward(_prepared(inputs))


@custom_op("ssd_scan_backward", Gradients, Inputs, returns=8, fake=_fake_backward)
def _scan_backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    dy = torch.zeros_like(inputs.x) if gradients.dy is None else gradients.dy
    found = kernels(__package__, inputs.backend).backward(gradients._replace(dy=dy), _prepared(inputs))
    dx, dstep, dA, dB, dC, dD, dinitial = found
    limits = inputs.low, inputs.high
    ddt = time_steps_backward(dstep, inputs.dt.to(dstep.dtype), inputs.dt_bias, inputs.dt_softplus, limits)
    dbias = None if inputs.dt_bias is None else ddt.sum((0, 1))
    return *fitted_gradients((dx, ddt, dA, dB, dC, dD, dbias), inputs[:7]), dinitial.contiguous()


def _prepared(inputs: Inputs) -> Inputs:
    """The inputs as backends get them."""
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    limits = inputs.low, inputs.high
    step = time_steps(inputs.dt.to(dtype), inputs.dt_bias, inputs.dt_softplus, limits)
    D, initial = (None if tensor is None else tensor.to(dtype) for tensor in (inputs.D, inputs.initial_state))
    return inputs._replace(dt=step, A=inputs.A.to(dtype), D=D, initial_state=initial)


def _state_shape(inputs: Inputs) -> tuple[int, ...]:
    batch, _, heads, width = inputs.x.shape
    return batch, heads, width, inputs.B.shape[3]


def _saved(inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple:
    # A cache may overwrite the initial state, and the first checkpoint holds it.
    return outputs[2], *inputs._replace(initial_state=None)


register_gradient(_scan, _scan_backward, Inputs, _saved, outputs=2)
