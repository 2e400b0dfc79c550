"""`stdlib_bytes`: a byte-level language model of the source of Python's own standard library. Needs no network."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .language import packed_bytes
from .own_files import split_of
from .packing import Encoder
from .task import Task, register_task

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SHARES = {"validation": 5, "test": 5}
"""Percent of the files; the rest is to train on."""


@register_task("stdlib_bytes")
def stdlib_bytes(*, length: int = 256, evaluation_bytes: int = 65536) -> Task:
    """Read the `.py` files of the running Python's standard library, without its tests, as sequences of bytes.

    Which split a file belongs to follows from a hash of its path, so it is the same on every machine; the files differ
    between versions of Python.

    Args:
        length: bytes of a sequence, >= 2.
        evaluation_bytes: size of the validation split and of the test split, in bytes, spread evenly over its files.

    Raises:
        ValueError: if an option is out of its range.
    """
    if length < 2 or evaluation_bytes < length:
        raise ValueError(
            f"length must be at least 2 and evaluation_bytes at least length; got {length} and {evaluation_bytes}"
        )
    documents = _documents()
    splits = {name: packed_bytes(documents[name], length) for name in documents}
    for name in SHARES:
        count = min(len(splits[name]), evaluation_bytes // length)
        splits[name] = splits[name].select([index * len(splits[name]) // count for index in range(count)])
    return Encoder().task("stdlib_bytes", splits)


def _documents() -> dict[str, list[bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for path in sorted(_sources(root)):
        if content := path.read_bytes():
            found[split_of(path.relative_to(root).as_posix().encode(), SHARES)].append(content)
    return found


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))
