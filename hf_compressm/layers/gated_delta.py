"""The mixer of Gated DeltaNet with optional write and erase matrices, which make the state of each value head smaller.

Shapes: batch B, length L, hidden size D, G key heads of size K, H value heads of size V, H a multiple of G, r <= K rows
of each state, taps of the convolution T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.gated_delta_scan import gated_delta_scan, gated_delta_step
from .mixer import CachedMixer, inverse_softplus_of_time_steps, is_step
from .padding import RealFirst

EPS = 1e-6
"""Added to the squared length of a key or query before it is divided by its length, as transformers does."""
DECAY_RATES = (0.01, 16.0)
"""Range of the decay rates exp(A_log) of a new mixer."""


class GatedHeadRMSNorm(nn.Module):
    """RMS norm of each value head, times a learned weight and silu(gate); its parameter is named as in transformers.

    Args:
        size: V. eps: added to the mean square, > 0.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """(..., V) -> (..., V), in x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        value = x.to(wide)
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * value.to(x.dtype) * F.silu(gate.to(wide))).to(x.dtype)


class CompreSSMGatedDeltaMixer(CachedMixer):
    """The mixer of Gated DeltaNet, with parameters named as in transformers' Qwen3.5.

    Where `read_in` and `read_out`, each (G, r, K), are present, tokens are written with the keys read_in k, and erase
    with the keys read_out k; queries are read_out q. So the states have r rows. Where they are None (r = K) the mixer
    is that of Qwen3.5.

    Args:
        config: has hidden_size D, linear_num_key_heads G, linear_key_head_dim K, linear_num_value_heads H,
            linear_value_head_dim V, linear_conv_kernel_dim T, state_sizes (r of each linear-attention layer at the
            beginning), layer_types; rms_norm_eps > 0; hidden_act, the name of the activation after the convolution;
            time_step_min, time_step_max and time_step_floor, > 0, limits of the initial time steps.
        layer_idx: place of this layer in `layer_types` and in a cache.
        act: the activation after the convolution, as a module. The gate's is always SiLU.

    Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, section 3; read-in and read-out are this package's.
    """

    def __init__(self, config: Any, layer_idx: int, act: nn.Module):
        super().__init__()
        self.num_k_heads, self.num_v_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        hidden, heads, taps = config.hidden_size, self.num_v_heads, config.linear_conv_kernel_dim
        values = heads * self.head_v_dim
        channels = 2 * self.num_k_heads * self.head_k_dim + values
        size = config.state_sizes[config.layer_types[:layer_idx].count("linear_attention")]
        self.read_in: nn.Parameter | None
        self.read_out: nn.Parameter | None
        self.activation, self.act, self.layer_idx = config.hidden_act, act, layer_idx
        self.time_step_limits = config.time_step_min, config.time_step_max, config.time_step_floor
        for name in ("read_in", "read_out"):
            rows = torch.empty(self.num_k_heads, size, self.head_k_dim)
            self.register_parameter(name, None if size == self.head_k_dim else nn.Parameter(rows))
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=False, padding=taps - 1)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.norm = GatedHeadRMSNorm(self.head_v_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(values, hidden, bias=False)
        self.in_proj_qkv = nn.Linear(hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(hidden, values, bias=False)
        self.in_proj_b = nn.Linear(hidden, heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, heads, bias=False)

    @property
    def state_size(self) -> int:
        """Present number of rows r of each state."""
        return self.head_k_dim if self.read_in is None else self.read_in.shape[1]

    def initial_values(self) -> dict[str, Tensor]:
        """New values of A_log, dt_bias and, where present, read_in and read_out, which take the first r key channels.

        They have the shapes of the parameters.
        """
        heads, device = len(self.A_log), self.A_log.device
        rates = torch.empty(heads, dtype=torch.float32, device=device).uniform_(*DECAY_RATES)
        values = {"A_log": rates.log(), "dt_bias": inverse_softplus_of_time_steps(heads, self.time_step_limits, device)}
        if self.read_in is not None:
            rows = torch.eye(*self.read_in.shape[1:], device=device).expand_as(self.read_in)
            values |= {"read_in": rows, "read_out": rows}
        return values

    def mix(self, hidden_states: Tensor, cache: Any, state: Tensor | None, tokens: RealFirst | None) -> Tensor:
        """As in `CachedMixer`: (B, L, D) -> (B, L, D)."""
        inputs = self.recurrence_inputs(hidden_states, cache, tokens)
        o = self._recur(inputs, cache, state)
        gate = self.in_proj_z(hidden_states).unflatten(-1, (self.num_v_heads, -1))
        return self.out_proj(self.norm(o, gate).flatten(-2))

    def recurrence_inputs(
        self, hidden_states: Tensor, cache: Any = None, tokens: RealFirst | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Compute the input of the gated delta rule, at full key size, from hidden states (B, L, D).

        The arguments are those of `mix`.

        Returns:
            Queries and keys (B, L, G, K) of length 1, values (B, L, H, V), log decays <= 0 and write strengths in
            (0, 1), both (B, L, H) and zero at padding.
        """
        channels = self.convolve_tokens(self.in_proj_qkv(hidden_states), cache, tokens)
        keys, values = self.num_k_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        q, k, v = channels.split([keys, keys, values], dim=-1)
        q, k = (unit_vectors(part.unflatten(-1, (self.num_k_heads, -1))) for part in (q, k))
        g, beta = log_decay(self, self.in_proj_a(hidden_states)), self.in_proj_b(hidden_states).sigmoid()
        if tokens is not None:
            g, beta = tokens.clear(g), tokens.clear(beta)
        return q, k, v.unflatten(-1, (self.num_v_heads, -1)), g, beta

    def to_state_basis(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Map queries and keys (B, L, G, K) to queries, write keys and erase keys (B, L, G, r).

        Erase keys are None where they are the write keys.
        """
        if self.read_in is None or self.read_out is None:
            return q, k, None
        return in_basis(q, self.read_out), in_basis(k, self.read_in), in_basis(k, self.read_out)

    def _recur(self, inputs: tuple[Tensor, ...], cache: Any, state: Tensor | None) -> Tensor:
        """Run the gated delta rule, and update the cache: (B, L, H, V)."""
        q, k, v, g, beta = inputs
        q, k, erase = self.to_state_basis(q, k)
        scale = self.head_k_dim**-0.5  # that of the full size, whatever was cut
        if state is not None and is_step(self, q):
            q, k, v, g, beta = (part[:, 0] for part in (q, k, v, g, beta))
            erase = None if erase is None else erase[:, 0]
            return gated_delta_step(q, k, v, g, beta, state, erase=erase, scale=scale)[:, None]
        o, final = gated_delta_scan(q, k, v, g, beta, erase=erase, scale=scale, initial_state=state)
        if cache is not None:
            cache.update_recurrent_state(final, self.layer_idx)
        return o


def unit_vectors(x: Tensor) -> Tensor:
    """Divide keys or queries (..., K) by their length, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def log_decay(mixer: Any, steps: Tensor) -> Tensor:
    """Log decay of each value head, <= 0, in float32 or wider, from the raw time steps: (B, L, H) -> (B, L, H).

    Args:
        mixer: has A_log and dt_bias, each (H,).
        steps: (B, L, H).
    """
    wide = torch.promote_types(mixer.A_log.dtype, torch.float32)
    return -mixer.A_log.to(wide).exp() * F.softplus(steps.to(wide) + mixer.dt_bias.to(wide))


def in_basis(x: Tensor, matrix: Tensor) -> Tensor:
    """Map keys or queries by the matrix of each key head: (B, L, G, K) and (G, r, K) -> (B, L, G, r)."""
    # einsum does the same, with calls that cost as much as the product where there is one token.
    rows = x.flatten(0, 1).transpose(0, 1)
    return torch.bmm(rows, matrix.to(x.dtype).mT).transpose(0, 1).unflatten(0, x.shape[:2])
