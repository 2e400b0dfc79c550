"""The state statistics of selective layers: G without ever storing all states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose_backend
from .naive import naive_state_gramian

__all__ = ["naive_state_gramian", "state_gramian"]


def state_gramian(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of h_t h_t^T over batch, channels and time steps of a selective scan.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t per channel, from h_{-1} = 0. Channels are split into G groups of
    neighbours, each with its own B: one group in Mamba, `n_groups` in Mamba-2, whose heads and head channels are the
    channels here. Memory does not grow with the length. The result has no gradient.

    Args:
        u: (batch, L, I), any float dtype: what drives the channels.
        dt: (batch, L, I), >= 0: step sizes, after softplus.
        A: (I, N), or (I, 1) where all states of a channel decay alike; usually negative.
        B: (batch, L, G, N), with I divisible by G.
        weights: (batch, L), any dtype, >= 0: how often h_t h_t^T counts; once if None. States of weight 0 are not
            looked at, which saves most of the work.
        backend: "naive", "cpu" (Numba) or "triton"; chosen by device if None. The environment variable
            HF_COMPRESSM_STATE_GRAMIAN forces one as well.

    Returns:
        float64 (G, N, N), accumulated in float32 over short stretches and in float64 over these.

    Raises:
        ValueError: if a shape or device does not fit, or the backend is unknown or cannot run here.
    """
    if u.ndim != 3 or u.numel() == 0:
        raise ValueError(f"u must be (batch, L, I), each >= 1; got {tuple(u.shape)}")
    batch, length, channels = u.shape
    if dt.shape != u.shape:
        raise ValueError(f"dt must have u's shape {tuple(u.shape)}, got {tuple(dt.shape)}")
    if B.ndim != 4 or B.shape[:2] != u.shape[:2] or B.numel() == 0 or channels % B.shape[2]:
        raise ValueError(f"B must be ({batch}, {length}, G, N) with G a divisor of {channels}, got {tuple(B.shape)}")
    if A.shape not in ((channels, B.shape[3]), (channels, 1)):
        raise ValueError(f"A must be ({channels}, {B.shape[3]}) or ({channels}, 1), got {tuple(A.shape)}")
    if weights is not None and weights.shape != u.shape[:2]:
        raise ValueError(f"weights must be {tuple(u.shape[:2])}, got {tuple(weights.shape)}")
    given = [tensor for tensor in (u, dt, A, B, weights) if tensor is not None]
    if len(devices := {tensor.device for tensor in given}) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    backend = choose_backend("state_gramian", backend, u.device.type)
    return _gramian(*(None if t is None else t.detach() for t in (u, dt, A, B, weights)), backend)


@torch.library.custom_op("hf_compressm::state_gramian", mutates_args=())
def _gramian(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    if backend == "naive":
        return naive_state_gramian(u, dt, A, B, weights)
    if backend == "triton":
        from .triton import state_gramian as on_gpu

        return on_gpu(u, dt, A, B, weights)
    from .cpu import state_gramian as on_cpu

    return on_cpu(u, dt, A, B, weights)


@_gramian.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    return u.new_empty(B.shape[2], B.shape[3], B.shape[3], dtype=torch.float64)
