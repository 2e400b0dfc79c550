"""Data files that a run file names: which there are, what reads them, and which split a record belongs to."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers.utils import logging

from .sources import reading

logger = logging.get_logger(__name__)
SPLITS = ("train", "validation", "test")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
READERS: dict[str, dict[str, Any]] = {
    ".txt": {"path": "text"},
    ".jsonl": {"path": "json"},
    ".json": {"path": "json"},
    ".csv": {"path": "csv"},
    ".tsv": {"path": "csv", "delimiter": "\t"},
    ".parquet": {"path": "parquet"},
}
"""Arguments of `load_dataset` for files of each ending."""


@dataclass(frozen=True)
class Shares:
    """Percentages of records that go to the splits which are made.

    Raises:
        ValueError: if one is below 1, or nothing is left to train on.
    """

    validation: int = 5
    test: int = 5

    def __post_init__(self) -> None:
        if min(self.validation, self.test) < 1 or self.validation + self.test >= 100:
            raise ValueError(
                "validation_percent and test_percent must be at least 1 and together below 100; got "
                f"{self.validation} and {self.test}"
            )

    def of(self, given: Sequence[str]) -> dict[str, int]:
        """Return split -> percent for those splits that are not given."""
        return {name: percent for name, percent in vars(self).items() if name not in given}


def split_of(key: bytes, shares: Mapping[str, int]) -> str:
    """Return the split that a record belongs to: a name in `shares`, or "train".

    It follows from a hash of the key alone, so a record stays where it is when others are added, on every machine.

    Args:
        key: what the record is told apart by; records with one key stay together.
        shares: split -> percent of all keys.
    """
    percent = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 100
    for name, share in shares.items():
        if percent < share:
            return name
        percent -= share
    return "train"


def find_own_files(task: str, files: Any, endings: Sequence[str]) -> dict[str, list[str]]:
    """Find the files that the option `files` of a task names.

    Args:
        task: the task's name, for errors.
        files: a path or pattern such as `data/*.csv`, several of them, or a mapping of splits to these. A folder stands
            for the files in it that have one of the endings.
        endings: those that the task reads.

    Returns:
        split -> paths, each once, sorted where a pattern or folder gives them; "train" alone for files without a split.
        A file that is in several splits is warned about.

    Raises:
        ValueError: if nothing is given, no file matches, all are empty, one has another ending or several endings are
            mixed, or there is an unknown split or none to train on.
    """
    if not files:
        raise ValueError(
            f"task {task!r} needs its option files: a path, a pattern such as data/*{endings[0]}, a list of them, or a "
            f"mapping of {', '.join(SPLITS)} to these"
        )
    named = files if isinstance(files, Mapping) else {"train": files}
    if unknown := [split for split in named if split not in SPLITS]:
        raise ValueError(f"files of task {task!r}: there is no split {unknown[0]!r}; splits are {', '.join(SPLITS)}")
    if "train" not in named:
        raise ValueError(f"files of task {task!r} name {', '.join(named)}, but no files to train on: add train")
    found = {split: _found(task, patterns, endings) for split, patterns in named.items()}
    places: dict[Path, str] = {}
    for split, paths in found.items():
        for path in paths:
            if (other := places.setdefault(Path(path).resolve(), split)) != split:
                logger.warning(
                    f"files of task {task!r}: {path} is in {other} and in {split}, so what is measured is known"
                )
    return found


def _found(task: str, patterns: Any, endings: Sequence[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"files of task {task!r} must be paths or patterns; got {patterns!r}")
    found = list(dict.fromkeys(file for pattern in patterns for file in _matches(task, pattern, endings)))
    for file in found:
        if file_ending(file) not in endings:
            raise ValueError(f"task {task!r} cannot read {file}: it reads {', '.join(endings)}")
    if len(kinds := sorted({file_ending(file) for file in found})) > 1:
        raise ValueError(f"the files of task {task!r} end in {' and '.join(kinds)}; give one kind of them")
    if not any(Path(file).stat().st_size for file in found):
        raise ValueError(f"task {task!r}: {', '.join(found[:3])} {'is' if len(found) == 1 else 'are'} empty")
    return found


def _matches(task: str, pattern: str, endings: Sequence[str]) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [str(file) for file in sorted(path.iterdir()) if file.is_file() and file_ending(file.name) in endings]
    else:
        found = [str(path)] if path.is_file() else sorted(filter(_is_file, glob.glob(str(path), recursive=True)))
    if not found:
        raise ValueError(
            f"task {task!r}: no file matches {pattern!r} (from the folder {Path.cwd()}); it reads {', '.join(endings)}"
        )
    return found


def _is_file(path: str) -> bool:
    return Path(path).is_file()


def file_ending(path: str) -> str:
    """Return the ending that says how to read a file: of a compressed one, that of what is compressed."""
    name = Path(path)
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def read_own_files(files: Sequence[str], streaming: bool = False, **options: Any) -> Any:
    """Read files of one ending with `datasets`, which keeps what it reads in its cache unless it streams.

    Args:
        files: paths.
        streaming: read while iterating, and keep nothing.
        options: further arguments of the reader.

    Returns:
        a `Dataset`, or with `streaming` an `IterableDataset`.

    Raises:
        ValueError: if a file is not what its ending says.
    """
    reader = READERS[file_ending(files[0])] | options
    with reading(f"{named_files(files)} cannot be read as {reader['path']}"):
        found = load_dataset(**reader, data_files=list(files), split="train", streaming=streaming)
        return found if not streaming or found.column_names else found._resolve_features()


def named_files(files: Sequence[str]) -> str:
    """Name files in a message: the first, and how many more there are."""
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
