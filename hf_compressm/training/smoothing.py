"""Refuse label smoothing for causal models whose labels the Trainer would not shift."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def refuse_unshifted_labels(trainer: Any, model: nn.Module) -> None:
    """Raise if label smoothing would train a model that predicts the next token to copy its input.

    The Trainer computes a smoothed loss itself, and shifts the labels only for classes that it knows by name. Behind
    `torch.compile` it sees no class.

    Raises:
        ValueError: if that is so.
    """
    if getattr(trainer, "label_smoother", None) is None or trainer.compute_loss_func is not None:
        return
    if not _predicts_the_next_token(model):
        return
    seen: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if type(seen).__module__.partition(".")[0] == "peft":
        seen = seen.base_model.model
    name = seen._get_name()
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"label_smoothing_factor={trainer.args.label_smoothing_factor} would train on labels that are not shifted: "
            f"the Trainer shifts them for classes that it knows by name, and sees {name}. Leave out "
            "label_smoothing_factor, or torch_compile, or pass compute_loss_func"
        )


def _predicts_the_next_token(model: Any) -> bool:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_type = getattr(model, "loss_type", None)
    if loss_type is None:  # of a name that says nothing
        return hasattr(model, "can_generate") and bool(model.can_generate())
    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
