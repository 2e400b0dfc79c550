"""What the mixers of Mamba and Mamba-2 share: padding, caches, the convolution in front of the scan.

Shapes: batch B, length L, hidden size H, channels I, kernel size K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compatibility import check_keywords, one_cache
from ..ops.causal_conv import causal_conv, causal_conv_step
from .padding import RealFirst
from .plain import innermost, is_plain

SILU = ("silu", "swish")
"""Names of the activation that the op `causal_conv` has built in."""


class CachedMixer(nn.Module):
    """A mixer that continues from a cache and ignores padding. Subclasses define `mix` and `state_size`."""

    layer_idx: int

    @property
    def state_size(self) -> int:
        """Present number of states of the scan."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        cache_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mix a sequence, continuing from a cache if there is one, and update the cache.

        Padding may be anywhere: outputs of real tokens and the cache are the same as without it.

        Args:
            hidden_states: (B, L, H).
            cache, cache_params: the cache, of transformers, under one of the two names that its versions use; or None.
            attention_mask: (B, L), zero at padding; of a longer one the last L columns count.
            **kwargs: keywords that models pass to all their layers and that mean nothing here.

        Returns:
            (B, L, H).

        Raises:
            TypeError: for other keywords, or two caches.
            ValueError: for keywords of packed sequences.
        """
        check_keywords(self, kwargs)
        cache = one_cache(self, cache=cache, cache_params=cache_params)
        state = recurrent_state(cache, self.layer_idx)
        tokens = RealFirst.of(attention_mask, hidden_states)
        y = self.mix(hidden_states if tokens is None else tokens.bring(hidden_states), cache, state, tokens)
        return y if tokens is None else tokens.take_back(y)

    def mix(self, hidden_states: Tensor, cache: Any, state: Tensor | None, tokens: RealFirst | None) -> Tensor:
        """Mix a sequence, (B, L, H) -> (B, L, H), and update the cache.

        Args:
            hidden_states: (B, L, H), the real tokens of each sequence first and zeros behind them.
            cache: of transformers, or None.
            state: the cached state of this layer, or None before the first token.
            tokens: which tokens are real; None if all are.
        """
        raise NotImplementedError

    def convolve_tokens(self, channels: Tensor, cache: Any, tokens: RealFirst | None) -> Tensor:
        """Apply the convolution, with zeros at padding before and after it: (B, L, I) -> (B, L, I)."""
        if tokens is None:
            return convolve(self, channels, cache)
        return tokens.clear(convolve(self, tokens.clear(channels), cache, tokens))

    def extra_repr(self) -> str:
        """The present number of states, for `repr`."""
        return f"state_size={self.state_size}"


def mask_padding(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hidden states (B, L, I) with zeros at padding. A mask may be longer than L: its last L columns count."""
    if attention_mask is None:
        return hidden_states
    return hidden_states * attention_mask[:, -hidden_states.shape[1] :, None].to(hidden_states.dtype)


def convolve(mixer: Any, channels: Tensor, cache: Any = None, tokens: RealFirst | None = None) -> Tensor:
    """Apply a mixer's depthwise causal convolution and its activation, continuing from a cache if there is one.

    The number of channels is that of the weight; the module's attributes are not read.

    Args:
        mixer: has `conv1d`, `layer_idx`, and the activation as a name, `activation`, and as a module, `act`.
        channels: (B, L, I).
        cache: of transformers, or None. It is updated.
        tokens: which tokens are real, if padding is behind them; the cache then holds inputs of real tokens only.

    Returns:
        (B, L, I), in the dtype of `channels`.
    """
    length, convolution = channels.shape[1], mixer.conv1d
    signal = join_cached_inputs(channels, convolution, cache, mixer.layer_idx, tokens)
    if mixer.activation not in SILU or not is_plain(convolution, nn.Conv1d):
        return mixer.act(call_convolution(signal, convolution))[:, -length:]
    weight = convolution.weight.squeeze(1)
    if length == 1 and signal.shape[1] >= weight.shape[1]:
        return causal_conv_step(signal[:, -weight.shape[1] :].transpose(1, 2), weight, convolution.bias)[:, None]
    return causal_conv(signal, weight, convolution.bias)[:, -length:]


def call_convolution(signal: Tensor, convolution: nn.Module) -> Tensor:
    """Call the convolution of (B, L, I), with hooks and adapters on it; result in the dtype of the signal."""
    inner = innermost(convolution)
    missing = inner.kernel_size[0] - 1 - inner.padding[0]
    padded = F.pad(signal.transpose(1, 2), (missing, 0)).to(inner.weight.dtype)
    return convolution(padded)[..., : signal.shape[1]].transpose(1, 2).to(signal.dtype)


def join_cached_inputs(
    channels: Tensor, convolution: nn.Conv1d, cache: Any, layer_idx: int, tokens: RealFirst | None = None
) -> Tensor:
    """Put the cached inputs of earlier steps before the convolution's input (B, L, I), and update the cache.

    Returns:
        (B, L', I) with L' >= L; the input itself without a cache.

    Raises:
        ValueError: if the cached inputs have another number of channels.
    """
    if cache is None:
        return channels
    if cache.has_previous_state(layer_idx):
        cached = cache.layers[layer_idx].conv_states[0].shape[1]
        if cached != channels.shape[2]:
            raise ValueError(
                f"the cached inputs of layer {layer_idx} have {cached} channels, and the layer has "
                f"{channels.shape[2]}. A cache from before a cut does not fit the model after it; begin with a new one."
            )
    taps = convolution.weight.shape[-1]
    signal = cache.update_conv_state(channels.transpose(1, 2), layer_idx, conv_kernel_size=taps)
    if tokens is not None:
        ends = tokens.counts + signal.shape[-1] - channels.shape[1]
        places = (ends[:, None] + torch.arange(taps, device=ends.device))[:, None].expand(-1, signal.shape[1], -1)
        cache.layers[layer_idx].conv_states[0].copy_(F.pad(signal, (taps, 0)).gather(-1, places))
    return signal.transpose(1, 2)


def recurrent_state(cache: Any, layer_idx: int) -> Tensor | None:
    """The cached state of a layer, (B, I, N) or (B, heads, P, N), or None before the first token."""
    if cache is None or not cache.has_previous_state(layer_idx):
        return None
    return cache.layers[layer_idx].recurrent_states[0]


def is_step(mixer: nn.Module, signal: Tensor) -> bool:
    """Whether a signal (B, L, I) may update a state in place: it is one token, and nothing needs a gradient."""
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


def inverse_softplus_of_time_steps(count: int, limits: tuple[float, float, float], device: Any = None) -> Tensor:
    """Draw biases, float32 of shape (count,), whose softplus is log-uniform in (limits[0], limits[1]), >= limits[2]."""
    low, high, floor = limits
    draw = torch.rand(count, device=device, dtype=torch.float32)
    step = (draw * (math.log(high) - math.log(low)) + math.log(low)).exp().clamp(min=floor)
    return step + (-torch.expm1(-step)).log()
