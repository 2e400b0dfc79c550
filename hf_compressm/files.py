"""Output folders and files that are complete or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
"""Ending of the name of a file that is still being written."""


def checked_output(output: Path, model: str, overwrite: bool) -> Path:
    """The output folder's full path.

    Raises:
        OSError: if it is a file, cannot be made, or is not empty and may not be replaced.
    """
    output, source = output.expanduser().resolve(), Path(model).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; the output must be a folder")
    if source.exists() and (output == source or output in source.parents):
        raise FileExistsError(f"{output} is or holds the model that is to be read; choose another folder")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{output} is not empty; choose another folder or pass --overwrite")
        if not (output / "config.json").exists():
            raise FileExistsError(f"{output} holds no model that --overwrite could replace; choose another folder")
    present = next(folder for folder in output.parents if folder.exists())
    if not os.access(present, os.W_OK):
        raise PermissionError(f"{present} cannot be written to")
    return output


@contextmanager
def new_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """A path to write a file to. It is renamed to `path` when the block ends without an error, and removed otherwise.

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
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that takes its name, and the place of what had it, when the block ends without an error."""
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
