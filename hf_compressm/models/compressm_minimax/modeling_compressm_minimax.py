"""MiniMax models with a state size for each layer of lightning attention; the rest is transformers' MiniMax."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.minimax.modeling_minimax import (
    MiniMaxDecoderLayer,
    MiniMaxForCausalLM,
    MiniMaxModel,
    MiniMaxPreTrainedModel,
    MiniMaxRMSNorm,
    MiniMaxRotaryEmbedding,
)

from ...compatibility import takes_any_cache_name
from ...layers.lightning import CompreSSMLightningMixer
from ..classification import SequenceClassification
from ..embeddings import make_embeddings
from ..hybrid import HybridCausalLM, HybridModel
from ..hybrid_config import LINEAR
from ..loading import SizesFromConfig
from ..token_classification import TokenClassification
from .configuration_compressm_minimax import CompreSSMMiniMaxConfig


class CompreSSMMiniMaxBlock(MiniMaxDecoderLayer):
    """transformers' block, with this package's mixer in place of lightning attention."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if self.block_type == LINEAR:
            norm = MiniMaxRMSNorm(config.head_dim * config.num_attention_heads)
            self.self_attn: Any = CompreSSMLightningMixer(config, layer_idx, ACT2FN[config.hidden_act], norm)


class CompreSSMMiniMaxPreTrainedModel(SizesFromConfig, MiniMaxPreTrainedModel):
    """Loading, saving and initialisation of all CompreSSMMiniMax models."""

    config: Any
    config_class = CompreSSMMiniMaxConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["CompreSSMMiniMaxBlock"]
    _is_stateful = True

    def __init__(self, config: CompreSSMMiniMaxConfig) -> None:
        # Not that of the stock model, which would build its own blocks first.
        PreTrainedModel.__init__(self, config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its experts in the source of the class; here they are in that of the stock block.
        return True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, CompreSSMLightningMixer):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)


class CompreSSMMiniMaxModel(HybridModel, CompreSSMMiniMaxPreTrainedModel, MiniMaxModel):
    """The stack of blocks. Reads `input_ids`, `inputs_embeds`, or with `config.num_channels` `input_values`."""

    stock_forward = takes_any_cache_name(MiniMaxModel.forward)

    def __init__(self, config: CompreSSMMiniMaxConfig) -> None:
        super().__init__(config)
        self.embed_tokens = make_embeddings(config)
        self.layers = nn.ModuleList(CompreSSMMiniMaxBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = MiniMaxRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MiniMaxRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class CompreSSMMiniMaxForCausalLM(HybridCausalLM, CompreSSMMiniMaxPreTrainedModel, MiniMaxForCausalLM, GenerationMixin):
    """A MiniMax that predicts the next token; forward and `generate` as transformers' `MiniMaxForCausalLM`."""

    backbone_class = CompreSSMMiniMaxModel
    forward = takes_any_cache_name(MiniMaxForCausalLM.forward)

    def __init__(self, config: CompreSSMMiniMaxConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts, self.num_experts_per_tok = config.num_local_experts, config.num_experts_per_tok


class CompreSSMMiniMaxForSequenceClassification(SequenceClassification, CompreSSMMiniMaxPreTrainedModel):
    """A MiniMax with a linear classifier of whole sequences."""

    backbone_class = CompreSSMMiniMaxModel


class CompreSSMMiniMaxForTokenClassification(TokenClassification, CompreSSMMiniMaxPreTrainedModel):
    """A MiniMax that gives each step labels: one of several classes, or values."""

    backbone_class = CompreSSMMiniMaxModel


__all__ = [
    "CompreSSMMiniMaxForCausalLM",
    "CompreSSMMiniMaxForSequenceClassification",
    "CompreSSMMiniMaxForTokenClassification",
    "CompreSSMMiniMaxModel",
    "CompreSSMMiniMaxPreTrainedModel",
]
