"""Mamba models with a state size for each layer, on transformers' own blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mamba.modeling_mamba import (
    MambaBlock,
    MambaForCausalLM,
    MambaModel,
    MambaPreTrainedModel,
    MambaRMSNorm,
)

from ...compatibility import takes_any_cache_name
from ...layers.mamba import CompreSSMMambaMixer
from ..classification import SequenceClassification
from ..known_by_name import KnownCausalLM, KnownModel
from ..loading import SizesFromConfig
from ..pooling import padding_of_steps
from ..selective import (
    embedded,
    initialise_convolution_and_output,
    make_embeddings,
)
from .configuration_compressm_mamba import CompreSSMMambaConfig

STOCK_FORWARD = takes_any_cache_name(MambaModel.forward)


class CompreSSMMambaBlock(MambaBlock):
    """x + mixer(norm(x)), with this package's mixer."""

    def __init__(self, config: CompreSSMMambaConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = CompreSSMMambaMixer(  # type: ignore[assignment]
            config.hidden_size,
            config.intermediate_size,
            config.state_sizes[layer_idx],
            int(config.time_step_rank),
            config.conv_kernel,
            layer_idx,
            config.use_bias,
            config.use_conv_bias,
            (config.time_step_min, config.time_step_max, config.time_step_floor),
            config.hidden_act,
            ACT2FN[config.hidden_act],
        )


class CompreSSMMambaPreTrainedModel(SizesFromConfig, MambaPreTrainedModel):
    """Loading, saving and initialisation of all CompreSSMMamba models."""

    config: CompreSSMMambaConfig
    config_class = CompreSSMMambaConfig
    _no_split_modules = ["CompreSSMMambaBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompreSSMMambaMixer):
            fresh = module.initial_values(self.config.time_step_scale, self.config.time_step_init_scheme)
            for name, value in fresh.items():
                init.copy_(module.get_parameter(name), value)
            initialise_convolution_and_output(module, self.config)


class CompreSSMMambaModel(KnownModel, CompreSSMMambaPreTrainedModel, MambaModel):
    """Mamba's stack of blocks. Reads `input_ids`, `inputs_embeds`, or with `config.num_channels` `input_values`."""

    def __init__(self, config: CompreSSMMambaConfig):
        CompreSSMMambaPreTrainedModel.__init__(self, config)
        self.embeddings = make_embeddings(config)  # type: ignore[assignment]
        self.layers = nn.ModuleList([CompreSSMMambaBlock(config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.norm_f = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
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
        """As transformers' `MambaModel`; also takes `input_values` (B, L, num_channels), and a cache by each name.

        Padding, where `attention_mask` (B, L) is zero, leaves no trace in other positions or the cache; of a longer
        mask the last L columns count.
        """
        inputs_embeds = embedded(self.embeddings, input_values, inputs_embeds)
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is not None:
            attention_mask = padding_of_steps(attention_mask, inputs)
        return STOCK_FORWARD(
            self,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            attention_mask=attention_mask,
            **kwargs,
        )


class CompreSSMMambaForCausalLM(KnownCausalLM, CompreSSMMambaPreTrainedModel, MambaForCausalLM, GenerationMixin):
    """A Mamba that predicts the next token; forward and `generate` as transformers' `MambaForCausalLM`."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    forward = takes_any_cache_name(MambaForCausalLM.forward)

    def __init__(self, config: CompreSSMMambaConfig):
        if config.num_channels is not None:
            raise ValueError("CompreSSMMambaForCausalLM predicts tokens: leave config.num_channels out")
        CompreSSMMambaPreTrainedModel.__init__(self, config)
        self.backbone = CompreSSMMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class CompreSSMMambaForSequenceClassification(SequenceClassification, CompreSSMMambaPreTrainedModel):
    """A Mamba with a linear classifier of whole sequences."""

    backbone_class = CompreSSMMambaModel


__all__ = [
    "CompreSSMMambaForCausalLM",
    "CompreSSMMambaForSequenceClassification",
    "CompreSSMMambaModel",
    "CompreSSMMambaPreTrainedModel",
]
