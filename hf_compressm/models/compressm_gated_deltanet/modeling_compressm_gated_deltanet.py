"""Gated DeltaNet models with a state size for each layer; the rest is transformers' Qwen3.5.

Shapes: batch B, length L, hidden size D.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5Attention,
    Qwen3_5DecoderLayer,
    Qwen3_5ForCausalLM,
    Qwen3_5MLP,
    Qwen3_5PreTrainedModel,
    Qwen3_5RMSNorm,
    Qwen3_5TextModel,
    Qwen3_5TextRotaryEmbedding,
)

from ...compatibility import cache_keyword, one_cache, takes_any_cache_name
from ...layers.gated_delta import CompreSSMGatedDeltaMixer
from ..causal_lm import CausalLM
from ..classification import SequenceClassification
from ..embeddings import embed_values, make_embeddings
from ..known_by_name import KnownModel
from ..loading import SizesFromConfig
from ..pooling import padding_of_steps
from .configuration_compressm_gated_deltanet import FULL, LINEAR, CompreSSMGatedDeltaNetConfig


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


class CompreSSMGatedDeltaNetBlock(Qwen3_5DecoderLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is this package's, or transformers' softmax attention."""

    linear_attn: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.block_type = config.layer_types[layer_idx]
        if self.block_type == LINEAR:
            self.linear_attn = CompreSSMGatedDeltaMixer(config, layer_idx, ACT2FN[config.hidden_act])
        else:
            self.self_attn = Qwen3_5Attention(config, layer_idx)
        self.mlp = Qwen3_5MLP(config, config.intermediate_size)
        self.input_layernorm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class CompreSSMGatedDeltaNetPreTrainedModel(SizesFromConfig, Qwen3_5PreTrainedModel):
    """Loading, saving and initialisation of all CompreSSMGatedDeltaNet models."""

    config: Any
    config_class = CompreSSMGatedDeltaNetConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["CompreSSMGatedDeltaNetBlock"]
    input_modalities = ("text",)  # type: ignore[assignment]

    def __init__(self, config: CompreSSMGatedDeltaNetConfig) -> None:
        # Not that of the stock model, which would build its own blocks first.
        PreTrainedModel.__init__(self, config)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, CompreSSMGatedDeltaMixer):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)
            # With that of a linear layer, outputs would be below the eps of the norm behind them.
            init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))


class CompreSSMGatedDeltaNetModel(KnownModel, CompreSSMGatedDeltaNetPreTrainedModel, Qwen3_5TextModel):
    """The stack of blocks. Reads `input_ids`, `inputs_embeds`, or with `config.num_channels` `input_values`."""

    embed_tokens: Any
    stock_forward = takes_any_cache_name(Qwen3_5TextModel.forward)

    def __init__(self, config: CompreSSMGatedDeltaNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = make_embeddings(config)
        blocks = [CompreSSMGatedDeltaNetBlock(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3_5TextRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

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
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"give exactly one of {self.main_input_name} and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self._embedded(input_ids)
        if not isinstance(attention_mask, dict):
            position_ids = self._positions(position_ids, attention_mask, inputs_embeds, cache)
            attention_mask = self._masks(attention_mask, inputs_embeds, cache, position_ids)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None and FULL not in self.config.layer_types:
            cache = CountingCache(config=self.config)
        output = self.stock_forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
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
            named = {cache_keyword(create_causal_mask): cache, "position_ids": positions}
            masks[FULL] = create_causal_mask(config=self.config, inputs_embeds=inputs, attention_mask=mask, **named)
        return masks


class CompreSSMGatedDeltaNetForCausalLM(
    CausalLM, CompreSSMGatedDeltaNetPreTrainedModel, Qwen3_5ForCausalLM, GenerationMixin
):
    """A Gated DeltaNet that predicts the next token; forward and `generate` as transformers' `Qwen3_5ForCausalLM`."""

    backbone_class = CompreSSMGatedDeltaNetModel
    _tied_weights_keys = {"lm_head.weight": "backbone.embed_tokens.weight"}
    forward = takes_any_cache_name(Qwen3_5ForCausalLM.forward)

    @property
    def model(self) -> Any:
        """The backbone, by the name that transformers' forward uses."""
        return self.backbone

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        # `generate` asks its cache for a number of tokens, which one without attention does not know. So the first
        # forward makes one that counts.
        return FULL in self.config.layer_types


class CompreSSMGatedDeltaNetForSequenceClassification(SequenceClassification, CompreSSMGatedDeltaNetPreTrainedModel):
    """A Gated DeltaNet with a linear classifier of whole sequences."""

    backbone_class = CompreSSMGatedDeltaNetModel


__all__ = [
    "CompreSSMGatedDeltaNetForCausalLM",
    "CompreSSMGatedDeltaNetForSequenceClassification",
    "CompreSSMGatedDeltaNetModel",
    "CompreSSMGatedDeltaNetPreTrainedModel",
]
