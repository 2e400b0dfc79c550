"""`series`: numeric sequences of one's own, such as measurements of sensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from ..models.feature_extractor import MimoSSMFeatureExtractor
from .collators import pad_series_right, pad_steps
from .own_files import SPLITS, Shares, find_own_files, split_of
from .series_files import ENDINGS, Columns, Series, read_series, shortened
from .series_kinds import KINDS, DecodeSeries, Kind, mean_and_std
from .task import Task, register_task

STORED = Features({"input_values": Value("binary"), "labels": Value("binary")})


@register_task("series")
def series(
    *,
    files: str | list[str] | dict[str, Any] | None = None,
    inputs: str | list[str] | None = None,
    target: str | list[str] | None = None,
    kind: str = "classification",
    group: str = "",
    time: str = "",
    indicators: bool = False,
    feature_extractor: str | None = None,
    validation_percent: int = 10,
    test_percent: int = 10,
) -> Task:
    """Your own numeric sequences (parquet, csv, tsv, npz), of any lengths and with values missing.

    A file is read in one of these forms, by what it holds:

    - a long table, with a row for each time step: `group` names the column that tells sequences apart, and `time` one
      to sort the rows of a sequence by. Without `time` they stay in their order.
    - a table with a row for each sequence and a list of numbers in each input column (parquet).
    - a table with a row for each sequence of one channel, whose steps are the input columns in their order.
    - npz: each input an array (n, L) or (n, L, C), targets (n,) or (n, K), for each step
      (n, L) or (n, L, K).

    Steps at a sequence's end that have no value at all are padding. Any other missing value becomes the last one before
    it in its channel, or the channel's mean if there is none. Each channel gets zero mean and unit variance over the
    values of train alone; targets that are numbers too, while metrics are in their own unit. A step's label
    comes from that step and those before it. What was learnt is saved
    with the model, in preprocessor_config.json: `AutoFeatureExtractor.from_pretrained(folder)` prepares new data.

    Splits that are not given are made from `train`. Which one a sequence goes to follows from a hash of its `group`, or
    without one of its values: more data move no sequence from one split to another.

    Args:
        files: a path or pattern such as `data/*.csv`, a folder, or a list of them; or a mapping of `train`,
            `validation` and `test` to these.
        inputs: names of the columns or arrays that the model reads, its channels.
        target: name of what it predicts; several for regression.
        kind: "classification" (a class for a sequence) or "regression" (numbers for a sequence) or
            "labelling" (for each step a class, or numbers where the target has fractions; missing ones do not count).
        group: column of a name for each sequence; those with one name are in one split.
        time: column to sort the rows of a sequence by.
        indicators: add a channel for each input that is 1 where its value was missing.
        feature_extractor: folder or name on the hub of a saved model whose normalisation is to be used again.
        validation_percent: sequences of a made validation split, in percent.
        test_percent: sequences of a made test split, in percent.

    Raises:
        OSError: if there is no saved feature extractor of that name.
        ValueError: if no file matches or can be read, a column is missing or not numeric, a split is empty, a target is
            missing or unknown in train, or an option is out of its range.
    """
    columns = _columns(inputs, target, kind, group, time)
    shares = Shares(validation_percent, test_percent)
    found = find_own_files("series", files, ENDINGS)
    given = {split: _checked(read_series(paths, columns), split) for split, paths in found.items()}
    splits = _in_splits(given, shares.of(list(given)))
    extractor = _extractor(splits["train"], columns.inputs, indicators, feature_extractor)
    fitted = KINDS[kind](splits["train"], columns.targets, extractor)
    return Task(
        name="series",
        **{split: _dataset(rows, fitted) for split, rows in splits.items()},
        model_kwargs={"num_channels": extractor.num_channels, **fitted.model_kwargs},
        compute_metrics=fitted.metrics,
        preprocess_logits_for_metrics=fitted.preprocess,
        metric_for_best_model=fitted.best_metric,
        greater_is_better=fitted.greater_is_better,
        problem=fitted.problem,
        collator=pad_steps if fitted.per_step else pad_series_right,
        feature_extractor=extractor,
    )


def _columns(inputs: Any, target: Any, kind: str, group: str, time: str) -> Columns:
    if kind not in KINDS:
        raise ValueError(f"kind of task 'series' must be one of {', '.join(KINDS)}; got {kind!r}")
    names = {"inputs": _names(inputs), "target": _names(target)}
    for option, value in names.items():
        if not value:
            raise ValueError(f"task 'series' needs its option {option}: one name of a column, or several")
    if both := set(names["inputs"]) & {*names["target"], group, time}:
        raise ValueError(f"{', '.join(map(repr, sorted(both)))} cannot be an input and something else at once")
    return Columns(
        inputs=names["inputs"], targets=names["target"], group=group, time=time, per_step=KINDS[kind].per_step
    )


def _names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"inputs and target of task 'series' must be names of columns; got {value!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"a column is named twice in {names}")
    return list(names)


def _checked(rows: Sequence[Series], split: str) -> Sequence[Series]:
    for row in rows:
        if not len(row.values):
            raise ValueError(f"sequence {shortened(row.key)} of {split} has no value in any channel")
        if np.isinf(row.values).any():
            raise ValueError(f"sequence {shortened(row.key)} of {split} has an infinite value")
    return rows


def _in_splits(given: Mapping[str, Sequence[Series]], shares: Mapping[str, int]) -> dict[str, list[Series]]:
    """Take the splits that are to be made out of `train`."""
    splits: dict[str, list[Series]] = {split: list(given.get(split, ())) for split in SPLITS if split != "train"}
    splits = {"train": [], **splits}
    for row in given["train"]:
        splits[split_of(row.key, shares)].append(row)
    for split, rows in splits.items():
        if not rows:
            change = f"raise {split}_percent" if split in shares else "lower validation_percent and test_percent"
            raise ValueError(
                f"split {split!r} of task 'series' has none of the {len(given.get(split, given['train']))} sequences; "
                f"{change}, or give files for it"
            )
    return splits


def _extractor(
    train: Sequence[Series], names: Sequence[str], indicators: bool, saved: str | None
) -> MimoSSMFeatureExtractor:
    channels = train[0].values.shape[1]
    if saved is not None:
        extractor = _saved_extractor(saved)
        if extractor.feature_size != channels:
            raise ValueError(f"{saved} was made for {extractor.feature_size} channels; the data have {channels}")
        return extractor
    values = np.concatenate([row.values for row in train])
    if (empty := np.flatnonzero(np.isnan(values).all(axis=0))).size:
        raise ValueError(f"an input of train has no value at all: channel {empty[0]} of {', '.join(names)}")
    mean, std = mean_and_std(values)
    named = list(names) if len(names) == channels else None
    return MimoSSMFeatureExtractor(channels, mean, std, named, indicators)


def _saved_extractor(name: str) -> MimoSSMFeatureExtractor:
    try:
        return MimoSSMFeatureExtractor.from_pretrained(name)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{name} holds no feature extractor that can be read: {error}") from error


def _dataset(rows: Sequence[Series], kind: Kind) -> Dataset:
    stored = {
        "input_values": [kind.extractor.features(row.values).tobytes() for row in rows],
        "labels": [kind.encode(row).tobytes() for row in rows],
    }
    decode = DecodeSeries(kind.extractor.num_channels, kind.dtype, kind.shape)
    return Dataset.from_dict(stored, features=STORED).with_transform(decode)
