"""Saving an object together with the code that loads it where this package is not installed.

The code is in the folder `remote/`, which `python scripts/remote_code/make.py` makes from this package's modules.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

PACKAGE = __name__.partition(".")[0]
EXTRACTOR_CODE = "feature_extraction_mimo_ssm"
"""Name of the module that has the feature extractor in the code that travels."""


class SavesCode:
    """Mixin of what transformers saves and pushes: saving it also writes its code."""

    auto_map: dict[str, Any]

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as transformers does, with the code beside it, named in `auto_map`.

        Raises:
            OSError: if the folder cannot be written to.
        """
        # The code first: a file that names code which is not there would not load.
        self.save_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)  # type: ignore[attr-defined]

    def save_code(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write the code into a folder, name it in `auto_map`, and return the names of the files.

        Nothing is written for a class that is derived from this package's: its own code is not known here. Its author
        can call transformers' `register_for_auto_class`.

        Raises:
            OSError: if the folder cannot be written to.
        """
        raise NotImplementedError


class CarriesExtractorCode(SavesCode):
    """Mixin of the feature extractor: it loads with this package, and without it by `trust_remote_code=True`."""

    def save_code(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write the code, as `SavesCode` says."""
        if not is_own(type(self)):
            return []
        self.auto_map = {"AutoFeatureExtractor": f"{EXTRACTOR_CODE}.{type(self).__name__}"}
        return write_code(folder, [f"{EXTRACTOR_CODE}.py"])


def is_own(cls: type) -> bool:
    """Whether a class is one of this package's models, configs or feature extractors, and not derived from one."""
    return cls.__module__.startswith(f"{PACKAGE}.models.")


def read_code(names: Sequence[str]) -> dict[str, str]:
    """Return files of the code that travels, by their names in a saved model's folder."""
    folder = files(__package__) / "remote"
    return {name: (folder / f"{name}.txt").read_text("utf-8") for name in names}


def write_code(folder: str | os.PathLike[str], names: Sequence[str]) -> list[str]:
    """Write files of the code that travels into a folder, made if need be; returns their names.

    Raises:
        OSError: if the folder cannot be written to.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in read_code(names).items():
        (Path(folder) / name).write_text(text, encoding="utf-8")
    return list(names)
