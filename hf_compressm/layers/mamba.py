"""Mamba's mixer with its number of states read from its parameters, so that these can be replaced by smaller ones.

Shapes: batch B, length L, hidden size H, channels I, states N, rank R of the time step, kernel size K.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..moved import old_names
from ..ops.selective_scan import selective_scan, selective_state_update
from .mixer import CachedMixer, inverse_softplus_of_time_steps, scan_or_step
from .padding import RealFirst
from .plain import is_plain

NO_TIME = -1e4
"""A time step before its softplus that leaves the state as it is: exp underflows to zero in any dtype."""

__getattr__ = old_names(__name__)


def time_steps(projection: Any, step: Tensor) -> tuple[Tensor, Tensor | None]:
    """Project (B, L, R) to (B, L, I), and return the bias (I,) that the scan must add in float32, or None.

    A layer with hooks or an adapter is called and adds its bias itself, since these may change the bias too.
    """
    if not is_plain(projection, nn.Linear):
        return projection(step), None
    weight, bias = projection.weight, projection.bias
    return F.linear(step, weight), None if bias is None else bias.float()


class CompreSSMMambaMixer(CachedMixer):
    """Mamba's mixer: y = out_proj(scan(act(conv(x))) * silu(z)), with parameters named as in transformers.

    Args:
        config: has hidden_size H, intermediate_size I, state_sizes (N of each layer at first), time_step_rank R,
            conv_kernel K; use_bias and use_conv_bias, whether projections and the convolution have biases;
            time_step_min, time_step_max and time_step_floor, > 0, limits of the initial time steps; hidden_act, the
            name of the activation after the convolution.
        layer_idx: place of this layer in `state_sizes` and in a cache.
        act: the activation after the convolution, as a module. The gate's is always SiLU.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.
    """

    def __init__(self, config: Any, layer_idx: int, act: nn.Module):
        super().__init__()
        channels, size, rank = config.intermediate_size, config.state_sizes[layer_idx], int(config.time_step_rank)
        self.layer_idx = layer_idx
        self.activation, self.act = config.hidden_act, act
        self.time_step_limits = config.time_step_min, config.time_step_max, config.time_step_floor
        self.A_log = nn.Parameter(torch.empty(channels, size))
        self.D = nn.Parameter(torch.empty(channels))
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias)
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=config.use_bias)
        self.x_proj = nn.Linear(channels, rank + 2 * size, bias=False)
        self.dt_proj = nn.Linear(rank, channels, bias=True)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=config.use_bias)

    @property
    def state_size(self) -> int:
        """Present number of states N."""
        return self.A_log.shape[1]

    def initial_values(self, time_step_scale: float = 1.0, scheme: str = "random") -> dict[str, Tensor]:
        """New values of A_log, D, dt_proj.weight and dt_proj.bias, of their shapes, as Mamba is initialised."""
        channels, size = self.A_log.shape
        device = self.A_log.device
        rate = torch.arange(1, size + 1, dtype=torch.float32, device=device).log().expand(channels, -1).contiguous()
        spread = self.dt_proj.weight.shape[1] ** -0.5 * time_step_scale
        weight = torch.full_like(self.dt_proj.weight, spread, dtype=torch.float32)
        if scheme == "random":
            weight.uniform_(-spread, spread)
        return {
            "A_log": rate,
            "D": torch.ones(channels, device=device),
            "dt_proj.weight": weight,
            "dt_proj.bias": inverse_softplus_of_time_steps(channels, self.time_step_limits, device),
        }

    def mix(self, hidden_states: Tensor, cache: Any, state: Tensor | None, tokens: RealFirst | None) -> Tensor:
        """As in `CachedMixer`: (B, L, H) -> (B, L, H)."""
        u, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        u = self.convolve_tokens(u, cache, tokens)
        projected, size = self.x_proj(u), self.state_size
        step, B, C = projected.split([projected.shape[-1] - 2 * size, size, size], dim=-1)
        delta, bias = time_steps(self.dt_proj, step)
        delta = delta if tokens is None else tokens.clear(delta, NO_TIME)
        A = -self.A_log.float().exp()
        options: dict[str, Any] = {"D": self.D.float(), "delta_bias": bias, "delta_softplus": True}
        scan, one = partial(selective_scan, z=gate), partial(selective_state_update, z=gate[:, 0])
        y = scan_or_step(self, cache, state, scan, one, (u, delta, A, B, C), **options)
        return self.out_proj(y.to(hidden_states.dtype))
