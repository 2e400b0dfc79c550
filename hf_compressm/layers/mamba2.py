"""Mamba-2's mixer with an optional read-in and read-out of fewer states for each group.

Shapes: batch B, length L, hidden size H, channels I in heads of P, groups G, N states that the convolution gives, r
states of the scan, kernel size K.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.ssd_scan import ssd_scan, ssd_state_update
from ..ops.ssd_scan.naive import time_steps
from .mixer import CachedMixer, inverse_softplus_of_time_steps, scan_or_step
from .padding import RealFirst


class GatedRMSNorm(nn.Module):
    """RMS norm of y * silu(gate) within each group of channels, times a learned weight; parameters as in transformers.

    Args:
        channels: I, divisible by groups. groups: G. eps: added to the mean square, > 0.
    """

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups = groups
        self.eps = eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """(B, L, I) -> (B, L, I), in y's dtype."""
        value = (y.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * value.flatten(-2).to(y.dtype)


class CompreSSMMamba2Mixer(CachedMixer):
    """Mamba-2's mixer, with parameters named as in transformers.

    Where `read_in` and `read_out`, each (G, r, N), are present, the scan runs with B' = read_in B and C' = read_out C,
    so with r states. Where they are None (r = N) the mixer is that of Mamba-2.

    Args:
        config: has hidden_size H, num_heads and head_dim P, whose product is I, n_groups G, state_size N, state_sizes
            (r <= N of each layer at the beginning), conv_kernel K; chunk_size, steps that the scan treats at once;
            use_bias and use_conv_bias, whether projections and the convolution have biases; layer_norm_epsilon > 0;
            time_step_limit, bounds of the time step; time_step_min, time_step_max and time_step_floor, > 0, limits of
            the initial time steps; hidden_act, the name of the activation after the convolution.
        layer_idx: place of this layer in `state_sizes` and in a cache.
        act: the activation after the convolution, as a module. The gate's is always SiLU.

    Source: Dao and Gu 2024, arXiv 2405.21060, section 7; read-in and read-out are this package's.
    """

    def __init__(self, config: Any, layer_idx: int, act: nn.Module):
        super().__init__()
        heads, size = config.num_heads, config.state_sizes[layer_idx]
        channels = heads * config.head_dim
        convolved = channels + 2 * config.n_groups * config.state_size
        self.read_in: nn.Parameter | None
        self.read_out: nn.Parameter | None
        self.activation, self.act = config.hidden_act, act
        self.n_groups, self.chunk_size, self.layer_idx = config.n_groups, config.chunk_size, layer_idx
        self.time_step_limit = config.time_step_limit[0], config.time_step_limit[1]
        self.time_step_limits = config.time_step_min, config.time_step_max, config.time_step_floor
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        for name in ("read_in", "read_out"):
            rows = torch.empty(config.n_groups, size, config.state_size)
            self.register_parameter(name, None if size == config.state_size else nn.Parameter(rows))
        self.conv1d = nn.Conv1d(convolved, convolved, config.conv_kernel, groups=convolved, bias=config.use_conv_bias)
        self.in_proj = nn.Linear(config.hidden_size, channels + convolved + heads, bias=config.use_bias)
        self.norm = GatedRMSNorm(channels, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=config.use_bias)

    @property
    def conv_states(self) -> int:
        """Number of states N that B and C have behind the convolution."""
        return (self.conv1d.weight.shape[0] - self.norm.weight.shape[0]) // (2 * self.n_groups)

    @property
    def state_size(self) -> int:
        """Present number of states r of the scan."""
        return self.conv_states if self.read_in is None else self.read_in.shape[1]

    def initial_values(self) -> dict[str, Tensor]:
        """New values of A_log, D, dt_bias and, where present, read_in and read_out, which take the first r states.

        They have the shapes of the parameters.
        """
        heads, device = len(self.A_log), self.A_log.device
        values = {
            "A_log": torch.arange(1, heads + 1, dtype=torch.float32, device=device).log(),
            "D": torch.ones(heads, device=device),
            "dt_bias": inverse_softplus_of_time_steps(heads, self.time_step_limits, device),
        }
        if self.read_in is not None:
            rows = torch.eye(*self.read_in.shape[1:], device=device).expand_as(self.read_in)
            values |= {"read_in": rows, "read_out": rows}
        return values

    def mix(self, hidden_states: Tensor, cache: Any, state: Tensor | None, tokens: RealFirst | None) -> Tensor:
        """As in `CachedMixer`: (B, L, H) -> (B, L, H)."""
        channels, heads = self.norm.weight.shape[0], len(self.A_log)
        projected = self.in_proj(hidden_states)
        gate, signal, dt = projected.split([channels, len(self.conv1d.weight), heads], dim=-1)
        signal = self.convolve_tokens(signal, cache, tokens)
        block = self.n_groups * self.conv_states
        x, B, C = signal.split([channels, block, block], dim=-1)
        x = x.unflatten(-1, (heads, -1))
        B, C = (part.unflatten(-1, (self.n_groups, -1)) for part in (B, C))
        if self.read_in is not None and self.read_out is not None:
            B, C = _basis(B, self.read_in), _basis(C, self.read_out)
        options: dict[str, Any] = {
            "D": self.D.float(),
            "dt_bias": self.dt_bias.float(),
            "dt_softplus": True,
            "dt_limit": self.time_step_limit,
        }
        if tokens is not None:
            wide = dt.to(torch.promote_types(dt.dtype, torch.float32))
            dt = tokens.clear(time_steps(wide, self.dt_bias, True, self.time_step_limit))  # zero at padding
            options = {"D": self.D.float(), "dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))}
        A = -self.A_log.float().exp()
        scan = partial(ssd_scan, chunk_size=self.chunk_size)
        y = scan_or_step(self, cache, state, scan, ssd_state_update, (x, dt, A, B, C), **options)
        return self.out_proj(self.norm(y.flatten(2), gate).to(hidden_states.dtype))


def _basis(signal: Tensor, matrix: Tensor) -> Tensor:
    """(B, L, G, N) and (G, r, N) -> (B, L, G, r)."""
    return torch.einsum("blgn,grn->blgr", signal, matrix.to(signal.dtype))
