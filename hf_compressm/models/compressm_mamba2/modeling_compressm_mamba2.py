"""Mamba-2 models with a state size for each layer, on transformers' own blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.activations import ACT2FN
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2ForCausalLM,
    Mamba2Model,
    Mamba2PreTrainedModel,
    Mamba2RMSNorm,
)

from ...compatibility import takes_any_cache_name
from ...layers.mamba2 import CompreSSMMamba2Mixer
from ..causal_lm import CausalLM
from ..classification import SequenceClassification
from ..selective import SelectiveBlock, SelectiveModel, SelectivePreTrained, rows_of_padding_kept
from ..token_classification import TokenClassification
from .configuration_compressm_mamba2 import CompreSSMMamba2Config


class CompreSSMMamba2Block(SelectiveBlock, Mamba2Block):
    """x + mixer(norm(x)), with this package's mixer."""

    norm_class = Mamba2RMSNorm

    @staticmethod
    def make_mixer(config: CompreSSMMamba2Config, layer_idx: int) -> CompreSSMMamba2Mixer:
        """Build the mixer of a layer."""
        return CompreSSMMamba2Mixer(config, layer_idx, ACT2FN[config.hidden_act])


class CompreSSMMamba2PreTrainedModel(SelectivePreTrained, Mamba2PreTrainedModel):
    """Loading, saving and initialisation of all CompreSSMMamba2 models."""

    config: CompreSSMMamba2Config
    config_class = CompreSSMMamba2Config
    mixer_class = CompreSSMMamba2Mixer
    _no_split_modules = ["CompreSSMMamba2Block"]


class CompreSSMMamba2Model(SelectiveModel, CompreSSMMamba2PreTrainedModel, Mamba2Model):
    """Mamba-2's stack of blocks. Reads `input_ids`, `inputs_embeds`, or with `config.num_channels` `input_values`."""

    block_class = CompreSSMMamba2Block
    stock_forward = takes_any_cache_name(Mamba2Model.forward)

    def _run_stock(self, cache: Any, mask: Tensor | None, use_cache: bool | None, **inputs: Any) -> Any:
        if cache is None and mask is not None and mask.shape[1] == 1 and not self.training:
            cache = DynamicCache(config=self.config) if use_cache in (None, True) else None
        with rows_of_padding_kept(cache, mask):
            return super()._run_stock(cache, mask, use_cache, **inputs)


class CompreSSMMamba2ForCausalLM(CausalLM, CompreSSMMamba2PreTrainedModel, Mamba2ForCausalLM, GenerationMixin):
    """A Mamba-2 that predicts the next token; forward and `generate` as transformers' `Mamba2ForCausalLM`."""

    backbone_class = CompreSSMMamba2Model
    forward = takes_any_cache_name(Mamba2ForCausalLM.forward)


class CompreSSMMamba2ForSequenceClassification(SequenceClassification, CompreSSMMamba2PreTrainedModel):
    """A Mamba-2 with a linear classifier of whole sequences."""

    backbone_class = CompreSSMMamba2Model


class CompreSSMMamba2ForTokenClassification(TokenClassification, CompreSSMMamba2PreTrainedModel):
    """A Mamba-2 that gives each step labels: one of several classes, or values."""

    backbone_class = CompreSSMMamba2Model


__all__ = [
    "CompreSSMMamba2ForCausalLM",
    "CompreSSMMamba2ForSequenceClassification",
    "CompreSSMMamba2ForTokenClassification",
    "CompreSSMMamba2Model",
    "CompreSSMMamba2PreTrainedModel",
]
