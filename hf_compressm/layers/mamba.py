"""Mamba's mixer with its number of states read from its parameters, so that these can be replaced by smaller ones.

Shapes: batch B, length L, hidden size H, channels I, states N, rank R of the time step, kernel size K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compatibility import check_keywords, one_cache
from ..ops.causal_conv import causal_conv, causal_conv_step
from ..ops.selective_scan import selective_scan, selective_state_update
from .padding import RealFirst
from .plain import innermost, is_plain

NO_TIME = -1e4
"""A time step before its softplus that leaves the state as it is: exp underflows to zero in any dtype."""
SILU = ("silu", "swish")
"""Names of the activation that the op `causal_conv` has built in."""


def real_positions(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hidden states (B, L, I), zero at padding. A mask may be longer than L: its last L columns count."""
    if attention_mask is None:
        return hidden_states
    return hidden_states * attention_mask[:, -hidden_states.shape[1] :, None].to(hidden_states.dtype)


def convolve(mixer: Any, channels: Tensor, cache: Any = None, tokens: RealFirst | None = None) -> Tensor:
    """Activation of a mixer's depthwise causal convolution that goes on from a cache, if there is one.

    The number of channels is that of the weight, whatever the modules' attributes say.

    Args:
        mixer: has `conv1d`, `layer_idx`, and the activation as a name, `activation`, and as a module, `act`.
        channels: (B, L, I).
        cache: of transformers, or None. It is updated.
        tokens: where padding is, behind the real tokens, so that the cache holds inputs of real tokens only.

    Returns:
        (B, L, I), in the dtype of `channels`.
    """
    length, convolution = channels.shape[1], mixer.conv1d
    signal = remembered(channels, convolution, cache, mixer.layer_idx, tokens)
    if mixer.activation not in SILU or not is_plain(convolution, nn.Conv1d):
        return mixer.act(called_convolution(signal, convolution))[:, -length:]
    weight = convolution.weight.squeeze(1)
    if length == 1 and signal.shape[1] >= weight.shape[1]:
        return causal_conv_step(signal[:, -weight.shape[1] :].transpose(1, 2), weight, convolution.bias)[:, None]
    return causal_conv(signal, weight, convolution.bias)[:, -length:]


def called_convolution(signal: Tensor, convolution: nn.Module) -> Tensor:
    """The module's causal convolution of (B, L, I), with whatever is around it; in the dtype of the signal."""
    inner = innermost(convolution)
    missing = inner.kernel_size[0] - 1 - inner.padding[0]
    padded = F.pad(signal.transpose(1, 2), (missing, 0)).to(inner.weight.dtype)
    return convolution(padded)[..., : signal.shape[1]].transpose(1, 2).to(signal.dtype)


def time_steps(projection: Any, step: Tensor) -> tuple[Tensor, Tensor | None]:
    """The projection (B, L, I) of (B, L, R), and the bias (I,) that the scan is to add in float32, if any is left.

    What is around a layer, such as an adapter, may act on its bias too: such a layer is called, and adds it itself.
    """
    if not is_plain(projection, nn.Linear):
        return projection(step), None
    weight, bias = projection.weight, projection.bias
    return F.linear(step, weight), None if bias is None else bias.float()


def remembered(
    channels: Tensor, convolution: nn.Conv1d, cache: Any, layer_idx: int, tokens: RealFirst | None = None
) -> Tensor:
    """The convolution's input (B, L, I) with what the cache holds of earlier steps before it; updates the cache."""
    if cache is None:
        return channels
    taps = convolution.weight.shape[-1]
    signal = cache.update_conv_state(channels.transpose(1, 2), layer_idx, conv_kernel_size=taps)
    if tokens is not None:
        ends = tokens.counts + signal.shape[-1] - channels.shape[1]
        places = (ends[:, None] + torch.arange(taps, device=ends.device))[:, None].expand(-1, signal.shape[1], -1)
        cache.layers[layer_idx].conv_states[0].copy_(F.pad(signal, (taps, 0)).gather(-1, places))
    return signal.transpose(1, 2)


def recurrent_state(cache: Any, layer_idx: int) -> Tensor | None:
    """The cached state of a layer, or None before the first token."""
    if cache is None or not cache.has_previous_state(layer_idx):
        return None
    return cache.layers[layer_idx].recurrent_states[0]


def is_step(mixer: nn.Module, signal: Tensor) -> bool:
    """Whether a state may be updated in place by a signal (B, L, I): one token, and nothing that gradients go to."""
    if signal.shape[1] > 1 or not torch.is_grad_enabled():
        return signal.shape[1] == 1
    return not (signal.requires_grad or any(parameter.requires_grad for parameter in mixer.parameters()))


def scan_or_step(
    mixer: Any,
    cache: Any,
    state: Tensor | None,
    scan: Callable,
    step: Callable,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    **options: Any,
) -> Tensor:
    """Scan a sequence from the cached state, or update that state in place by a single token; updates the cache.

    Args:
        mixer: has `layer_idx`, its place in the cache.
        cache: of transformers, or None.
        state: what `recurrent_state` returned before the convolution was called, which marks the cache as used.
        scan, step: an op and its update by one token, such as `ssd_scan` and `ssd_state_update`.
        inputs: input, time steps, A, B and C of the scan. All but A have the shape (B, L, ...).
        **options: for both ops.

    Returns:
        The scan's output, (B, L, ...) as the input.
    """
    x, dt, A, B, C = inputs
    if state is not None and is_step(mixer, x):
        return step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **options)[:, None]
    if cache is None:
        return scan(*inputs, **options)
    y, final = scan(*inputs, initial_state=state, return_final_state=True, **options)
    cache.update_recurrent_state(final, mixer.layer_idx)
    return y


class CompreSSMMambaMixer(nn.Module):
    """Mamba's mixer: y = out_proj(scan(act(conv(x))) * silu(z)), with parameters named as in transformers.

    Args:
        hidden_size: H. intermediate_size: I. state_size: N at the beginning. time_step_rank: R. conv_kernel: K.
        layer_idx: this layer's place in a cache.
        use_bias, use_conv_bias: whether projections and the convolution have biases.
        time_step_limits: smallest and largest initial time step, and a floor, > 0.
        activation, act: name and module of the activation behind the convolution; the gate's is always SiLU.

    Source: Gu and Dao 2023, arXiv 2312.00752.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        state_size: int,
        time_step_rank: int,
        conv_kernel: int = 4,
        layer_idx: int = 0,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        time_step_limits: tuple[float, float, float] = (0.001, 0.1, 1e-4),
        activation: str = "silu",
        act: nn.Module | None = None,
    ):
        super().__init__()
        self.layer_idx = layer_idx
        self.activation, self.act = activation, act or nn.SiLU()
        self.time_step_limits = time_step_limits
        self.A_log = nn.Parameter(torch.empty(intermediate_size, state_size))
        self.D = nn.Parameter(torch.empty(intermediate_size))
        self.conv1d = nn.Conv1d(
            intermediate_size, intermediate_size, conv_kernel, groups=intermediate_size, bias=use_conv_bias
        )
        self.in_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=use_bias)
        self.x_proj = nn.Linear(intermediate_size, time_step_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(time_step_rank, intermediate_size, bias=True)
        self.out_proj = nn.Linear(intermediate_size, hidden_size, bias=use_bias)

    @property
    def state_size(self) -> int:
        """Present number of states N."""
        return self.A_log.shape[1]

    def initial_values(self, time_step_scale: float = 1.0, scheme: str = "random") -> dict[str, Tensor]:
        """Fresh values of A_log, D, dt_proj.weight and dt_proj.bias, as Mamba is initialised."""
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
        tokens = RealFirst.of(attention_mask, hidden_states)
        u, gate = self.in_proj(hidden_states if tokens is None else tokens.bring(hidden_states)).chunk(2, dim=-1)
        u = convolve(self, u if tokens is None else tokens.clear(u), cache, tokens)
        u = u if tokens is None else tokens.clear(u)
        projected, size = self.x_proj(u), self.state_size
        step, B, C = projected.split([projected.shape[-1] - 2 * size, size, size], dim=-1)
        delta, bias = time_steps(self.dt_proj, step)
        delta = delta if tokens is None else tokens.clear(delta, NO_TIME)
        A = -self.A_log.float().exp()
        options: dict[str, Any] = {"D": self.D.float(), "delta_bias": bias, "delta_softplus": True}
        scan, one = partial(selective_scan, z=gate), partial(selective_state_update, z=gate[:, 0])
        y = scan_or_step(self, cache, state, scan, one, (u, delta, A, B, C), **options)
        y = self.out_proj(y.to(hidden_states.dtype))
        return y if tokens is None else tokens.take_back(y)

    def extra_repr(self) -> str:
        return f"state_size={self.state_size}"


def inverse_softplus_of_time_steps(count: int, limits: tuple[float, float, float], device: Any = None) -> Tensor:
    """Biases whose softplus is log-uniform between the first two limits, and at least the third. float32 (count,)."""
    low, high, floor = limits
    draw = torch.rand(count, device=device, dtype=torch.float32)
    step = (draw * (math.log(high) - math.log(low)) + math.log(low)).exp().clamp(min=floor)
    return step + (-torch.expm1(-step)).log()
