"""Mamba-2 models with a state size for each layer, on transformers' own blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2ForCausalLM,
    Mamba2Model,
    Mamba2PreTrainedModel,
    Mamba2RMSNorm,
)

from ...compatibility import one_cache, takes_any_cache_name
from ...layers.mamba2 import CompreSSMMamba2Mixer
from ..classification import SequenceClassification
from ..known_by_name import KnownCausalLM, KnownModel
from ..loading import SizesFromConfig
from ..pooling import padding_of_steps
from ..selective import (
    embedded,
    initialise_convolution_and_output,
    make_embeddings,
    rows_of_padding_kept,
)
from .configuration_compressm_mamba2 import CompreSSMMamba2Config

STOCK_FORWARD = takes_any_cache_name(Mamba2Model.forward)


class CompreSSMMamba2Block(Mamba2Block):
    """x + mixer(norm(x)), with this package's mixer."""

    def __init__(self, config: CompreSSMMamba2Config, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = Mamba2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = CompreSSMMamba2Mixer(  # type: ignore[assignment]
            config.hidden_size,
            config.num_heads,
            config.head_dim,
            config.n_groups,
            config.state_size,
            config.state_sizes[layer_idx],
            config.conv_kernel,
            config.chunk_size,
            layer_idx,
            config.use_bias,
            config.use_conv_bias,
            config.layer_norm_epsilon,
            tuple(config.time_step_limit),  # type: ignore[arg-type]
            (config.time_step_min, config.time_step_max, config.time_step_floor),
            config.hidden_act,
            ACT2FN[config.hidden_act],
        )


class CompreSSMMamba2PreTrainedModel(SizesFromConfig, Mamba2PreTrainedModel):
    """Loading, saving and initialisation of all CompreSSMMamba2 models."""

    config: CompreSSMMamba2Config
    config_class = CompreSSMMamba2Config
    _no_split_modules = ["CompreSSMMamba2Block"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompreSSMMamba2Mixer):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)
            initialise_convolution_and_output(module, self.config)


class CompreSSMMamba2Model(KnownModel, CompreSSMMamba2PreTrainedModel, Mamba2Model):
    """Mamba-2's stack of blocks. Reads `input_ids`, `inputs_embeds`, or with `config.num_channels` `input_values`."""

    def __init__(self, config: CompreSSMMamba2Config):
        CompreSSMMamba2PreTrainedModel.__init__(self, config)
        self.embeddings = make_embeddings(config)  # type: ignore[assignment]
        self.layers = nn.ModuleList([CompreSSMMamba2Block(config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.norm_f = Mamba2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        if config.num_channels is not None:
            self.main_input_name = "input_values"
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' `Mamba2Model`; also takes `input_values` (B, L, num_channels), and a cache by each name.

        Padding, where `attention_mask` (B, L) is zero, leaves no trace in other positions or the cache; of a longer
        mask the last L columns count.
        """
        inputs_embeds = embedded(self.embeddings, input_values, inputs_embeds)
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is not None:
            attention_mask = padding_of_steps(attention_mask, inputs)
        cache = one_cache(self, cache=cache, cache_params=cache_params)
        if cache is None and attention_mask is not None and attention_mask.shape[1] == 1 and not self.training:
            cache = DynamicCache(config=self.config) if use_cache in (None, True) else None
        with rows_of_padding_kept(cache, attention_mask):
            return STOCK_FORWARD(
                self,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                cache=cache,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                attention_mask=attention_mask,
                **kwargs,
            )


class CompreSSMMamba2ForCausalLM(KnownCausalLM, CompreSSMMamba2PreTrainedModel, Mamba2ForCausalLM, GenerationMixin):
    """A Mamba-2 that predicts the next token; forward and `generate` as transformers' `Mamba2ForCausalLM`."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    forward = takes_any_cache_name(Mamba2ForCausalLM.forward)

    def __init__(self, config: CompreSSMMamba2Config):
        if config.num_channels is not None:
            raise ValueError("CompreSSMMamba2ForCausalLM predicts tokens: leave config.num_channels out")
        CompreSSMMamba2PreTrainedModel.__init__(self, config)
        self.backbone = CompreSSMMamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class CompreSSMMamba2ForSequenceClassification(SequenceClassification, CompreSSMMamba2PreTrainedModel):
    """A Mamba-2 with a linear classifier of whole sequences."""

    backbone_class = CompreSSMMamba2Model


__all__ = [
    "CompreSSMMamba2ForCausalLM",
    "CompreSSMMamba2ForSequenceClassification",
    "CompreSSMMamba2Model",
    "CompreSSMMamba2PreTrainedModel",
]
