"""The causal convolution on the CPU, by Numba: threads over chunks of time steps, vectors over channels.

Sums over time are formed per chunk and added in a fixed order, so results do not depend on the number of threads. The
last vector of channels overlaps the one before it, so that no vector is incomplete.

Shapes: batch B, length L, C channels, K taps; the kernels take weights as (TAPS, C).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from ..lanes import LANES, bytes_of, load, sigmoid, store
from ..threads import run_units
from .op import Gradients, Inputs

FAST = {"reassoc", "contract", "arcp", "nsz"}
TAPS = 4
"""Most taps that the kernels take."""
CHUNK = 64


@njit(inline="always")
def _rows(x, t, row, zeros):
    """Addresses of the last four rows of x up to step t; those before the first step are zero."""
    x0 = x + (t - 3) * row if t >= 3 else zeros
    x1 = x + (t - 2) * row if t >= 2 else zeros
    x2 = x + (t - 1) * row if t >= 1 else zeros
    return x0, x1, x2, x + t * row


@njit(nogil=True, fastmath=FAST, cache=True)
def causal_conv_fwd_kernel(begin, end, x, x_batch, x_row, weight, bias, zeros, y, length, channels, like):
    """y (B, L, C) of units `begin` to `end`: chunks of a sequence. Tensors are addresses, strides are in bytes."""
    vector, row = LANES * bytes_of(like), channels * bytes_of(like)
    blocks, chunks = (channels + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    for unit in range(begin, end):
        b, start = unit // chunks, unit % chunks * CHUNK
        for t in range(start, min(start + CHUNK, length)):
            x0, x1, x2, x3 = _rows(x + b * x_batch, t, x_row, zeros)
            out = y + (b * length + t) * row
            for block in range(blocks):
                at = min(block * vector, row - vector)
                w = weight + at
                z = load(bias + at, like) + load(w, like) * load(x0 + at, like)
                z = z + load(w + row, like) * load(x1 + at, like)
                z = z + load(w + 2 * row, like) * load(x2 + at, like)
                z = z + load(w + 3 * row, like) * load(x3 + at, like)
                store(out + at, z * sigmoid(z))


@njit(nogil=True, fastmath=FAST, cache=True)
def causal_conv_bwd_kernel(begin, end, x, x_batch, x_row, weight, bias, zeros, grad, dx, sums, length, channels, like):
    """dx (B, L, C), and each unit's sums (TAPS + 1, C) for the gradients of weight and bias; arguments as above."""
    vector, row = LANES * bytes_of(like), channels * bytes_of(like)
    blocks, chunks = (channels + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    for unit in range(begin, end):
        b, start = unit // chunks, unit % chunks * CHUNK
        stop = min(start + CHUNK, length)
        # Slopes are needed up to three steps beyond the chunk, where they are zero after the last step.
        scratch = np.zeros(9 * blocks * vector + 64, np.uint8)
        ring = (scratch.ctypes.data + 63) // 64 * 64
        totals = ring + 4 * blocks * vector
        for t in range(start, stop + 3):
            within, own = t < length, t < stop
            x0, x1, x2, x3 = _rows(x + b * x_batch, t if within else 0, x_row, zeros)
            grad_at = grad + (b * length + (t if within else 0)) * row
            s0, s1 = ring + (t - 3) % 4 * row, ring + (t - 2) % 4 * row
            s2, s3 = ring + (t - 1) % 4 * row, ring + t % 4 * row
            for block in range(blocks):
                at = min(block * vector, row - vector)
                w0, w1 = load(weight + at, like), load(weight + row + at, like)
                w2, w3 = load(weight + 2 * row + at, like), load(weight + 3 * row + at, like)
                slope = w0 * 0.0
                if within:
                    v0, v1 = load(x0 + at, like), load(x1 + at, like)
                    v2, v3 = load(x2 + at, like), load(x3 + at, like)
                    z = load(bias + at, like) + w0 * v0 + w1 * v1 + w2 * v2 + w3 * v3
                    s = sigmoid(z)
                    slope = load(grad_at + at, like) * (s + z * (s - s * s))
                    if own:
                        total = totals + 5 * block * vector
                        store(total, load(total, like) + slope * v0)
                        store(total + vector, load(total + vector, like) + slope * v1)
                        store(total + 2 * vector, load(total + 2 * vector, like) + slope * v2)
                        store(total + 3 * vector, load(total + 3 * vector, like) + slope * v3)
                        store(total + 4 * vector, load(total + 4 * vector, like) + slope)
                store(s3 + at, slope)
                if t >= start + 3:
                    value = w3 * load(s0 + at, like) + w2 * load(s1 + at, like) + w1 * load(s2 + at, like) + w0 * slope
                    store(dx + (b * length + t - 3) * row + at, value)
        for block in range(blocks):
            at = min(block * vector, row - vector)
            for k in range(5):
                value = load(totals + (5 * block + k) * vector, like)
                store(sums + (unit * 5 + k) * row + at, value)
        scratch[0] = 0  # It must live until here.


def forward(inputs: Inputs) -> Tensor:
    """y (B, L, C), from tensors of one dtype with C >= LANES channels and K <= TAPS taps."""
    y = torch.empty(inputs.x.shape, dtype=inputs.x.dtype)
    _run(causal_conv_fwd_kernel, inputs, y)
    return y


def backward(gradients: Gradients, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, L, C), weight (C, K) and bias (C,), from tensors of one dtype."""
    x, weight, _ = inputs
    batch, length, channels = x.shape
    dx, sums = torch.empty(x.shape, dtype=x.dtype), x.new_empty(batch * -(-length // CHUNK), TAPS + 1, channels)
    _run(causal_conv_bwd_kernel, inputs, gradients.dy.contiguous(), dx, sums)
    total = sums.sum(0)
    return dx, total[TAPS - weight.shape[1] : TAPS].t(), total[TAPS].clone()


def _run(kernel: Any, inputs: Inputs, *others: Tensor) -> None:
    x, weight, bias = inputs
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    # With fewer than TAPS taps, the first ones are zero.
    weight = F.pad(weight.t(), (0, 0, TAPS - weight.shape[1], 0)).contiguous()
    zeros = torch.zeros_like(weight[0])
    bias = zeros if bias is None else bias.contiguous()
    strides = (x.stride(0) * x.element_size(), x.stride(1) * x.element_size())
    pointers = (tensor.data_ptr() for tensor in (weight, bias, zeros, *others))
    like = np.float32(0) if x.dtype == torch.float32 else np.float64(0)
    units = len(x) * -(-x.shape[1] // CHUNK)
    run_units(kernel, units, x.data_ptr(), *strides, *pointers, *x.shape[1:], like)
