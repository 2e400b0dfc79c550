"""The user's own modules, imported so that what they register is known: models, adapters, tasks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def import_user_module(name: str) -> None:
    """Import a module, once; its code runs with all rights of this process.

    Args:
        name: dotted name of a module that Python can import, also from the present folder, or path of a .py file. What
            stands beside the file can be imported by it, as if it were run.

    Raises:
        ValueError: if there is no such module or file, a file's name is that of another module, or the import fails.
    """
    if name.endswith(".py"):
        return _import_file(Path(name).expanduser().resolve())
    _search_first(Path.cwd())
    _import_module(name, name)


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    _search_first(path.parent)
    found = _import_module(path.stem, str(path)).__file__
    if found is None or Path(found).resolve() != path:
        raise ValueError(f"{path} has the name of another module, {found or path.stem}; rename the file")


def _import_module(name: str, shown: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):  # the module itself, not what it imports
            raise ValueError(
                f"there is no module {name}: give one that Python can import, or the path of a .py file"
            ) from None
        raise ValueError(f"{shown} cannot be imported: {type(error).__name__}: {error}") from error
    if getattr(module, "__file__", None) is None and hasattr(module, "__path__"):
        raise ValueError(f"{shown} is a folder without an __init__.py: give a module in it, or the path of a .py file")
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
