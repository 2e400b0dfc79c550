"""Enter the names of model classes in the tables by which transformers decides what a model is for.

By the name of a model's class the Trainer shifts the labels for label smoothing, and model cards name a task.
Registering a class with the Auto classes does not enter its name there.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)


def enter(table: Any, cls: Any) -> None:
    """Add the name of a model class to a table: under its model type if that is free, otherwise under its own name."""
    config_class = getattr(cls, "config_class", None)
    if config_class is None:  # a mixin
        return
    known = {name for entry in table.values() for name in (entry if isinstance(entry, tuple) else (entry,))}
    if cls.__name__ not in known:
        model_type = config_class.model_type
        table[cls.__name__ if model_type in table else model_type] = cls.__name__


class KnownByName:
    """Mixin of all models: enters the class, and those derived from it, in one of transformers' tables."""

    known_as: Any = None
    known_loss: str | None = None
    loss_type: str | None
    config: Any
    main_input_name: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        enter(cls.known_as, cls)

    def post_init(self) -> None:
        """Finish the model, as in transformers; its loss and main input do not depend on the name of its class."""
        self.loss_type = self.known_loss
        if self.config.num_channels is not None:
            self.main_input_name = "input_values"
        super().post_init()  # type: ignore[misc]


class KnownModel(KnownByName):
    """Mixin of models without a head."""

    known_as = MODEL_MAPPING_NAMES


class KnownCausalLM(KnownByName):
    """Mixin of models that predict the next token."""

    known_as = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known_loss = "ForCausalLM"


class KnownClassifier(KnownByName):
    """Mixin of classifiers of sequences."""

    known_as = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    known_loss = "ForSequenceClassification"
