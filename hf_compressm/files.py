"""Check output files and folders before the work, and write folders that are complete or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .moved import old_names

__getattr__ = old_names(__name__)

PARTIAL_SUFFIX = ".partial"
"""Ending of the name of a file that is still being written."""


def check_output(output: Path, model: str, overwrite: bool) -> Path:
    """Return the full path of a folder that a model can be written to.

    Args:
        output: the folder; it need not exist.
        model: folder of the model that is to be read, or its name on the hub.
        overwrite: whether a model that the folder holds may be replaced.

    Raises:
        OSError: if it is a file, cannot be made or written to, is or holds the model that is to be read, or is not
            empty and may not be replaced.
    """
    output = check_folder(output)
    check_apart(output, model)
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{output} is not empty; choose another folder or pass --overwrite")
        if not (output / "config.json").exists():
            raise FileExistsError(f"{output} holds no model that --overwrite could replace; choose another folder")
    return output


def check_folder(folder: Path) -> Path:
    """Return the full path of a folder that can be made and written to.

    Raises:
        OSError: if it is a file, or it, or the folder that it is to be made in, cannot be written to.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; the output must be a folder")
    present = next(place for place in (folder, *folder.parents) if place.exists())
    if not present.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made: {present} is a file")
    _check_writable(present)
    return folder


RUN_FILES = ("trainer_state.json", "finetuning.json", "checkpoint-*")
"""What tells that a run of training has written a folder."""


def check_run_folder(folder: Path) -> Path:
    """Return the full path of a folder for a run of training: a new one, or that of an earlier run.

    Raises:
        OSError: as `check_folder`, and if it holds a model that no run has written there.
    """
    folder = check_folder(folder)
    if (folder / "config.json").is_file() and not any(any(folder.glob(name)) for name in RUN_FILES):
        raise FileExistsError(f"{folder} holds a model that no run of training wrote there; choose another folder")
    return folder


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """After an error, remove a folder, and those above it, if they were made since the block began and are empty."""
    folder = folder.expanduser().resolve()
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # what is not empty stays, with all that is above it
            for place in absent:
                place.rmdir()
        raise


def check_file(file: Path) -> Path:
    """Return the full path of a file that can be written.

    Raises:
        OSError: if it is a folder, or its own folder does not exist or cannot be written to.
    """
    file = file.expanduser().resolve()
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; the output must be a file")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent} to write {file.name} to")
    _check_writable(file.parent)
    return file


def check_apart(output: Path, model: str) -> None:
    """Refuse to write over what is to be read.

    Raises:
        FileExistsError: if the output folder is, or holds, the folder of the model.
    """
    output, source = output.expanduser().resolve(), Path(model).expanduser().resolve()
    if source.exists() and (output == source or output in source.parents):
        raise FileExistsError(f"{output} is or holds the model that is to be read; choose another folder")


def check_name(name: str, what: str) -> None:
    """Refuse a path that does not exist, which transformers would look for on the hub.

    Args:
        name: folder, or a name on the hub: `name` or `namespace/name`.
        what: noun for the message, for example "model".

    Raises:
        FileNotFoundError: if it cannot be a name on the hub and there is no such folder.
    """
    if Path(name).expanduser().exists():
        return
    parts = name.split("/")
    if len(parts) > 2 or parts[0] in ("", ".", "..", "~") or not parts[-1]:
        raise FileNotFoundError(f"there is no folder {name} to read the {what} from")


def write_json(path: Path, content: Any) -> None:
    """Write a value as JSON that people can read.

    Raises:
        OSError: if the file cannot be written.
    """
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not tell
            return
    except OSError as error:
        raise PermissionError(f"{folder} cannot be written to") from error


@contextmanager
def new_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """Give a path to write to. It is renamed to `path` when the block ends without an error, and removed otherwise.

    Nobody reads a half-written file, and an earlier file of that name stays until the new one is complete.

    Args:
        path: the file's name in the end; its folder exists.
        durable: whether the content must be on the disk before the file is renamed.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file or folder is on the disk.

    Raises:
        OSError: if there is no such file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder that takes the name `output`, and the place of what had it, when the block ends without an error.

    After an error nothing is left of it, and what had the name keeps it.

    Raises:
        OSError: if the folder cannot be made or renamed.
    """
    partial, replaced = (output.with_name(f".{output.name}.{kind}-{os.getpid()}") for kind in ("partial", "replaced"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rename(replaced)
        try:
            partial.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
