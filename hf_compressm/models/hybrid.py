"""What models share that may mix linear attention, with a state size for each layer, and softmax attention.

Shapes: batch B, length L, hidden size D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..compatibility import cache_keyword, one_cache
from .causal_lm import CausalLM
from .embeddings import check_one_input, embed_values
from .hybrid_config import FULL, LINEAR
from .known_by_name import KnownModel
from .pooling import padding_of_steps


class CountingCache(DynamicCache):
    """A cache for models without softmax attention that counts tokens, as `generate` needs to continue from it."""

    seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that the model has read."""
        return self.seen_tokens

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.seen_tokens = 0


class HybridModel(KnownModel):
    """Mixin of stacks of blocks. They read `input_ids`, `inputs_embeds`, or with `config.num_channels` `input_values`.

    Attributes:
        stock_forward: the forward of transformers' model, which takes a mask for each type of layer.
    """

    config: Any
    training: bool
    embed_tokens: Any
    stock_forward: Callable

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        input_values: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the features (B, L, D) of every position, as transformers' model does, with exact padding.

        Args:
            input_ids: (B, L) integers, or inputs_embeds (B, L, D).
            attention_mask: (B, L), zero at padding, or with a cache (B, seen + L). Padding, wherever it is, leaves no
                trace in other positions or the cache. Or a mask for each type of layer, as `generate` makes them.
            position_ids: (B, L) for softmax attention; by default real positions are counted from 0.
            past_key_values, cache: one of the two, by the names that versions of transformers use.
            use_cache: whether to return states to continue from; by default as the config says, and not in training.
            input_values: (B, L, num_channels) floats, if the config has `num_channels`.
            **kwargs: as in transformers.

        Raises:
            ValueError: if not exactly one input is given, or one that the config does not provide for, or a mask of
                another shape.
            TypeError: if two different caches are given.
        """
        cache = one_cache(self, cache=cache, past_key_values=past_key_values)
        if input_values is not None:
            if inputs_embeds is not None or self.config.num_channels is None:
                raise ValueError(
                    "input_values are for models with config.num_channels, in place of input_ids and inputs_embeds"
                )
            inputs_embeds = embed_values(self.embed_tokens, input_values)
        check_one_input(self, (input_ids is not None) + (inputs_embeds is not None))
        if inputs_embeds is None:
            inputs_embeds = self._embedded(input_ids)
        if not isinstance(attention_mask, dict):
            position_ids = self._positions(position_ids, attention_mask, inputs_embeds, cache)
            attention_mask = self._masks(attention_mask, inputs_embeds, cache, position_ids)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = (DynamicCache if FULL in self.config.layer_types else CountingCache)(config=self.config)
        output = self.stock_forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,  # the cache is there already; MiniMax would ask for one of its own class
            cache=cache,
            **kwargs,
        )
        if isinstance(cache, CountingCache):
            cache.seen_tokens += inputs_embeds.shape[1]
        return output

    def _embedded(self, input_ids: Tensor | None) -> Tensor:
        if self.config.num_channels is not None:
            raise ValueError(
                f"this model reads input_values (B, L, {self.config.num_channels}), since its config has num_channels; "
                "got input_ids"
            )
        return self.embed_tokens(input_ids)

    def _positions(self, given: Tensor | None, mask: Tensor | None, inputs: Tensor, cache: Any) -> Tensor:
        """Position of each token among the real ones, (B, L), if none are given."""
        if given is not None:
            return given
        seen = cache.get_seq_length() if cache is not None and FULL in self.config.layer_types else 0
        batch, length = inputs.shape[:2]
        if mask is not None and mask.ndim == 2 and mask.shape[1] == seen + length:
            return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        return (torch.arange(length, device=inputs.device) + seen).expand(batch, -1)

    def _masks(self, mask: Tensor | None, inputs: Tensor, cache: Any, position_ids: Tensor) -> dict[str, Any]:
        """The mask of each type of layer. That of transformers' linear attention leaves out that of a single token."""
        masks: dict[str, Any] = {LINEAR: padding_of_steps(mask, inputs)}
        if FULL in self.config.layer_types:
            positions = position_ids[0] if position_ids.ndim == 3 else position_ids
            sliding = getattr(self.config, "sliding_window", None) is not None
            create: Any = create_sliding_window_causal_mask if sliding else create_causal_mask
            named = {cache_keyword(create): cache, "position_ids": positions}
            masks[FULL] = create(config=self.config, inputs_embeds=inputs, attention_mask=mask, **named)
        return masks


class HybridCausalLM(CausalLM):
    """Mixin of such models that predict the next token."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embed_tokens.weight"}
    backbone: Any
    config: Any

    @property
    def model(self) -> Any:
        """The backbone, by the name that transformers' forward uses."""
        return self.backbone

    def _supports_default_dynamic_cache(self) -> bool:
        # `generate` asks its cache for a number of tokens, which one without attention does not know. So the first
        # forward makes one that counts.
        return FULL in self.config.layer_types
