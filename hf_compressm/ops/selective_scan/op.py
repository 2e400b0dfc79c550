"""The selective scan as custom ops, so that autograd, `torch.compile` and meta tensors know it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _kernels(backend: str) -> ModuleType:
    if backend == "triton":
        from . import triton

        return triton
    from . import cpu

    return cpu


@torch.library.custom_op("hf_compressm::selective_scan", mutates_args=())
def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H) in u's dtype, the final state (B, H, N), and states along the way that the backward pass needs."""
    return _kernels(backend).scan_forward(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus)


@scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(u.dtype, torch.float32)
    final = u.new_empty(u.shape[0], *A.shape, dtype=dtype)
    kept = _kernels(backend).checkpoint_shape(*u.shape, A.shape[1])
    return u.new_empty(u.shape), final, u.new_empty(kept, dtype=dtype)


@torch.library.custom_op("hf_compressm::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    backend: str,
) -> Nine:
    """Gradients of u, delta, A, B, C, D, z, delta_bias (empty where there is none) and of the initial state."""
    found = _kernels(backend).scan_backward(
        dy, dfinal, u, delta, A, B, C, D, z, delta_bias, checkpoints, delta_softplus
    )
    *gradients, dinitial = found
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    # In the layout and dtype of the fake ones.
    fitted = [
        u.new_empty(0) if tensor is None else gradient.to(tensor.dtype).contiguous()
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]
    return (*fitted, dinitial)


@scan_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    backend: str,
) -> Nine:
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    fitted = [u.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in tensors]
    return (*fitted, checkpoints.new_empty(u.shape[0], *A.shape))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, initial_state, ctx.delta_softplus, ctx.backend = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple:
    saved = ctx.saved_tensors
    dy = torch.zeros_like(saved[0]) if dy is None else dy
    *found, dinitial = scan_backward(dy, dfinal, *saved, ctx.delta_softplus, ctx.backend)
    needed = ctx.needs_input_grad
    gradients = [gradient if need else None for gradient, need in zip(found, needed, strict=False)]
    return (*gradients, dinitial.to(ctx.initial_dtype) if needed[8] else None, None, None)


scan.register_autograd(_differentiate, setup_context=_save)
