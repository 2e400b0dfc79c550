"""Names of model classes in the tables by which transformers decides what a model is for.

By the name of a model's class the Trainer shifts the labels for label smoothing, and model cards name a task.
Registering a class with the Auto classes does not enter its name there.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)


def enter(names: Any, cls: Any) -> None:
    """Add a model class's name to a table, by model type if that is free, by its own name otherwise."""
    config_class = getattr(cls, "config_class", None)
    if config_class is None:  # a mixin
        return
    known = {name for entry in names.values() for name in (entry if isinstance(entry, tuple) else (entry,))}
    if cls.__name__ not in known:
        model_type = config_class.model_type
        names[cls.__name__ if model_type in names else model_type] = cls.__name__


class KnownCausalLM:
    """Mixin: transformers knows the class, and those derived from it, as models that predict the next token."""

    loss_type: str | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        enter(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, cls)

    def post_init(self) -> None:
        self.loss_type = "ForCausalLM"  # transformers goes by the class's name otherwise
        super().post_init()  # type: ignore[misc]


class KnownClassifier:
    """Mixin: transformers knows the class, and those derived from it, as classifiers of sequences."""

    loss_type: str | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        enter(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, cls)

    def post_init(self) -> None:
        self.loss_type = "ForSequenceClassification"  # transformers goes by the class's name otherwise
        super().post_init()  # type: ignore[misc]
