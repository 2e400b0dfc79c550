"""MimoSSM: a residual stack of time-invariant MIMO state-space layers.

Shapes: B batch, L length, H features, N states of a layer, V vocabulary size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ...compatibility import one_cache
from ...layers.lru import LRU
from ...layers.padding import is_scattered
from ...layers.plain import innermost
from ..causal_lm import CausalLM
from ..classification import SequenceClassification, SequencePairClassification
from ..embeddings import check_one_input, embed_values, make_embeddings
from ..forecasting import Forecasting
from ..known_by_name import KnownModel
from ..loading import SizesFromConfig
from ..outputs import CACHE_FIELD, in_form
from ..pooling import padding_of_steps
from ..token_classification import TokenClassification
from .batch_norm import MimoSSMBatchNorm
from .cache import MimoSSMCache
from .configuration_mimo_ssm import MimoSSMConfig


def _make_norm(config: MimoSSMConfig) -> nn.LayerNorm | MimoSSMBatchNorm:
    cls = nn.LayerNorm if config.norm == "layer" else MimoSSMBatchNorm
    return cls(config.hidden_size, eps=config.layer_norm_eps)


def _normalise(norm: nn.LayerNorm | MimoSSMBatchNorm, x: Tensor, mask: Tensor | None) -> Tensor:
    return norm(x, mask) if isinstance(innermost(norm), MimoSSMBatchNorm) else norm(x)


class MimoSSMBlock(GradientCheckpointingLayer):
    """x + dropout(GLU(linear(dropout(act(LRU(norm(x))))))); without `prenorm`, the norm is of the sum."""

    def __init__(self, config: MimoSSMConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.prenorm = config.prenorm
        self.norm = _make_norm(config)
        self.mixer = LRU(
            config.hidden_size, config.state_sizes[layer_idx], config.r_min, config.r_max, config.max_phase
        )
        self.act = ACT2FN[config.hidden_act]
        self.out_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None, state: Tensor | None, skips: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the block's output (B, L, H) and its final state (B, N), complex.

        Args:
            hidden_states: (B, L, H).
            mask: (B, L) bool, True at real positions, or None if all are real.
            state: (B, N) complex, the state to start from; zero if None.
            skips: whether padding leaves the state unchanged. Otherwise the state decays there, which is exact unless
                padding is between real positions or the final state is used.
        """
        x = _normalise(self.norm, hidden_states, mask) if self.prenorm else hidden_states
        if mask is not None:
            # Without input the state stays zero, so left padding has no effect.
            x = x.masked_fill(~mask[:, :, None], 0)
        x, state = self.mixer(x, state, mask if skips else None)
        x = F.glu(self.out_proj(self.dropout(self.act(x))), dim=-1)
        hidden_states = hidden_states + self.dropout(x)
        if not self.prenorm:
            hidden_states = _normalise(self.norm, hidden_states, mask)
        return hidden_states, state


class MimoSSMPreTrainedModel(SizesFromConfig, PreTrainedModel):
    """Loading, saving and initialisation of all MimoSSM models."""

    config_class = MimoSSMConfig
    config: MimoSSMConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MimoSSMBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _is_stateful = True
    # Half precision would move the poles by about 1 % of their decay and 0.02 rad.
    _keep_in_fp32_modules_strict = ["nu_log", "theta_log"]

    def __init__(self, config: MimoSSMConfig, *args: Any, **kwargs: Any) -> None:
        config.check()
        if config.vocab_size is None and config.num_channels is None:
            raise ValueError(
                f"{type(self).__name__} needs config.vocab_size (for token ids) or config.num_channels (for "
                "continuous input); both are None"
            )
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LRU):
            for name, value in module.initial_values().items():
                init.copy_(getattr(module, name), value)
        elif isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | MimoSSMBatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, MimoSSMBatchNorm):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)


class MimoSSMModel(KnownModel, MimoSSMPreTrainedModel):
    """Embedding (token ids) or linear map (channels), then the blocks, then a norm if `prenorm`."""

    def __init__(self, config: MimoSSMConfig) -> None:
        super().__init__(config)
        self.embeddings = make_embeddings(config)
        self.layers = nn.ModuleList(MimoSSMBlock(config, idx) for idx in range(config.num_hidden_layers))
        self.norm = _make_norm(config) if config.prenorm else None
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        past_key_values: MimoSSMCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: MimoSSMCache | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Compute the features (B, L, H) of every position from it and the positions before it.

        Args:
            input_ids: (B, L) integers in [0, V), if the config has `vocab_size`.
            attention_mask: (B, L), nonzero at real positions; with a cache also (B, seen + L), of which the
                last L count. Padding, wherever it is, leaves no trace in states and outputs of real positions.
            inputs_embeds: (B, L, H) floats, instead of `input_ids` or `input_values`.
            input_values: (B, L, num_channels) floats, if the config has `num_channels`; of one channel also (B, L).
            past_key_values: states to continue from, as an earlier call returned them; updated in place if
                `use_cache`.
            use_cache: whether to return the states; by default as the config says, and not while training.
            output_hidden_states: whether to return the input of every block and the last hidden state.
            return_dict: a tuple instead of an output object if False.
            cache: another name of `past_key_values`, by which newer versions of transformers pass it.

        Raises:
            ValueError: if not exactly one input is given, or one that the config does not allow, or a mask of another
                shape.
            TypeError: if `past_key_values` is not a `MimoSSMCache`, or two different ones are given.
        """
        hidden_states = self._embed(input_ids, input_values, inputs_embeds)
        mask = padding_of_steps(attention_mask, hidden_states)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = one_cache(self, cache=cache, past_key_values=past_key_values)
        if cache is None:
            cache = MimoSSMCache(len(self.layers))
        elif not isinstance(cache, MimoSSMCache):
            raise TypeError(
                f"past_key_values must be a MimoSSMCache, as this model returns it; got {type(cache).__name__}"
            )

        skips = mask is not None and (use_cache or cache.is_initialized or is_scattered(mask))
        collected, states = [], []
        for layer, state in zip(self.layers, cache.states, strict=True):
            collected.append(hidden_states)
            hidden_states, state = layer(hidden_states, mask, state, skips)
            states.append(state)
        if self.norm is not None:
            hidden_states = _normalise(self.norm, hidden_states, mask)
        if use_cache:
            cache.states = states
            cache.seen_tokens += hidden_states.shape[1]
        returned: Any = {CACHE_FIELD: cache if use_cache else None}
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*collected, hidden_states) if output_hidden_states else None,
            **returned,
        )
        return in_form(output, return_dict, self.config)

    def _embed(self, input_ids: Tensor | None, input_values: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        given = [x for x in (input_ids, input_values, inputs_embeds) if x is not None]
        check_one_input(self, len(given))
        channels = self.config.num_channels
        if input_ids is not None:
            if channels is not None:
                raise ValueError(
                    f"this model reads input_values (B, L, {channels}), since its config has num_channels; got "
                    "input_ids"
                )
            return self.embeddings(input_ids)
        if input_values is not None:
            if channels is None:
                raise ValueError("this model reads input_ids, since its config has vocab_size; got input_values")
            one_channel = input_values.ndim == 2 and channels == 1
            if not one_channel and (input_values.ndim != 3 or input_values.shape[2] != channels):
                raise ValueError(f"input_values must have shape (B, L, {channels}), got {tuple(input_values.shape)}")
            return embed_values(self.embeddings, input_values)
        return given[0]


class MimoSSMForSequenceClassification(SequenceClassification, MimoSSMPreTrainedModel):
    """A MimoSSM with a linear map of its pooled features to `num_labels` logits."""

    backbone_class = MimoSSMModel
    score_bias = True


class MimoSSMForSequencePairClassification(SequencePairClassification, MimoSSMPreTrainedModel):
    """One MimoSSM reads two sequences, and a small network with one hidden layer classifies the pair.

    Inputs are those of `MimoSSMForSequenceClassification` with an axis of two after the first, such as `input_ids`
    (B, 2, L). The network sees [x1, x2, x1 * x2, x1 - x2] of the pooled features x1 and x2, as in the retrieval task of
    the Long Range Arena (Tay et al. 2020, arXiv 2011.04006).
    """

    backbone_class = MimoSSMModel


class MimoSSMForTokenClassification(TokenClassification, MimoSSMPreTrainedModel):
    """A MimoSSM that gives each step labels: one of several classes, or values."""

    backbone_class = MimoSSMModel


class MimoSSMForForecasting(Forecasting, MimoSSMPreTrainedModel):
    """A MimoSSM that predicts the next steps of a series; `forecast` needs constant memory and time per step."""

    backbone_class = MimoSSMModel


class MimoSSMForCausalLM(CausalLM, MimoSSMPreTrainedModel, GenerationMixin):
    """A MimoSSM that predicts the next token; `generate` needs constant memory and time per token."""

    backbone_class = MimoSSMModel

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # So `generate` makes no cache, and the model's first forward creates its own kind.
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: MimoSSMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: MimoSSMCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Compute logits (B, L, V) for the token after each position; inputs as for `MimoSSMModel`.

        Args:
            labels: (B, L) token ids, usually `input_ids` themselves, shifted inside; -100 is ignored.
            logits_to_keep: compute the logits of that many last positions only, or of the positions in a
                tensor; 0 for all.
            **kwargs: for the loss: `num_items_in_batch`, the number of labels over which it is a mean, where
                that is not the number in this batch.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=one_cache(self, cache=cache, past_key_values=past_key_values),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
        )
        return in_form(output, return_dict, self.config)


__all__ = [
    "MimoSSMCache",
    "MimoSSMForCausalLM",
    "MimoSSMForForecasting",
    "MimoSSMForSequenceClassification",
    "MimoSSMForSequencePairClassification",
    "MimoSSMForTokenClassification",
    "MimoSSMModel",
    "MimoSSMPreTrainedModel",
]
