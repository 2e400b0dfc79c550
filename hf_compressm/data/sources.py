"""Load data sets from the hub, its cache or a local folder; errors say what to do if they are not there."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, load_dataset

READERS: dict[str, dict[str, Any]] = {
    ".parquet": {"path": "parquet"},
    ".txt": {"path": "text", "keep_linebreaks": True},
}
"""Arguments of `load_dataset` for files of each ending."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Give any error of a reader one form, whose message begins with `what` and ends with the reason.

    Args:
        what: such as "data.csv cannot be read as csv".

    Raises:
        ValueError: instead of any other exception.
    """
    try:
        yield
    except Exception as error:  # each library has its own; of `datasets`, what is wrong stands in the cause
        reason = str(error.__cause__ or error) or type(error).__name__
        raise ValueError(f"{what}: {'it has no rows' if 'corresponds to no data' in reason else reason}") from error


def load_from_hub(
    name: str, repo: str, splits: Sequence[str], columns: Sequence[str], config: str | None = None
) -> dict[str, Dataset]:
    """Load the splits of a data set from the Hugging Face Hub or its cache.

    Args:
        name: the task's name, for the error.
        repo: the data set's name on the hub.
        splits, columns: what the task reads, for the error.
        config: which of the data set's configurations; None if it has one only.

    Raises:
        ConnectionError: if it cannot be loaded; the message says what to do instead.
    """
    try:
        return load_dataset(repo, config)
    except Exception as error:  # the hub's clients have many classes that all mean "cannot be had"
        files = " and ".join(f"{split}-*.parquet" for split in splits)
        raise ConnectionError(
            f"Task {name!r}: could not load the data set {repo!r} from the Hugging Face Hub or from "
            f"the cache {datasets.config.HF_DATASETS_CACHE} ({type(error).__name__}: {error}). Without a "
            f"connection, either pass --data_dir FOLDER with the files {files} of the data set repository {repo!r} "
            f"(columns {' and '.join(map(repr, columns))}), or set HF_HOME to a cache in which it has been loaded "
            "before."
        ) from error


def load_from_folder(
    data_dir: str | os.PathLike[str], splits: Sequence[str], endings: Sequence[str] = (".parquet",)
) -> dict[str, Dataset]:
    """Load the splits of a data set from a folder, as `find_splits` finds them.

    Raises:
        ValueError: if files of several endings make up the data set or they cannot be read, and as `find_splits` does.
        FileNotFoundError: if `data_dir` is not a folder.
    """
    found = find_splits(data_dir, splits, endings)
    files = {split: [str(file) for file in found[split]] for split in splits}
    kinds = sorted({file.suffix for split in splits for file in found[split]})
    if len(kinds) > 1:
        raise ValueError(f"the files of {data_dir} end in {' and '.join(kinds)}; keep one kind of them")
    with reading(f"the files of {data_dir} cannot be read as {READERS[kinds[0]]['path']}"):
        return load_dataset(**READERS[kinds[0]], data_files=files)


def find_splits(
    data_dir: str | os.PathLike[str], splits: Sequence[str], endings: Sequence[str] = (".parquet",)
) -> dict[str, list[Path]]:
    """Find the files of each split in a folder, or in the one sub-folder that has them.

    A file belongs to the split that its name starts with: `train.parquet` and `train-00000-of-00002.parquet`
    are both of the split `train`.

    Raises:
        FileNotFoundError: if `data_dir` is not a folder.
        ValueError: if no folder holds all of `splits`, or several sub-folders do.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir is not a folder: {root}")
    nested = sorted(path for path in root.iterdir() if path.is_dir())
    found = {folder: files for folder in (root, *nested) if (files := _splits_in(folder, endings))}
    complete = [folder for folder, files in found.items() if set(splits) <= set(files)]
    if root in complete:
        return found[root]
    if len(complete) == 1:
        return found[complete[0]]
    if complete:
        names = ", ".join(folder.name for folder in complete)
        raise ValueError(f"several folders in {root} hold a data set: {names}; pass one of them as data_dir")
    seen = "; ".join(f"{sorted(files)} in {folder}" for folder, files in found.items())
    wanted = " or ".join(", ".join(f"{split}-*{ending}" for split in splits) for ending in endings)
    raise ValueError(f"data_dir needs {wanted}, in {root} or one folder below; found {seen or 'no such files'}")


def _splits_in(folder: Path, endings: Sequence[str]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in endings:
            splits.setdefault(file.stem.partition("-")[0], []).append(file)
    return splits


def require_columns(dataset: Dataset, columns: Sequence[str], where: str) -> None:
    """Check that a data set has these columns.

    Raises:
        ValueError: if one of them is missing; the message names those that there are.
    """
    if missing := sorted(set(columns) - set(dataset.column_names)):
        raise ValueError(f"{where} has no column {missing}; its columns are {dataset.column_names}")


def check_labels(labels: np.ndarray, num_labels: int, where: str) -> None:
    """Check that there are labels, and that all lie in [0, num_labels).

    Raises:
        ValueError: otherwise; the message names the range that was found.
    """
    if len(labels) == 0 or not (labels.min() >= 0 and labels.max() < num_labels):  # a missing one is NaN
        found = f"[{labels.min()}, {labels.max()}]" if len(labels) else "none"
        raise ValueError(f"{where}: labels must lie in [0, {num_labels - 1}], found {found}")


def no_hub(name: str, data_dir: str | os.PathLike[str] | None, files: Sequence[str]) -> str | os.PathLike[str]:
    """Return the folder that was given for a task of the Long Range Arena's release, which the hub does not have.

    Raises:
        ValueError: if none was given; the message says where the files are.
    """
    if data_dir is None:
        raise ValueError(
            f"task {name!r} needs --data_dir FOLDER with {', '.join(files)}, from lra_release.gz of "
            "https://github.com/google-research/long-range-arena"
        )
    return data_dir


def find_files(data_dir: str | os.PathLike[str], names: Sequence[str]) -> list[Path]:
    """Find the files of these names in a folder, or in the one sub-folder that has them all.

    Raises:
        FileNotFoundError: if `data_dir` is not a folder.
        ValueError: if no folder holds all of them, or several sub-folders do.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir is not a folder: {root}")
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    complete = [folder for folder in folders if all((folder / name).is_file() for name in names)]
    if not complete:
        missing = [name for name in names if not any((folder / name).is_file() for folder in folders)]
        raise ValueError(f"data_dir needs {', '.join(names)} in {root} or one folder below; missing: {missing}")
    if complete[0] != root and len(complete) > 1:
        shown = ", ".join(folder.name for folder in complete)
        raise ValueError(f"several folders in {root} hold a data set: {shown}; pass one of them as data_dir")
    return [complete[0] / name for name in names]


def read_tsv(file: Path, columns: Features, header: bool, encoding: str = "utf-8") -> Dataset:
    """Read a file of values between tabs. Quotes have no meaning, and no word stands for a missing value.

    Args:
        file: the file.
        columns: names and types, in the order of the file where it has no header.
        header: whether the first line names the columns.
        encoding: of the text.

    Raises:
        ValueError: if the file does not have these columns.
    """
    with reading(f"{file} cannot be read as columns {', '.join(columns)} between tabs"):
        return load_dataset(
            "csv",
            data_files={"train": str(file)},
            split="train",
            delimiter="\t",
            column_names=None if header else list(columns),
            features=columns,
            quoting=csv.QUOTE_NONE,
            keep_default_na=False,
            lineterminator="\n",
            encoding=encoding,
        )
