"""Cut series into parts in time, and parts into windows of context and horizon. L length, C channels, K targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .own_files import SPLITS
from .series_files import Series, shortened


@dataclass(frozen=True)
class Windows:
    """Which windows are cut.

    Attributes:
        context: steps that are read, >= 1.
        horizon: steps that are forecast, >= 1.
        stride: steps from one window to the next; the horizon if 0.
        season: steps after which the series repeats itself, for the naive forecast of the metric; 0 or 1 without one.

    Raises:
        ValueError: if one is out of its range.
    """

    context: int
    horizon: int
    stride: int = 0
    season: int = 0

    def __post_init__(self) -> None:
        if min(self.context, self.horizon) < 1:
            raise ValueError(
                "kind: forecasting needs its options context, the steps that are read, and horizon, the steps that are "
                f"forecast, each at least 1; got {self.context} and {self.horizon}"
            )
        for name in ("stride", "season"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Part:
    """The steps of a series that are forecast in one split.

    Attributes:
        series: the whole series; windows read steps before `begin` too.
        begin, end: steps [begin, end) are forecast.
    """

    series: Series
    begin: int
    end: int

    def origins(self, windows: Windows) -> list[int]:
        """Return the first forecast step of each window, in order; the last window ends with the part."""
        first, last = max(self.begin, windows.context), self.end - windows.horizon
        return list(range(last, first - 1, -(windows.stride or windows.horizon)))[::-1]


def parts_in_time(
    given: Mapping[str, Sequence[Series]], shares: Mapping[str, int], windows: Windows
) -> dict[str, list[Part]]:
    """Take from the end of each series of `train` the splits that are to be made: validation, and after it test.

    Args:
        given: split -> its series.
        shares: split -> percent of the steps of each series, for the splits to be made.
        windows: what must fit.

    Raises:
        ValueError: if a part is too short for one window.
    """
    parts: dict[str, list[Part]] = {
        split: [Part(s, 0, len(s.values)) for s in given.get(split, ())] for split in SPLITS
    }
    parts["train"] = []
    for series in given["train"]:
        end = len(series.values)
        for split in ("test", "validation"):
            if split in shares:
                begin = end - len(series.values) * shares[split] // 100
                parts[split].append(Part(series, begin, end))
                end = begin
        parts["train"].append(Part(series, 0, end))
    for split, members in parts.items():
        for part in members:
            _check_length(part, split, windows, shares)
    return parts


def _check_length(part: Part, split: str, windows: Windows, shares: Mapping[str, int]) -> None:
    if part.origins(windows):
        return
    name, steps = shortened(part.series.key) or "the file's only series", part.end - part.begin
    if split in shares and steps < windows.horizon:
        raise ValueError(
            f"{split}_percent {shares[split]} of the {len(part.series.values)} steps of series {name} are {steps}, "
            f"less than the horizon of {windows.horizon}: raise {split}_percent, or lower the horizon"
        )
    made = ", ".join(f"{other}_percent" for other in shares)
    raise ValueError(
        f"series {name} has {part.end} steps for {split}; context {windows.context} and horizon {windows.horizon} need "
        f"{windows.context + windows.horizon}: lower them{f', or {made}' if made and split == 'train' else ''}"
    )


@dataclass(frozen=True, eq=False)  # `datasets` compares transforms, and arrays have no one answer to ==
class DecodeWindows:
    """Cut windows out of series when they are read: a transform for `datasets`.

    Its columns say which window: `input_values` the number of the series, and `labels` the first step that is forecast.

    Attributes:
        windows: their lengths.
        features: for each series (L, C) float32.
        observed: for each series (L, C) bool, False where a value was filled.
        targets: for each series (L, K) float32, NaN where missing.
    """

    windows: Windows
    features: Sequence[np.ndarray]
    observed: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, Any]:
        found: dict[str, list[torch.Tensor]] = {"input_values": [], "observed_mask": [], "labels": []}
        for number, origin in zip(batch["input_values"], batch["labels"], strict=True):
            read = slice(origin - self.windows.context, origin)
            found["input_values"].append(torch.from_numpy(self.features[number][read]))
            found["observed_mask"].append(torch.from_numpy(self.observed[number][read]))
            found["labels"].append(torch.from_numpy(self.targets[number][origin : origin + self.windows.horizon]))
        return found
