"""Mamba models with a state size for each layer, on transformers' own blocks."""

from __future__ import annotations

from torch import Tensor
from transformers import GenerationMixin
from transformers.activations import ACT2FN
from transformers.models.mamba.modeling_mamba import (
    MambaBlock,
    MambaForCausalLM,
    MambaModel,
    MambaPreTrainedModel,
    MambaRMSNorm,
)

from ...compatibility import takes_any_cache_name
from ...layers.mamba import CompreSSMMambaMixer
from ..causal_lm import CausalLM
from ..classification import SequenceClassification
from ..selective import SelectiveBlock, SelectiveModel, SelectivePreTrained
from ..token_classification import TokenClassification
from .configuration_compressm_mamba import CompreSSMMambaConfig


class CompreSSMMambaBlock(SelectiveBlock, MambaBlock):
    """x + mixer(norm(x)), with this package's mixer."""

    norm_class = MambaRMSNorm

    @staticmethod
    def make_mixer(config: CompreSSMMambaConfig, layer_idx: int) -> CompreSSMMambaMixer:
        """Build the mixer of a layer."""
        return CompreSSMMambaMixer(config, layer_idx, ACT2FN[config.hidden_act])


class CompreSSMMambaPreTrainedModel(SelectivePreTrained, MambaPreTrainedModel):
    """Loading, saving and initialisation of all CompreSSMMamba models."""

    config: CompreSSMMambaConfig
    config_class = CompreSSMMambaConfig
    mixer_class = CompreSSMMambaMixer
    _no_split_modules = ["CompreSSMMambaBlock"]

    def _initial_values(self, mixer: CompreSSMMambaMixer) -> dict[str, Tensor]:
        return mixer.initial_values(self.config.time_step_scale, self.config.time_step_init_scheme)


class CompreSSMMambaModel(SelectiveModel, CompreSSMMambaPreTrainedModel, MambaModel):
    """Mamba's stack of blocks. Reads `input_ids`, `inputs_embeds`, or with `config.num_channels` `input_values`."""

    block_class = CompreSSMMambaBlock
    stock_forward = takes_any_cache_name(MambaModel.forward)


class CompreSSMMambaForCausalLM(CausalLM, CompreSSMMambaPreTrainedModel, MambaForCausalLM, GenerationMixin):
    """A Mamba that predicts the next token; forward and `generate` as transformers' `MambaForCausalLM`."""

    backbone_class = CompreSSMMambaModel
    forward = takes_any_cache_name(MambaForCausalLM.forward)


class CompreSSMMambaForSequenceClassification(SequenceClassification, CompreSSMMambaPreTrainedModel):
    """A Mamba with a linear classifier of whole sequences."""

    backbone_class = CompreSSMMambaModel


class CompreSSMMambaForTokenClassification(TokenClassification, CompreSSMMambaPreTrainedModel):
    """A Mamba that gives each step labels: one of several classes, or values."""

    backbone_class = CompreSSMMambaModel


__all__ = [
    "CompreSSMMambaForCausalLM",
    "CompreSSMMambaForSequenceClassification",
    "CompreSSMMambaForTokenClassification",
    "CompreSSMMambaModel",
    "CompreSSMMambaPreTrainedModel",
]
