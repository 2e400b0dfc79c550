"""Gated DeltaNet models with a state size for each layer; the rest is transformers' Qwen3.5."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
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

from ...compatibility import takes_any_cache_name
from ...layers.gated_delta import CompreSSMGatedDeltaMixer
from ..classification import SequenceClassification
from ..embeddings import make_embeddings
from ..hybrid import HybridCausalLM, HybridModel
from ..hybrid_config import LINEAR
from ..loading import SizesFromConfig
from ..token_classification import TokenClassification
from .configuration_compressm_gated_deltanet import CompreSSMGatedDeltaNetConfig


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


class CompreSSMGatedDeltaNetModel(HybridModel, CompreSSMGatedDeltaNetPreTrainedModel, Qwen3_5TextModel):
    """The stack of blocks. Reads `input_ids`, `inputs_embeds`, or with `config.num_channels` `input_values`."""

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


class CompreSSMGatedDeltaNetForCausalLM(
    HybridCausalLM, CompreSSMGatedDeltaNetPreTrainedModel, Qwen3_5ForCausalLM, GenerationMixin
):
    """A Gated DeltaNet that predicts the next token; forward and `generate` as transformers' `Qwen3_5ForCausalLM`."""

    backbone_class = CompreSSMGatedDeltaNetModel
    forward = takes_any_cache_name(Qwen3_5ForCausalLM.forward)


class CompreSSMGatedDeltaNetForSequenceClassification(SequenceClassification, CompreSSMGatedDeltaNetPreTrainedModel):
    """A Gated DeltaNet with a linear classifier of whole sequences."""

    backbone_class = CompreSSMGatedDeltaNetModel


class CompreSSMGatedDeltaNetForTokenClassification(TokenClassification, CompreSSMGatedDeltaNetPreTrainedModel):
    """A Gated DeltaNet that gives each step labels: one of several classes, or values."""

    backbone_class = CompreSSMGatedDeltaNetModel


__all__ = [
    "CompreSSMGatedDeltaNetForCausalLM",
    "CompreSSMGatedDeltaNetForSequenceClassification",
    "CompreSSMGatedDeltaNetForTokenClassification",
    "CompreSSMGatedDeltaNetModel",
    "CompreSSMGatedDeltaNetPreTrainedModel",
]
