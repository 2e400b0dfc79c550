"""The selective scan: checks, custom ops and the choice of the backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS, choose_backend, kernels
from ..checks import check_devices, check_real
from ..custom_ops import custom_op, empty_gradients, fitted_gradients, register_gradient
from .naive import naive_selective_scan

AVAILABLE = (*BACKENDS, "mamba_ssm")


class Inputs(NamedTuple):
    """Arguments of the custom op, as in `selective_scan`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    delta_softplus: bool
    backend: str


class Gradients(NamedTuple):
    """Gradients of y (B, L, H) and of the final state (B, H, N), and states that the forward pass kept."""

    dy: Tensor | None
    dfinal: Tensor | None
    checkpoints: Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Any:
    """Selective scan of Mamba, channels last, differentiable once in all tensors.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = (C_t . h_t + D u_t) silu(z_t) per channel, with
    dt_t = softplus(delta_t + delta_bias). The cost is in proportion to N, for every N.

    Args:
        u, delta: (B, L, H), float16, bfloat16, float32 or float64, any strides.
        A: (H, N), usually negative; float32 or float64.
        B, C: (B, L, N).
        D: (H,), or None for no direct term.
        z: (B, L, H), or None for no gate.
        delta_bias: (H,), or None.
        delta_softplus: whether softplus is applied; without it dt = delta + delta_bias.
        initial_state: (B, H, N); zero if None.
        return_final_state: whether to return the state after the last step too.
        backend: "naive", "cpu" (Numba), "triton" or, where installed, "mamba_ssm"; chosen by device if None. The
            environment variable HF_COMPRESSM_SELECTIVE_SCAN sets one too.

    Returns:
        y (B, L, H) in u's dtype; with `return_final_state` also h_{L-1} (B, H, N), in float32, or float64 if u is.
        All arithmetic is in the latter precision.

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend is unknown or cannot run here.
        RuntimeError: if gradients of gradients are asked for, except of the naive backend.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.
    """
    backend = choose_backend("selective_scan", backend, u.device.type, AVAILABLE)
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, backend)
    _check(inputs)
    if backend == "mamba_ssm":
        return _mamba_ssm(inputs, return_final_state)
    if backend == "naive":
        y, final = naive_selective_scan(*inputs[:8], delta_softplus, initial_state)
    else:
        y, final, _ = _scan(*inputs)
    return (y, final) if return_final_state else y


def _mamba_ssm(inputs: Inputs, return_final_state: bool) -> Tensor:
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, _ = inputs
    if initial_state is not None or return_final_state or A.shape[1] > 256 or u.dtype == torch.float64:
        raise ValueError(
            "the backend 'mamba_ssm' of selective_scan runs without initial_state, return_final_state and float64 "
            f"and with at most 256 states, here {A.shape[1]}; use the backend 'triton'"
        )
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C = (tensor.to(u.dtype).transpose(1, 2) for tensor in (u, delta, B, C))
    z = None if z is None else z.to(u.dtype).transpose(1, 2)
    D, delta_bias = (None if tensor is None else tensor.float() for tensor in (D, delta_bias))
    return selective_scan_fn(u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus).transpose(1, 2)


def _check(inputs: Inputs) -> None:
    u, delta, A, B, C, D, z, delta_bias, initial_state, *_ = inputs
    if u.ndim != 3 or u.numel() == 0:
        raise ValueError(f"u must have shape (B, L, H) with B, L, H >= 1; got {tuple(u.shape)}")
    batch, length, channels = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.numel() == 0:
        raise ValueError(f"A must have shape (H, N) with H = {channels} as in u and N >= 1; got {tuple(A.shape)}")
    size = A.shape[1]
    tensors = {"delta": delta, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state}
    expected = {
        "delta": ("(B, L, H)", (batch, length, channels)),
        "B": ("(B, L, N)", (batch, length, size)),
        "C": ("(B, L, N)", (batch, length, size)),
        "D": ("(H,)", (channels,)),
        "z": ("(B, L, H)", (batch, length, channels)),
        "delta_bias": ("(H,)", (channels,)),
        "initial_state": ("(B, H, N)", (batch, channels, size)),
    }
    for name, tensor in tensors.items():
        letters, shape = expected[name]
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, {letters}, as in u and A; got {tuple(tensor.shape)}")
    check_real(u=u, A=A, **tensors)
    check_devices(u=u, A=A, **tensors)


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    u, dtype = inputs.u, torch.promote_types(inputs.u.dtype, torch.float32)
    kept = kernels(__package__, inputs.backend).checkpoint_shape(inputs)
    final = u.new_empty(u.shape[0], *inputs.A.shape, dtype=dtype)
    return u.new_empty(u.shape), final, u.new_empty(kept, dtype=dtype)


def _fake_backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    dinitial = gradients.checkpoints.new_empty(inputs.u.shape[0], *inputs.A.shape)
    return *empty_gradients(inputs[:8]), dinitial


@custom_op("selective_scan", Inputs, returns=3, fake=_fake)
def _scan(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(__package__, inputs.backend).forward(inputs)


@custom_op("selective_scan_backward", Gradients, Inputs, returns=9, fake=_fake_backward)
def _scan_backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, ...]:
    dy = torch.zeros_like(inputs.u) if gradients.dy is None else gradients.dy
    *found, dinitial = kernels(__package__, inputs.backend).backward(gradients._replace(dy=dy), inputs)
    return *fitted_gradients(found, inputs[:8]), dinitial


def _saved(inputs: Inputs, outputs: tuple[Tensor, ...]) -> tuple:
    # A cache may overwrite the initial state, and the first checkpoint holds it.
    return outputs[2], *inputs._replace(initial_state=None)


register_gradient(_scan, _scan_backward, Inputs, _saved, outputs=2)
