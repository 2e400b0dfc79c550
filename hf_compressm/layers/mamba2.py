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

from ..compatibility import check_keywords, one_cache
from ..ops.ssd_scan import ssd_scan, ssd_state_update
from ..ops.ssd_scan.naive import time_steps
from .mamba import convolve, inverse_softplus_of_time_steps, recurrent_state, scan_or_step
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


class CompreSSMMamba2Mixer(nn.Module):
    """Mamba-2's mixer, with parameters named as in transformers.

    Where `read_in` and `read_out`, each (G, r, N), are present, the scan runs with B' = read_in B and C' = read_out C,
    so with r states. Where they are None (r = N) the mixer is that of Mamba-2.

    Args:
        hidden_size: H. num_heads, head_dim: heads and P, I their product. n_groups: G. conv_states: N.
        state_size: r <= N at the beginning; the first r states, if fewer.
        conv_kernel: K. chunk_size: steps of the scan that are treated at once. layer_idx: place in a cache.
        use_bias, use_conv_bias: whether projections and the convolution have biases.
        eps: of the norm. time_step_limit: bounds of the time step.
        time_step_limits: smallest and largest initial time step, and a floor, > 0.
        activation, act: name and module of the activation behind the convolution; the gate's is always SiLU.

    Source: Dao and Gu 2024, arXiv 2405.21060; read-in and read-out are this package's.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        n_groups: int,
        conv_states: int,
        state_size: int,
        conv_kernel: int = 4,
        chunk_size: int = 64,
        layer_idx: int = 0,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        eps: float = 1e-5,
        time_step_limit: tuple[float, float] = (0.0, float("inf")),
        time_step_limits: tuple[float, float, float] = (0.001, 0.1, 1e-4),
        activation: str = "silu",
        act: nn.Module | None = None,
    ):
        super().__init__()
        channels = num_heads * head_dim
        convolved = channels + 2 * n_groups * conv_states
        self.read_in: nn.Parameter | None
        self.read_out: nn.Parameter | None
        self.activation, self.act = activation, act or nn.SiLU()
        self.n_groups, self.chunk_size, self.layer_idx = n_groups, chunk_size, layer_idx
        self.time_step_limit, self.time_step_limits = (time_step_limit[0], time_step_limit[1]), time_step_limits
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(num_heads))
        for name in ("read_in", "read_out"):
            rows = torch.empty(n_groups, state_size, conv_states)
            self.register_parameter(name, None if state_size == conv_states else nn.Parameter(rows))
        self.conv1d = nn.Conv1d(convolved, convolved, conv_kernel, groups=convolved, bias=use_conv_bias)
        self.in_proj = nn.Linear(hidden_size, channels + convolved + num_heads, bias=use_bias)
        self.norm = GatedRMSNorm(channels, n_groups, eps)
        self.out_proj = nn.Linear(channels, hidden_size, bias=use_bias)

    @property
    def conv_states(self) -> int:
        """Number of states N that B and C have behind the convolution."""
        return (self.conv1d.weight.shape[0] - self.norm.weight.shape[0]) // (2 * self.n_groups)

    @property
    def state_size(self) -> int:
        """Present number of states r of the scan."""
        return self.conv_states if self.read_in is None else self.read_in.shape[1]

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values of A_log, D, dt_bias and, where present, read_in and read_out: the first r states."""
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

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        cache_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, L, H) -> (B, L, H); a cache is gone on from and updated.

        Padding, wherever it is, leaves no trace: outputs of real tokens and the cache are as without it.

        Args:
            attention_mask: (B, L), zero at padding; of a longer one the last L columns count.
            cache, cache_params: one of the two, by the names that versions of transformers use.
            **kwargs: what models hand to all their layers, without meaning here.

        Raises:
            TypeError: for other keywords, or two caches. ValueError: for packed sequences.
        """
        check_keywords(self, kwargs)
        cache = one_cache(self, cache=cache, cache_params=cache_params)
        state = recurrent_state(cache, self.layer_idx)
        channels, heads = self.norm.weight.shape[0], len(self.A_log)
        tokens = RealFirst.of(attention_mask, hidden_states)
        projected = self.in_proj(hidden_states if tokens is None else tokens.bring(hidden_states))
        gate, signal, dt = projected.split([channels, len(self.conv1d.weight), heads], dim=-1)
        signal = convolve(self, signal if tokens is None else tokens.clear(signal), cache, tokens)
        signal = signal if tokens is None else tokens.clear(signal)
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
            dt = tokens.clear(time_steps(wide, self.dt_bias, True, self.time_step_limit))  # none at all at padding
            options = {"D": self.D.float(), "dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))}
        A = -self.A_log.float().exp()
        scan = partial(ssd_scan, chunk_size=self.chunk_size)
        y = scan_or_step(self, cache, state, scan, ssd_state_update, (x, dt, A, B, C), **options)
        y = self.out_proj(self.norm(y.flatten(2), gate).to(hidden_states.dtype))
        return y if tokens is None else tokens.take_back(y)

    def extra_repr(self) -> str:
        return f"state_size={self.state_size}"


def _basis(signal: Tensor, matrix: Tensor) -> Tensor:
    """(B, L, G, N) and (G, r, N) -> (B, L, G, r)."""
    return torch.einsum("blgn,grn->blgr", signal, matrix.to(signal.dtype))
