"""Read numeric sequences from tables and arrays. L length, C channels, K targets."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .own_files import file_ending, named_files, read_own_files
from .series_time import at_equal_steps
from .sources import reading

ENDINGS = (".parquet", ".csv", ".tsv", ".npz")


@dataclass(frozen=True)
class Series:
    """A sequence as it stands in a file.

    Attributes:
        key: what it is told apart by.
        values: (L, C) float64, NaN where missing.
        target: (K,) objects, or (L, K) where there is a target for each step.
    """

    key: bytes
    values: np.ndarray
    target: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a file's columns, or arrays, are.

    Attributes:
        inputs: names of the channels.
        targets: names of what is to be predicted; none if these are channels.
        group: the sequence that a row belongs to, or what a whole sequence is told apart by; may be empty.
        time: by which the rows of a sequence are sorted; may be empty.
        per_step: whether there is a target for each step.
        equal_steps: whether rows are put at equal steps of time, see `at_equal_steps`. Without `group` and `time` a
            table is then one sequence.
    """

    inputs: Sequence[str]
    targets: Sequence[str] = ()
    group: str = ""
    time: str = ""
    per_step: bool = False
    equal_steps: bool = False

    @property
    def all(self) -> list[str]:
        """Every name once."""
        return list(dict.fromkeys([*self.inputs, *self.targets, *filter(None, (self.group, self.time))]))


def read_series(paths: Sequence[str], columns: Columns) -> list[Series]:
    """Read sequences of parquet, csv, tsv or npz files, in the order of the files.

    Steps at the end where all channels are missing are left out: they are padding.

    Raises:
        ValueError: if a file lacks a column, an input is not numeric, a target of a whole sequence changes within it,
            or lengths within a sequence differ.
    """
    where = named_files(paths)
    if file_ending(paths[0]) == ".npz":
        found = [series for path in paths for series in _of_arrays(path, columns)]
    else:
        dataset = read_own_files(paths)
        _require(columns, dataset.column_names, where)
        found = list(_of_table(dataset.select_columns(columns.all).to_pandas(), columns, where))
    return [_without_padding(series, columns.per_step) for series in found]


def _require(columns: Columns, present: Sequence[str], where: str) -> None:
    if missing := [name for name in columns.all if name not in present]:
        raise ValueError(f"{where} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(present)}")


def _of_table(table: Any, columns: Columns, where: str) -> Iterator[Series]:
    if not len(table):
        raise ValueError(f"{where} has no rows")
    for name in filter(None, (columns.group, columns.time)):
        if empty := int(table[name].isna().sum()):
            raise ValueError(f"{empty} rows of {where} have no value in {name!r}")
    if isinstance(table[columns.inputs[0]].iloc[0], (list, np.ndarray)):
        yield from _of_lists(table, columns, where)
    elif columns.group or columns.time or columns.equal_steps:
        groups = table.groupby(columns.group, sort=False) if columns.group else [("", table)]
        for name, rows in groups:
            place = f"{where}, {columns.group} {name}" if columns.group else where
            rows = _ordered(rows, columns, place)
            values = np.stack([_numbers(rows[name], name, where) for name in columns.inputs], axis=1)
            yield Series(str(name).encode(), values, _target(rows, columns, place))
    else:
        if columns.per_step:
            raise ValueError(
                f"{where} has numbers in {columns.inputs[0]!r}: name the column that tells sequences apart (group), or "
                "the one that rows are sorted by (time)"
            )
        values = np.stack([_numbers(table[name], name, where) for name in columns.inputs], axis=1)
        targets = table[list(columns.targets)].to_numpy(dtype=object)
        for row, target in zip(values, targets, strict=True):
            yield Series(row.tobytes(), row[:, None], target)


def _ordered(rows: Any, columns: Columns, place: str) -> Any:
    if not columns.time:
        return rows
    if columns.equal_steps:
        return at_equal_steps(rows, columns.time, place)
    return rows.sort_values(columns.time, kind="stable")


def _of_lists(table: Any, columns: Columns, where: str) -> Iterator[Series]:
    """One row for each sequence, with a list in every input column."""
    for number, (_, row) in enumerate(table.iterrows()):
        lists = [*columns.inputs, *(columns.targets if columns.per_step else ())]
        lengths = {name: len(row[name]) if np.ndim(row[name]) else None for name in lists}
        if None in lengths.values() or len(set(lengths.values())) != 1:
            raise ValueError(f"{where}, row {number}: columns need lists of one length; got {lengths}")
        values = np.stack([_numbers(row[name], name, where) for name in columns.inputs], axis=1)
        key = str(row[columns.group]).encode() if columns.group else values.tobytes()
        steps = [np.asarray(row[name]) for name in lists[len(columns.inputs) :]]
        target = np.stack(steps, axis=1) if columns.per_step and steps else row[list(columns.targets)].to_numpy()
        yield Series(key, values, target)


def _of_arrays(path: str, columns: Columns) -> Iterator[Series]:
    """Arrays (n, L) or (n, L, C) of inputs, (n,), (n, K), (n, L) or (n, L, K) of targets, and (n,) of groups."""
    found = _load_arrays(path, columns)
    _check_arrays(path, columns, found)
    inputs = [found[name] for name in columns.inputs]
    values = np.concatenate([a[..., None] if a.ndim == 2 else a for a in inputs], axis=2).astype(np.float64)
    plain = 2 if columns.per_step else 1
    targets = [found[name] if found[name].ndim > plain else found[name][..., None] for name in columns.targets]
    target = np.concatenate(targets, axis=-1) if targets else np.zeros((len(values), 0))
    for number, row in enumerate(values):
        key = str(found[columns.group][number]).encode() if columns.group else row.tobytes()
        yield Series(key, row, target[number])


def _load_arrays(path: str, columns: Columns) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} cannot be read as npz: it is no archive of arrays, or its end is missing")
    found = {}
    with reading(f"{path} cannot be read as npz"):
        arrays = np.load(path, allow_pickle=False)
    with arrays:
        _require(columns, list(arrays), path)
        for name in columns.all:
            with reading(f"array {name!r} of {path} cannot be read as numbers or text"):
                found[name] = np.asarray(arrays[name])
    return found


def _check_arrays(path: str, columns: Columns, found: dict[str, np.ndarray]) -> None:
    """Check the arrays against each other, and that inputs are numbers."""
    shapes = {name: array.shape for name, array in found.items()}
    if len(first := {shape[:1] for shape in shapes.values()}) != 1 or first & {(), (0,)}:
        raise ValueError(f"{path}: the first axis of all arrays must have one length, at least 1; got {shapes}")
    if any(found[name].ndim not in (2, 3) or found[name].dtype.kind not in "biuf" for name in columns.inputs):
        raise ValueError(f"{path}: inputs must be numbers of shape (n, L) or (n, L, C); got {shapes}")
    steps = {shapes[name][:2] for name in [*columns.inputs, *(columns.targets if columns.per_step else ())]}
    if len(steps) != 1:
        raise ValueError(f"{path}: inputs, and targets of steps, must have one length L; got {shapes}")
    if not columns.per_step and any(found[name].ndim > 2 for name in columns.targets):
        raise ValueError(f"{path}: a target of whole sequences must have shape (n,) or (n, K); got {shapes}")


def _numbers(cells: Any, name: str, where: str) -> np.ndarray:
    values = pd.to_numeric(pd.Series(np.asarray(cells)), errors="coerce").to_numpy(dtype=np.float64)
    if (np.isnan(values) & ~pd.isna(pd.Series(np.asarray(cells))).to_numpy()).any():
        raise ValueError(f"column {name!r} of {where} holds what is not a number")
    return values


def _target(rows: Any, columns: Columns, place: str) -> np.ndarray:
    if columns.per_step:
        return rows[list(columns.targets)].to_numpy(dtype=object)
    for name in columns.targets:
        if rows[name].nunique(dropna=False) > 1:
            raise ValueError(
                f"{place}: {name!r} has several values in one sequence; for a target of each step set kind: labelling"
            )
    return rows[list(columns.targets)].iloc[0].to_numpy(dtype=object)


def _without_padding(series: Series, per_step: bool) -> Series:
    real = np.flatnonzero(~np.isnan(series.values).all(axis=1))
    end = real[-1] + 1 if len(real) else 0
    return Series(series.key, series.values[:end], series.target[:end] if per_step else series.target)


def shortened(key: bytes) -> str:
    """Name a sequence in a message: its key if that can be read."""
    text = key.decode(errors="replace")
    return text if text.isprintable() and len(text) < 40 else hashlib.sha256(key).hexdigest()[:8]
