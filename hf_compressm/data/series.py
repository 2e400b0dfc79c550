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
from .series_forecasting import QUANTILES, Forecasting
from .series_kinds import KINDS, DecodeSeries, Kind, mean_and_std
from .series_windows import Windows, parts_in_time
from .task import Task, register_task

FORECASTING = "forecasting"
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
    context: int = 0,
    horizon: int = 0,
    stride: int = 0,
    season: int = 0,
    quantiles: list[float] | None = None,
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

    To forecast (`kind: forecasting`), windows of `context` and `horizon` steps are cut out of each series. Its rows are
    put in the order of `time`, in equal steps, with missing values where rows are missing. Splits that are not given
    are made in time: the last part of each series is test, and the part before it validation. Nothing of them is in the
    normalisation or in a window to train on; their own windows read what comes before them.

    For the other kinds splits that are not given are made from `train`. Which one a sequence goes to follows from a
    hash of its `group`, or without one of its values: more data move no sequence from one split to another.

    Args:
        files: a path or pattern such as `data/*.csv`, a folder, or a list of them; or a mapping of `train`,
            `validation` and `test` to these.
        inputs: names of the columns or arrays that the model reads, its channels. Targets of a forecast are among them
            anyway.
        target: name of what it predicts; several for regression and forecasting.
        kind: "classification" (a class for a sequence) or "regression" (numbers for a sequence) or
            "labelling" (for each step a class, or numbers where the target has fractions; missing ones do not count) or
            "forecasting" (the next steps of the targets).
        group: column of a name for each sequence; those with one name are in one split.
        time: column to sort the rows of a sequence by.
        indicators: add a channel for each input that is 1 where its value was missing.
        feature_extractor: folder or name on the hub of a saved model whose normalisation is to be used again.
        validation_percent: sequences of a made validation split, in percent; steps of each series to forecast.
        test_percent: sequences, or steps, of a made test split, in percent.
        context: steps that a forecast reads, at least 1.
        horizon: steps that are forecast, at least 1.
        stride: steps from one window to the next; the horizon if 0.
        season: steps after which the series repeats itself, such as 24 for hours: the metric `mase` compares with the
            naive forecast of the value one season before. 0 stands for the value before.
        quantiles: that are forecast, increasing in (0, 1); [0.1, 0.5, 0.9] if not given, [] for the mean.

    Raises:
        OSError: if there is no saved feature extractor of that name.
        ValueError: if no file matches or can be read, a column is missing or not numeric, a split is empty, a target is
            missing or unknown in train, or an option is out of its range.
    """
    wanted = {"context": context, "horizon": horizon, "stride": stride, "season": season, "quantiles": quantiles}
    windows = _windows(kind, wanted)
    columns = _columns(inputs, target, kind, group, time)
    shares = Shares(validation_percent, test_percent)
    found = find_own_files("series", files, ENDINGS)
    given = {split: _checked(read_series(paths, columns), split) for split, paths in found.items()}
    if windows is not None:
        parts = parts_in_time(given, shares.of(list(given)), windows)
        known = [Series(p.series.key, p.series.values[: p.end], p.series.target) for p in parts["train"]]
        extractor = _extractor(known, columns.inputs, indicators, feature_extractor)
        levels = QUANTILES if quantiles is None else quantiles
        return Forecasting(parts["train"], _names(target), columns.inputs, extractor, windows, levels).task(parts)
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


def _windows(kind: str, options: Mapping[str, Any]) -> Windows | None:
    """The windows of a forecast; None for other kinds."""
    if kind not in (*KINDS, FORECASTING):
        raise ValueError(f"kind of task 'series' must be one of {', '.join((*KINDS, FORECASTING))}; got {kind!r}")
    if kind == FORECASTING:
        return Windows(**{name: value for name, value in options.items() if name != "quantiles"})
    if given := [name for name, value in options.items() if value]:
        raise ValueError(f"{', '.join(given)} of task 'series' are for kind: forecasting; kind is {kind}")
    return None


def _columns(inputs: Any, target: Any, kind: str, group: str, time: str) -> Columns:
    names = {"target": _names(target), "inputs": _names(inputs)}
    if kind == FORECASTING:
        names["inputs"] = list(dict.fromkeys([*names["inputs"], *names["target"]]))
    for option, value in names.items():
        if not value:
            raise ValueError(f"task 'series' needs its option {option}: one name of a column, or several")
    others = {group, time} if kind == FORECASTING else {*names["target"], group, time}
    if both := set(names["inputs"]) & others:
        raise ValueError(f"{', '.join(map(repr, sorted(both)))} cannot be an input and something else at once")
    if kind == FORECASTING:
        return Columns(inputs=names["inputs"], group=group, time=time, per_step=True, equal_steps=True)
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
