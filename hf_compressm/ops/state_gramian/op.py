"""The state Gramian: checks, custom op and the choice of the backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose_backend, kernels
from ..checks import check_devices
from ..custom_ops import custom_op
from .naive import naive_state_gramian


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
        u: (batch, L, I), any float dtype: the input of the channels.
        dt: (batch, L, I), >= 0: step sizes, after softplus.
        A: (I, N), or (I, 1) where all states of a channel decay alike; usually negative.
        B: (batch, L, G, N), with I divisible by G.
        weights: (batch, L), any dtype, >= 0: weights of h_t h_t^T; 1 if None. Time steps of weight 0 cost little:
            their states are computed but not multiplied.
        backend: "naive", "cpu" (Numba) or "triton"; chosen by device if None. The environment variable
            HF_COMPRESSM_STATE_GRAMIAN sets one too.

    Returns:
        float64 (G, N, N), positive semidefinite; summed in float32 over short stretches of time and in float64 over
        the stretches.

    Raises:
        ValueError: if a shape or device does not fit, or the backend is unknown or cannot run here.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3, for the states; Antoulas 2005, Approximation of Large-Scale
    Dynamical Systems, chapter 4, for the Gramian.
    """
    _check(u, dt, A, B, weights)
    backend = choose_backend("state_gramian", backend, u.device.type)
    return _gramian(*(None if tensor is None else tensor.detach() for tensor in (u, dt, A, B, weights)), backend)


def _check(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, weights: Tensor | None) -> None:
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
    check_devices(u=u, dt=dt, A=A, B=B, weights=weights)


class Inputs(NamedTuple):
    """Arguments of the custom op, as in `state_gramian`."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    weights: Tensor | None
    backend: str


def _fake(inputs: Inputs) -> Tensor:
    _, _, groups, size = inputs.B.shape
    return inputs.u.new_empty(groups, size, size, dtype=torch.float64)


@custom_op("state_gramian", Inputs, returns=1, fake=_fake)
def _gramian(inputs: Inputs) -> Tensor:
    if inputs.backend == "naive":
        return naive_state_gramian(*inputs[:5])
    return kernels(__package__, inputs.backend).forward(inputs)
