"""Make an optimizer with a parameter group for state-space parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..surgery import find_mixers
from ..surgery.optimizer import check_optimizer_class


def create_optimizer(model: nn.Module, args: TrainingArguments, ssm_learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer that `args` name, with a group for state-space parameters.

    Parameters that set the dynamics of state-space layers (`MixerAdapter.dynamics`) are trained with their own, usually
    smaller, learning rate and without weight decay; all else as the Trainer would do it. Pass the result as
    `Trainer(optimizers=(opt, None))`; under FSDP the Trainer refuses that, and takes `optimizer_settings`.

    Args, Raises and Source: as `optimizer_settings`.
    """
    cls, settings = optimizer_settings(model, args, ssm_learning_rate)
    return cls(**settings)


def optimizer_settings(
    model: nn.Module, args: TrainingArguments, ssm_learning_rate: float
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and keyword arguments of the optimizer of `create_optimizer`.

    Pass the result as `Trainer(optimizer_cls_and_kwargs=...)`, which makes it before it trains, also under FSDP.

    Args:
        model: a model with supported mixers.
        args: learning rate, weight decay, optimizer name and its settings.
        ssm_learning_rate: learning rate of those parameters, > 0.

    Raises:
        ValueError: if the learning rate is not positive, or the model has no supported mixer.
        TypeError: if `args.optim` names an optimizer whose state cannot be carried through a cut.

    Source: Orvieto et al. 2023, arXiv 2303.06349, appendix C; Gu et al. 2022, arXiv 2206.11893.
    """
    if ssm_learning_rate <= 0:
        raise ValueError(f"ssm_learning_rate must be positive; got {ssm_learning_rate}")
    ssm = {id(site.mixer.get_parameter(name)) for site in find_mixers(model) for name in site.adapter.dynamics}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": args.weight_decay},
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": 0.0, "lr": ssm_learning_rate},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[2 if id(parameter) in ssm else 0 if name in decayed else 1]["params"].append(parameter)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    check_optimizer_class(cls)
    return cls, {"params": [group for group in groups if group["params"]]} | kwargs
