"""Which Auto class, and which of its model classes, serves which kind of task."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

HEADS = {
    "sequence_classification": AutoModelForSequenceClassification,
    "sequence_pair_classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
}
"""The Auto class that loads a saved model for a task of each kind."""

CLASS_ENDINGS = {
    "sequence_classification": "ForSequenceClassification",
    "sequence_pair_classification": "ForSequencePairClassification",
    "causal_lm": "ForCausalLM",
}
"""How names of model classes end that have the head for a task of each kind."""


def model_classes(auto: Any, config_class: type) -> tuple[type, ...]:
    """The model classes that an Auto class has for a config, the one that it takes by default first."""
    found = auto._model_mapping.get(config_class, ())
    return found if isinstance(found, tuple) else (found,)


def new_model(problem: str, config: Any) -> PreTrainedModel:
    """A freshly initialised model with the head for a kind of task, one of `HEADS`.

    Raises:
        ValueError: if there is none for this config.
    """
    auto: Any = HEADS[problem]
    if problem == "sequence_pair_classification":  # shares an Auto class, which then goes by the name
        names = [cls.__name__ for cls in model_classes(auto, type(config))]
        config.architectures = [name for name in names if name.endswith(CLASS_ENDINGS[problem])]
        if not config.architectures:
            raise ValueError(f"{config.model_type} has no model that reads pairs of sequences; mimo_ssm has one")
    return auto.from_config(config)
