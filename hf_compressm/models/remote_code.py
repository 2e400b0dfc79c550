"""The modelling code that saved models carry, so that they load where this package is not installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .bundle import PACKAGE, Bundle, Reference
from .heads import model_classes

AUTO_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)

_OPS = {"causal_conv": "causal_conv", "selective_scan": "selective_scan", "ssd_scan": "ssd_scan"}
_OPS |= {"diag_system": "diag_scan"}
_STAND_INS: dict[Reference, Reference] = {
    (f"{PACKAGE}.ops.{module}", name): (f"{PACKAGE}.models.torch_ops", name) for name, module in _OPS.items()
}
_STAND_INS[(__name__, "CarriesCode")] = (f"{PACKAGE}.models.torch_ops", "CarriesCode")

_TITLE = """{what}

Written by {package}{version} from its own sources: plain PyTorch that needs torch and transformers only. Where the
package is installed, models load with its faster classes instead. License: Apache-2.0.
"""


class CarriesCode:
    """Mixin of configs: saving one, alone or with its model, also writes the code that loads it elsewhere.

    So `save_pretrained`, `push_to_hub` and the Trainer leave folders that load in two ways: with this package installed
    through transformers' Auto classes, and without it, through the same classes and `trust_remote_code=True`.
    """

    auto_map: dict[str, str]

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, and the modelling code beside the config, which names it in `auto_map`.

        Raises:
            OSError: if the folder cannot be written to, or this package was installed without its sources.
        """
        # The code first: a config that names files which are not there would not load.
        self.save_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)  # type: ignore[attr-defined]

    def save_code(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write the modelling code into a folder and name it in `auto_map`; the names of the files.

        Nothing is written for a class that is derived from this package's: its own code is not known here, and
        transformers' `register_for_auto_class` serves it.

        Raises:
            OSError: if the folder cannot be written to, or this package was installed without its sources.
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
    """Which class of the modelling code each of transformers' Auto classes takes, as `config.json` says it.

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
    """The files, by name, that define a config of this package and its models without this package.

    Raises:
        FileNotFoundError: if this package was installed without its sources.
    """
    return dict(_written(config_class.__module__, config_class.__name__.removesuffix("Config")))


@cache
def _written(configuration: str, name: str) -> dict[str, str]:
    modelling = configuration.replace(".configuration_", ".modeling_")
    written = {}
    for module, what in ((configuration, "Configuration"), (modelling, "Models")):
        siblings = frozenset({configuration} - {module})
        title = _TITLE.format(what=f"{what} of {name}.", package=PACKAGE, version=_version())
        written[f"{module.rpartition('.')[2]}.py"] = Bundle(_STAND_INS, siblings).write(module, title)
    return written


def _stem(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


def _version() -> str:
    try:
        return f" {version(PACKAGE)}"
    except PackageNotFoundError:  # run from a checkout
        return ""
