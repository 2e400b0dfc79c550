"""Mamba-2's scan: checks, custom ops and the choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS, choose_backend
from .naive import naive_ssd_scan
from .step import Limits, time_steps, time_steps_backward


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
        dt: (B, L, H); `dt_bias` (H,) is added, it passes softplus if `dt_softplus`, and is clamped to `dt_limit`.
        A: (H,), usually negative.
        B, C: (B, L, G, N), with H divisible by G and N >= 1.
        D: (H,), or None.
        initial_state: (B, H, P, N); zero if None.
        chunk_size: at most so many steps, >= 1, are treated by matrix products at once. It changes the result by
            rounding only, and the backends "cpu", which goes step by step, and "triton" choose smaller chunks where
            these are faster.
        return_final_state: whether to return the state after the last step too.
        backend: "naive", "cpu" (Numba), "triton" or, where installed, "mamba_ssm"; by device if None. The environment
            variable HF_COMPRESSM_SSD_SCAN forces one as well.

    Returns:
        y (B, L, H, P) in x's dtype; with `return_final_state` also the final state, float32, or float64 if x is.

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend cannot run; the message says which.
        RuntimeError: if gradients of gradients are asked for, except of the naive backend.

    Source: Dao and Gu 2024, arXiv 2405.21060, section 6.
    """
    _check(x, dt, A, B, C, D, dt_bias, initial_state, chunk_size)
    backend = choose_backend("ssd_scan", backend, x.device.type, (*BACKENDS, "mamba_ssm"))
    low, high = map(float, dt_limit)
    if backend == "naive":
        dtype = torch.promote_types(x.dtype, torch.float32)
        step = time_steps(dt.to(dtype), dt_bias, dt_softplus, (low, high))
        wide = x.to(dtype)
        y, final = naive_ssd_scan(wide, step, A.to(dtype), B.to(dtype), C.to(dtype), initial_state, chunk_size)
        y = (y if D is None else y + wide * D.to(dtype)[:, None]).to(x.dtype)
    elif backend == "mamba_ssm":
        if x.dtype == torch.float64:
            raise ValueError("the backend 'mamba_ssm' of ssd_scan does not run in float64; use the backend 'triton'")
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        y, final = mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, initial_states=initial_state, dt_softplus=dt_softplus,
            dt_limit=(low, high), return_final_states=True,
        )  # fmt: skip
    else:
        y, final, _ = _scan(x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, low, high, chunk_size, backend)
    return (y, final) if return_final_state else y


@torch.library.custom_op("hf_compressm::ssd_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = time_steps(dt.to(dtype), dt_bias, softplus, (low, high))
    A, D, initial = A.to(dtype), _wide(D, dtype), _wide(initial, dtype)
    if backend == "triton":
        from .triton import scan_forward as on_gpu

        return on_gpu(x, step, A, B, C, D, initial, chunk)
    from .cpu import scan_forward

    y, final, checkpoints = scan_forward(x.to(dtype), step, A, B.to(dtype), C.to(dtype), D, initial)
    return y.to(x.dtype), final, checkpoints


@_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from .triton import checkpoint_shape as on_gpu

        shape = on_gpu(x, B.shape[3], chunk)
    else:
        from .cpu import checkpoint_shape

        shape = checkpoint_shape(x, B.shape[3])
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    return (
        x.new_empty(x.shape),
        x.new_empty(state, dtype=dtype),
        x.new_empty(shape, dtype=dtype),
    )


@torch.library.custom_op("hf_compressm::ssd_scan_backward", mutates_args=())
def _scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    checkpoints: Tensor,
    dy: Tensor | None,
    dfinal: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = time_steps(dt.to(dtype), dt_bias, softplus, (low, high))
    slopes = torch.zeros_like(x) if dy is None else dy
    if backend == "triton":
        from .triton import scan_backward as on_gpu

        found = on_gpu(x, step, A.to(dtype), B, C, _wide(D, dtype), checkpoints, slopes, dfinal, chunk)
    else:
        from .cpu import scan_backward

        moving = (x.to(dtype), step, A.to(dtype), B.to(dtype), C.to(dtype), _wide(D, dtype))
        found = scan_backward(*moving, checkpoints, slopes.to(dtype), dfinal)
    dx, dstep, dA, dB, dC, dD, dinitial = found
    ddt = time_steps_backward(dstep, dt.to(dtype), dt_bias, softplus, (low, high))
    dbias = ddt.sum((0, 1)).to(dt.dtype if dt_bias is None else dt_bias.dtype)
    given = A if D is None else D
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype).contiguous(),
        dA.to(A.dtype),
        dB.to(B.dtype).contiguous(),
        dC.to(C.dtype).contiguous(),
        dD.to(given.dtype),
        dbias,
        dinitial.contiguous(),
    )


@_scan_backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    checkpoints: Tensor,
    dy: Tensor | None,
    dfinal: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    given, bias = A if D is None else D, dt if dt_bias is None else dt_bias
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        given.new_empty(A.shape),
        bias.new_empty(A.shape),
        checkpoints.new_empty(state),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, initial, ctx.softplus, ctx.low, ctx.high, ctx.chunk, ctx.backend = inputs
    ctx.initial_dtype = None if initial is None else initial.dtype
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple:
    settings = ctx.softplus, ctx.low, ctx.high, ctx.chunk, ctx.backend
    *found, dinitial = _scan_backward(*ctx.saved_tensors, dy, dfinal, *settings)
    needed = ctx.needs_input_grad
    grads = [grad if wanted else None for grad, wanted in zip(found, needed, strict=False)]
    return *grads, dinitial.to(ctx.initial_dtype) if needed[7] else None, None, None, None, None, None


_scan.register_autograd(_differentiate, setup_context=_save)


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
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
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"all tensors must be on one device; x is on {x.device} and {name} on {tensor.device}")
