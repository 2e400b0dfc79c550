"""What all classifiers of this package share: loss, pooling and head. B batch, L length, H features, K labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput

from .known_by_name import KnownClassifier
from .outputs import in_form
from .pooling import pooled


def classification_loss(
    model: Any, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any
) -> Tensor:
    """Compute transformers' loss for `config.problem_type`, which is set from the labels if it is None.

    Args:
        model: has `loss_function` and `config`.
        logits: (B, K) floats.
        labels: (B,) class indices in [0, K) or -100; or (B, K) 0.0 or 1.0 for several labels at once; or (B,) or
            (B, K) floats for regression.
        num_items_in_batch: the number of label entries over which the loss is a mean; those of this batch if None.
        **kwargs: for the loss.

    Returns:
        A scalar.
    """
    config = model.config
    if config.problem_type is None:
        several = "single_label" if labels.dtype in (torch.int64, torch.int32) else "multi_label"
        config.problem_type = "regression" if config.num_labels == 1 else f"{several}_classification"
    settings = kwargs | {"labels": labels, "pooled_logits": logits, "config": config}
    if num_items_in_batch is None:
        return model.loss_function(**settings)
    if config.problem_type == "single_label_classification":
        return model.loss_function(**settings, num_items_in_batch=num_items_in_batch)
    # For the other problem types transformers' loss is always the mean over this batch.
    count = torch.as_tensor(num_items_in_batch, device=logits.device)
    return model.loss_function(**settings) * (labels.numel() / count)


class SequenceClassification(KnownClassifier):
    """Mixin of PreTrainedModels that adds a linear map from `backbone`'s pooled features to `num_labels` logits."""

    config: Any
    backbone_class: Any
    output_class: Any = SequenceClassifierOutput
    score_bias = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.backbone = self.backbone_class(config)
        self._add_head(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Compute logits (B, K) of whole sequences, in float32 at least. A model of pairs reads two in each row.

        Args:
            input_ids: (B, L) integers, (B, 2, L) for pairs.
            attention_mask: (B, L) or (B, 2, L), 1 at real positions, 0 at padding on either side.
            inputs_embeds: (B, L, H) or (B, 2, L, H), instead of `input_ids`.
            input_values: (B, L, num_channels) or (B, 2, L, num_channels), if the config has `num_channels`.
            labels: (B,) class indices, (B, K) 0.0 or 1.0 for several labels at once, or (B,) or (B, K) floats for
                regression; see `config.problem_type`.
            output_hidden_states: whether to return hidden states (B, L, H); (2 B, L, H) for pairs, the two of a pair
                one after the other.
            return_dict: a tuple instead of an output object if False.
            **kwargs: for the loss: `num_items_in_batch`, the number of label entries over which it is a mean,
                if that is not the number in this batch.

        Raises:
            ValueError: if a model of pairs gets an input whose second axis does not have length 2.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "input_values": input_values,
        }
        inputs = {name: self._as_sequences(name, value) for name, value in given.items() if value is not None}
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs = self.backbone(**inputs, use_cache=False, output_hidden_states=hidden, return_dict=True)
        logits = self._logits(self._read(outputs.last_hidden_state, inputs.get("attention_mask")))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        output = self.output_class(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return in_form(output, return_dict, self.config)

    def _read(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return what the head sees of the backbone's features (B, L, H)."""
        return pooled(hidden_states, attention_mask, self.config.pooling)

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """Return the loss, a scalar."""
        return classification_loss(self, logits, labels, **kwargs)

    def _add_head(self, config: Any) -> None:
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=self.score_bias)

    def _as_sequences(self, name: str, value: Tensor) -> Tensor:
        """Give an input in the form in which the backbone takes it."""
        return value

    def _logits(self, features: Tensor) -> Tensor:
        """Map features (B, H) to (B, K)."""
        return self.score(features)


class SequencePairClassification(SequenceClassification):
    """Mixin of PreTrainedModels: `backbone` reads two sequences, and a network with one hidden layer classifies them.

    It sees [x1, x2, x1 * x2, x1 - x2], (B, 4 H), of the pooled features x1 and x2 of the two.

    Source: Tay et al. 2020, arXiv 2011.04006, the retrieval task.
    """

    score_bias = True

    def _add_head(self, config: Any) -> None:
        self.dense = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        super()._add_head(config)

    def _as_sequences(self, name: str, value: Tensor) -> Tensor:
        """(B, 2, ...) -> (2 B, ...): the two of a pair one after the other."""
        if value.ndim < 3 or value.shape[1] != 2:
            raise ValueError(
                f"{name} must hold pairs, with shape (B, 2, L) or (B, 2, L, ...); got {tuple(value.shape)}"
            )
        return value.flatten(0, 1)

    def _logits(self, features: Tensor) -> Tensor:
        """Map pooled features (2 B, H) to (B, K)."""
        first, second = features.unflatten(0, (-1, 2)).unbind(1)
        features = torch.cat([first, second, first * second, first - second], dim=-1)
        return self.score(self.act(self.dense(features)))
