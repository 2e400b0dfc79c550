"""Which Auto class, and which of its model classes, serves which kind of task; registering this package's classes."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from .feature_extractor import MimoSSMFeatureExtractor

HEADS = {
    "sequence_classification": AutoModelForSequenceClassification,
    "sequence_pair_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "forecasting": AutoModelForTimeSeriesPrediction,
    "causal_lm": AutoModelForCausalLM,
}
"""The Auto class that loads a saved model for a task of each kind."""

CLASS_ENDINGS = {
    "sequence_classification": "ForSequenceClassification",
    "sequence_pair_classification": "ForSequencePairClassification",
    "token_classification": "ForTokenClassification",
    "forecasting": "ForForecasting",
    "causal_lm": "ForCausalLM",
}
"""How names of model classes end that have the head for a task of each kind."""


def register(
    config_class: Any, model: Any, causal_lm: Any, *classifiers: Any, of_steps: Any = None, forecasting: Any = None
) -> None:
    """Register a config and its model classes with transformers' Auto classes.

    Args:
        config_class: has a `model_type`.
        model, causal_lm: its classes without a head and with that of a language model.
        *classifiers: of several, transformers takes the one that the config's `architectures` names, or else the first.
        of_steps: the class that labels each step; None if there is none.
        forecasting: the class that predicts the next steps; None if there is none.
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model, exist_ok=True)
    AutoModelForCausalLM.register(config_class, causal_lm, exist_ok=True)
    several: Any = classifiers if len(classifiers) > 1 else classifiers[0]
    AutoModelForSequenceClassification.register(config_class, several, exist_ok=True)
    if of_steps is not None:
        AutoModelForTokenClassification.register(config_class, of_steps, exist_ok=True)
    if forecasting is not None:
        AutoModelForTimeSeriesPrediction.register(config_class, forecasting, exist_ok=True)
    AutoFeatureExtractor.register(config_class, MimoSSMFeatureExtractor, exist_ok=True)


def model_classes(auto: Any, config_class: type) -> tuple[type, ...]:
    """Return the model classes that an Auto class has for a config, the one that it takes by default first."""
    found = auto._model_mapping.get(config_class, ())
    return found if isinstance(found, tuple) else (found,)


def new_model(problem: str, config: Any) -> PreTrainedModel:
    """Build a freshly initialised model with the head for a kind of task.

    Args:
        problem: a key of `HEADS`.
        config: the model's.

    Raises:
        ValueError: if there is none for this config.
    """
    auto: Any = HEADS[problem]
    if problem == "forecasting" and not model_classes(auto, type(config)):
        raise ValueError(f"{config.model_type} has no model that forecasts; mimo_ssm has one")
    if problem == "sequence_pair_classification":  # shares an Auto class, which then goes by the name
        names = [cls.__name__ for cls in model_classes(auto, type(config))]
        config.architectures = [name for name in names if name.endswith(CLASS_ENDINGS[problem])]
        if not config.architectures:
            raise ValueError(f"{config.model_type} has no model that reads pairs of sequences; mimo_ssm has one")
    return auto.from_config(config)
