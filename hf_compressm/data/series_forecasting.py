"""Forecasts of series: data sets of windows, metrics and the model's fields. K targets, P steps ahead, Q quantiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

from ..models.feature_extractor import MimoSSMFeatureExtractor
from ..models.forecasting_config import are_quantiles
from .series_files import Series
from .series_kinds import error_metrics, learn_targets
from .series_windows import DecodeWindows, Part, Windows
from .task import Task

QUANTILES = [0.1, 0.5, 0.9]


class Forecasting:
    """Forecasts of some channels of series, fitted to the parts to train on.

    Args:
        train: what is forecast there.
        targets: names of the channels that are forecast.
        inputs: names of all channels.
        extractor: normalises; keeps what is learnt about the targets.
        windows: lengths of context, horizon and season.
        quantiles: that are forecast; none for the mean.

    Raises:
        ValueError: if a quantile is out of its range, channels have no names of their own, a target has no value, or
            the season is too long.
    """

    def __init__(
        self,
        train: Sequence[Part],
        targets: Sequence[str],
        inputs: Sequence[str],
        extractor: MimoSSMFeatureExtractor,
        windows: Windows,
        quantiles: list[float],
    ) -> None:
        if quantiles and not are_quantiles(quantiles):
            raise ValueError(f"quantiles must be increasing numbers in (0, 1), or [] for the mean; got {quantiles}")
        self.extractor, self.windows, self.quantiles = extractor, windows, quantiles
        self.places = _places(targets, inputs, extractor.feature_size)
        learn_targets(extractor, np.concatenate([self._targets(p.series)[: p.end] for p in train]), targets)
        self.naive_error = self._naive_error(train)

    def dataset(self, parts: Sequence[Part]) -> Dataset:
        """Return the windows of a split, as `input_values` (L, C), `observed_mask` (L, C) and `labels` (P, K)."""
        places = [(number, origin) for number, part in enumerate(parts) for origin in part.origins(self.windows)]
        mean, std = np.array(self.extractor.target_mean), np.array(self.extractor.target_std)
        series = [part.series for part in parts]
        decode = DecodeWindows(
            self.windows,
            [self.extractor.features(each.values) for each in series],
            [self._observed(each.values) for each in series],
            [((self._targets(each) - mean) / std).astype(np.float32) for each in series],
        )
        # By these names, since a Trainer drops columns that a model does not take.
        columns = {"input_values": [number for number, _ in places], "labels": [origin for _, origin in places]}
        return Dataset.from_dict(columns).with_transform(decode)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Config fields that the data decide."""
        return {
            "num_channels": self.extractor.num_channels,
            "prediction_length": self.windows.horizon,
            "prediction_channel_indices": self.places,
            "quantiles": self.quantiles or None,
        }

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """What `Trainer` takes as `compute_metrics`: errors of the median, or the mean, in the targets' own unit.

        `mase` is the mean absolute error over that of the seasonal naive forecast within the parts to train on, the
        mean over all targets; `pinball` the mean pinball loss of all quantiles.
        """
        found = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        std = np.array(self.extractor.target_std)
        errors = (np.asarray(prediction.label_ids)[:, None] - _with_quantiles(np.asarray(found))) * std
        middle = errors[:, int(np.argmin(np.abs(np.array(self.quantiles or [0.5]) - 0.5)))]
        scaled = np.nanmean(np.abs(middle), axis=(0, 1)) / self.naive_error
        scores = error_metrics(middle) | {"mase": float(np.nanmean(scaled))}
        if self.quantiles:
            levels = np.array(self.quantiles)[:, None, None]
            scores["pinball"] = float(np.nanmean(np.maximum(levels * errors, (levels - 1) * errors)))
        return scores

    def task(self, parts: Mapping[str, Sequence[Part]]) -> Task:
        """Return the task whose splits are these parts."""
        return Task(
            name="series",
            **{split: self.dataset(members) for split, members in parts.items()},
            model_kwargs=self.model_kwargs,
            compute_metrics=self.metrics,
            metric_for_best_model="mae",
            greater_is_better=False,
            problem="forecasting",
            feature_extractor=self.extractor,
        )

    def _targets(self, series: Series) -> np.ndarray:
        return series.values[:, self.places]

    def _observed(self, values: np.ndarray) -> np.ndarray:
        observed = ~np.isnan(values)
        return np.concatenate([observed, np.ones_like(observed)], 1) if self.extractor.indicators else observed

    def _naive_error(self, train: Sequence[Part]) -> np.ndarray:
        """Mean absolute error (K,) of the seasonal naive forecast within the parts to train on."""
        season = self.windows.season or 1
        values = [self._targets(part.series)[: part.end] for part in train]
        errors = np.concatenate([np.abs(row[season:] - row[:-season]) for row in values])
        found = np.nanmean(errors, axis=0) if np.isfinite(errors).any(axis=0).all() and len(errors) else np.zeros(1)
        if not (found > 0).all():
            longest, names = max(map(len, values)), ", ".join(self.extractor.targets or [])
            raise ValueError(
                f"a season of {season} gives no scale for the metric mase: of {names}, with at most {longest} steps to "
                f"train on, no value differs from that {season} steps before"
            )
        return found


def _places(targets: Sequence[str], inputs: Sequence[str], channels: int) -> list[int]:
    if len(inputs) == channels:
        return [list(inputs).index(name) for name in targets]
    if set(targets) != set(inputs):
        raise ValueError(
            f"the {len(inputs)} inputs have {channels} channels together; to forecast some of them, give each channel "
            "an array of its own"
        )
    return list(range(channels))


def _with_quantiles(predictions: np.ndarray) -> np.ndarray:
    """(n, Q, P, K), with Q = 1 for means (n, P, K)."""
    return predictions if predictions.ndim == 4 else predictions[:, None]
