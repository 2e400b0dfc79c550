"""The modelling code that saved models carry, so that they load where this package is not installed.

The files are in the folder `remote/`. `python scripts/remote_code/make.py` makes them from this package's modules, and
a test compares them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .heads import model_classes

PACKAGE = __name__.partition(".")[0]
AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)


class CarriesCode:
    """Mixin of configs: saving one, alone or with its model, also writes the code that loads it elsewhere.

    So `save_pretrained`, `push_to_hub` and the Trainer leave folders that load in two ways: with this package installed
    through transformers' Auto classes, and without it, through the same classes and `trust_remote_code=True`.
    """

    auto_map: dict[str, str]

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config as transformers does, with the modelling code beside it, named in `auto_map`.

        Raises:
            OSError: if the folder cannot be written to.
        """
        # The code first: a config that names files which are not there would not load.
        self.save_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)  # type: ignore[attr-defined]

    def save_code(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write the modelling code into a folder, name it in `auto_map`, and return the names of the files.

        Nothing is written for a class that is derived from this package's: its own code is not known here. Its author
        can call transformers' `register_for_auto_class`.

        Raises:
            OSError: if the folder cannot be written to.
        """
        config_class = type(self)
        if not config_class.__module__.startswith(f"{PACKAGE}.models."):
            return []
        own = auto_map(config_class, getattr(self, "architectures", None) or ())
        names = {reference.rpartition(".")[2] for reference in own.values()}
        kept = {
            auto: reference
            for auto, reference in (getattr(self, "auto_map", None) or {}).items()
            if not isinstance(reference, str) or reference.rpartition(".")[2] not in names
        }
        self.auto_map = own | kept
        written = modelling_code(config_class)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return list(written)


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
    configuration = _stem(config_class)
    names = (f"{configuration}.py", f"{configuration.replace('configuration_', 'modeling_')}.py")
    folder = files(__package__) / "remote"
    return {name: (folder / f"{name}.txt").read_text("utf-8") for name in names}


def _stem(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]
