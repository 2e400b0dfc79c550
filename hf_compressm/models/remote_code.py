"""The modelling code that saved models carry, so that they load where this package is not installed.

The files are in the folder `remote/`. `python scripts/remote_code/make.py` makes them from this package's modules, and
a test compares them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
)

from .carried_code import SavesCode, is_own, read_code, write_code
from .heads import model_classes

AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
)


class CarriesCode(SavesCode):
    """Mixin of configs: saving one, alone or with its model, also writes the code that loads it elsewhere.

    So `save_pretrained`, `push_to_hub` and the Trainer leave folders that load in two ways: with this package installed
    through transformers' Auto classes, and without it, through the same classes and `trust_remote_code=True`.
    """

    def save_code(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write the modelling code, as `SavesCode` says."""
        config_class = type(self)
        if not is_own(config_class):
            return []
        own = auto_map(config_class, getattr(self, "architectures", None) or ())
        names = {reference.rpartition(".")[2] for reference in own.values()}
        kept = {
            auto: reference
            for auto, reference in (getattr(self, "auto_map", None) or {}).items()
            if not isinstance(reference, str) or reference.rpartition(".")[2] not in names
        }
        self.auto_map = own | kept
        return write_code(folder, _code_files(config_class))


def auto_map(config_class: type, architectures: Sequence[str] = ()) -> dict[str, str]:
    """Tell which class of the modelling code each of transformers' Auto classes takes, in the form of `config.json`.

    Args:
        config_class: the config's.
        architectures: names of model classes that are taken where an Auto class has several for this config.
    """
    found = {"AutoConfig": f"{_stem(config_class)}.{config_class.__name__}"}
    for auto in AUTO_CLASSES:
        classes = model_classes(auto, config_class)
        named = [model_class for model_class in classes if model_class.__name__ in architectures]
        for model_class in (named or classes)[:1]:
            found[auto.__name__] = f"{_stem(model_class)}.{model_class.__name__}"
    return found


def modelling_code(config_class: type) -> dict[str, str]:
    """Return the files, by name, that define a config of this package and its models without this package."""
    return read_code(_code_files(config_class))


def _code_files(config_class: type) -> list[str]:
    configuration = _stem(config_class)
    return [f"{configuration}.py", f"{configuration.replace('configuration_', 'modeling_')}.py"]


def _stem(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]
