"""Language models as functions without a cache: tokens and states go in, logits and states come out.

Shapes: B batch, L length, V vocabulary, N states of a layer, I channels of a convolution, K its taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..compatibility import cache_keyword
from ..models import MimoSSMCache

PAIRS = ("mimo_ssm",)
"""Model types whose state is complex; outside of the model it is pairs of real and imaginary part."""
FAMILIES = ("compressm_mamba", "compressm_mamba2", "mimo_ssm", "mamba", "mamba2")
"""Model types whose cache holds nothing but states of a fixed size."""


class Recurrence(nn.Module):
    """A causal language model with its states as inputs and outputs, to be exported.

    The states of a layer are the last K inputs of its convolution, (B, I, K), and those of its scan: (B, I, N) in
    Mamba, (B, heads, P, N) in Mamba-2. A MimoSSM has only the latter, (B, N, 2): real and imaginary parts. All zeros
    are the start of a text.

    Args:
        model: a causal language model of a type in `FAMILIES`, in eval mode.
        all_logits: whether logits of all tokens come out, or only those of the last.
    """

    def __init__(self, model: Any, all_logits: bool = False):
        super().__init__()
        self.model = model
        self.kept = 0 if all_logits else 1
        self.keyword = cache_keyword(type(model).forward)

    def forward(self, input_ids: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        """Read tokens from given states.

        Args:
            input_ids: (B, L) integers, none of them padding.
            states: of all layers, see `state_names`.

        Returns:
            Logits (B, L, V), or (B, 1, V) of the last token, and the states after it.
        """
        cache = self._cache(states)
        options = {self.keyword: cache, "use_cache": True, "logits_to_keep": self.kept}
        logits = self.model(input_ids=input_ids, **options).logits
        return logits, *self._states(cache)

    def state_names(self) -> list[str]:
        """Names of the states, in their order: conv_0, state_0, conv_1 and so on, or for a MimoSSM state_0, ..."""
        kinds = ("state",) if self.model.config.model_type in PAIRS else ("conv", "state")
        return [f"{kind}_{layer}" for layer in range(self.model.config.num_hidden_layers) for kind in kinds]

    def input_names(self) -> list[str]:
        """Names of the inputs, in their order: input_ids, and those of the states."""
        return ["input_ids", *self.state_names()]

    @torch.no_grad()
    def first_states(self, batch: int) -> list[Tensor]:
        """Zeros of the shapes and dtypes of the states, for a batch of B = `batch` >= 1 texts."""
        device = next(self.model.parameters()).device
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        output = self.model(input_ids=token, use_cache=True)
        found = self._states(getattr(output, cache_keyword(type(output))))
        found = [torch.view_as_real(state) if state.is_complex() else state for state in found]
        return [state.new_zeros(batch, *state.shape[1:]) for state in found]

    def _cache(self, states: list[Tensor]) -> Any:
        if self.model.config.model_type in PAIRS:
            cache: Any = MimoSSMCache(len(states))
            cache.states, cache.seen_tokens = states, 1
            return cache
        cache = DynamicCache(config=self.model.config)
        for layer, conv, state in zip(cache.layers, states[::2], states[1::2], strict=True):
            # Copies, since a cache changes what it holds in place.
            layer.conv_states[0], layer.recurrent_states[0] = conv.clone(), state.clone()
            layer.conv_kernel_size[0], layer.dtype, layer.device = conv.shape[-1], conv.dtype, conv.device
            for flags in (
                layer.is_conv_states_initialized,
                layer.is_recurrent_states_initialized,
                layer.has_previous_state,
            ):
                flags[0] = True
        return cache

    def _states(self, cache: Any) -> list[Tensor]:
        if self.model.config.model_type in PAIRS:
            return cache.states
        return [states[0] for layer in cache.layers for states in (layer.conv_states, layer.recurrent_states)]


def recurrence_inputs(module: Recurrence, step: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Make example inputs of a `Recurrence`, and their dynamic shapes, for `torch.export.export`.

    Args:
        module: what is to be exported.
        step: whether L is fixed to one token; otherwise it may be any.

    Returns:
        The inputs of `Recurrence.forward`, and `dynamic_shapes` with the names batch and length.
    """
    from torch.export import Dim

    batch, length = Dim("batch", min=1), Dim("length", min=1)
    states = module.first_states(2)
    tokens = torch.zeros(2, 1 if step else 5, dtype=torch.long, device=states[0].device)
    return (tokens, states), ({0: batch} if step else {0: batch, 1: length}, [{0: batch} for _ in states])
