"""Labels for each step: what all models with such a head share. B batch, L length, H features, K labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from .classification import SequenceClassification

IGNORED_LABEL = -100
"""Marks steps that do not count, padding among them; where labels are numbers, NaN does too."""


def steps_loss(model: Any, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
    """Compute the mean loss over labels that count, for `config.problem_type`, which is set from the labels if None.

    Args:
        model: has `loss_function` and `config`.
        logits: (B, L, K) floats.
        labels: (B, L) class indices in [0, K) or -100: cross-entropy. Or floats (B, L, K), or (B, L) for K = 1, with
            -100 or NaN where they do not count: squared error.
        num_items_in_batch: number of labels over which the loss is a mean; those of this batch if None.
        **kwargs: for transformers' loss.

    Returns:
        A scalar.
    """
    config = model.config
    if config.problem_type is None:
        config.problem_type = "regression" if labels.is_floating_point() else "single_label_classification"
    if config.problem_type != "regression":
        count = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return model.loss_function(logits=logits, labels=labels, config=config, **count, **kwargs)
    wanted = labels.to(logits.device, logits.dtype).reshape(logits.shape)
    counted = (wanted != IGNORED_LABEL) & ~wanted.isnan()
    total = (logits - wanted.masked_fill(~counted, 0)).masked_fill(~counted, 0).square().sum()
    items = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(items, device=logits.device)


class TokenClassification(SequenceClassification):
    """Mixin of PreTrainedModels that adds a linear map from `backbone`'s features to `num_labels` logits, at each step.

    Models are causal: a step's logits depend on it and the steps before it.
    """

    known_as = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    known_loss = "ForTokenClassification"
    output_class = TokenClassifierOutput
    score_bias = True

    def _read(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return hidden_states

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return steps_loss(self, logits, labels, **kwargs)
