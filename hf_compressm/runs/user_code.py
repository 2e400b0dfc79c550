"""The user's own modules, imported so that what they register is known: models, adapters, tasks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def import_user_module(name: str) -> None:
    """Import a module, once; its code runs with all rights of this process.

    Args:
        name: dotted name of a module that Python can import, also from the present folder, or path of a .py file. What
            stands beside the file can be imported by it, as if it were run.

    Raises:
        ValueError: if there is no such module or file, or a file's name is that of another module.
    """
    if name.endswith(".py"):
        return _import_file(Path(name).expanduser().resolve())
    _search_first(Path.cwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # what it imports is missing, not the module itself
        raise ValueError(
            f"there is no module {name}: give one that Python can import, or the path of a .py file"
        ) from None


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    _search_first(path.parent)
    found = importlib.import_module(path.stem).__file__
    if found is None or Path(found).resolve() != path:
        raise ValueError(f"{path} has the name of another module, {found or path.stem}; rename the file")


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
