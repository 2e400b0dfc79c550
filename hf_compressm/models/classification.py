"""What all classifiers of this package share: the loss, and the head over one sequence. B batch, K labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .known_by_name import KnownClassifier
from .pooling import pooled


def classification_loss(
    model: Any, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any
) -> Tensor:
    """transformers' loss for the config's kind of problem, which is set from the labels where it is None.

    Args:
        model: has `loss_function` and `config`.
        logits: (B, K).
        labels: (B,) class indices, (B, K) 0.0 or 1.0 for several labels at once, or (B,) or (B, K) floats for
            regression.
        num_items_in_batch: the number of label entries over which the loss is a mean; those of this batch if None.
        **kwargs: for the loss.
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
    # For these problems transformers' loss is the mean over this batch in any case.
    count = torch.as_tensor(num_items_in_batch, device=logits.device)
    return model.loss_function(**settings) * (labels.numel() / count)


def in_form(output: Any, return_dict: bool | None, config: Any) -> Any:
    """The output object, or a tuple where that is asked for."""
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class SequenceClassification(KnownClassifier):
    """Mixin of PreTrainedModels: a linear map of `backbone`'s pooled features to `num_labels` logits."""

    config: Any
    backbone_class: Any
    score_bias = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.backbone = self.backbone_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=self.score_bias)
        if config.num_channels is not None:
            self.main_input_name = "input_values"
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
        """Logits (B, num_labels) of whole sequences.

        Args:
            input_ids: (B, L), or inputs_embeds (B, L, H), or input_values (B, L, channels).
            attention_mask: (B, L), 1 at real positions, 0 at padding on either side.
            labels: (B,) class indices, (B, num_labels) 0.0 or 1.0 for several labels at once, or (B,) or
                (B, num_labels) floats for regression; see `config.problem_type`.
            **kwargs: for the loss: `num_items_in_batch`, the number of label entries over which it is a mean,
                where that is not the number in this batch.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(pooled(outputs.last_hidden_state, attention_mask, self.config.pooling))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None if labels is None else classification_loss(self, logits, labels, **kwargs)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return in_form(output, return_dict, self.config)
