"""What can be asked of numeric sequences: labels, metrics and the model's fields of each kind. K targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from transformers import EvalPrediction

from ..models.feature_extractor import MimoSSMFeatureExtractor
from .language import IGNORED
from .metrics import classification_metrics
from .series_files import Series, shortened
from .task import label_fields


class Kind(ABC):
    """A kind of target, fitted to the training data.

    Args:
        train: sequences with their targets.
        targets: names of the targets.
        extractor: keeps what is learnt about targets that are numbers.

    Raises:
        ValueError: if a target is missing or is not what this kind takes.
    """

    problem: Any
    dtype: str
    shape: tuple[int, ...] = ()
    per_step = False
    best_metric: str
    greater_is_better = False

    def __init__(self, train: Sequence[Series], targets: Sequence[str], extractor: MimoSSMFeatureExtractor) -> None:
        self.targets, self.extractor = list(targets), extractor
        self.fit(train)

    @abstractmethod
    def fit(self, train: Sequence[Series]) -> None:
        """Learn what the targets of the training data are."""

    @abstractmethod
    def encode(self, series: Series) -> np.ndarray:
        """Return the labels of a sequence, of this kind's `dtype` and `shape`."""

    @property
    @abstractmethod
    def model_kwargs(self) -> dict[str, Any]:
        """Config fields that the targets decide."""

    preprocess: Any = None

    @abstractmethod
    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """What `Trainer` takes as `compute_metrics`."""


class Classification(Kind):
    """One class for a whole sequence."""

    problem = "sequence_classification"
    dtype = "int64"
    best_metric = "accuracy"
    greater_is_better = True

    def fit(self, train: Sequence[Series]) -> None:
        if len(self.targets) != 1 or train[0].target.shape[-1] != 1:
            raise ValueError(f"classes come from one target; got {train[0].target.shape[-1]} of {self.targets}")
        found = {value for series in train for value in np.ravel(series.target).tolist() if not _is_missing(value)}
        numbers = all(isinstance(value, (int, float, bool)) for value in found)
        self.classes = {str(value): place for place, value in enumerate(sorted(found, key=None if numbers else str))}
        if len(self.classes) < 2:
            only = f"only the class {', '.join(self.classes)}" if self.classes else "no value"
            raise ValueError(f"target {self.targets[0]!r} has {only} in train")

    def encode(self, series: Series) -> np.ndarray:
        return np.array(self._class(series.target.tolist()[0], series), dtype=self.dtype)

    def _class(self, value: Any, series: Series) -> int:
        if _is_missing(value):
            raise ValueError(f"target {self.targets[0]!r} of sequence {shortened(series.key)} is missing")
        if str(value) not in self.classes:
            raise ValueError(
                f"target {self.targets[0]!r} of sequence {shortened(series.key)} is {value!r}, which no sequence of "
                f"train has; there are {', '.join(self.classes)}"
            )
        return self.classes[str(value)]

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return {**label_fields(list(self.classes)), "problem_type": "single_label_classification"}

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return classification_metrics(prediction)


class Regression(Kind):
    """Numbers for a whole sequence; the model learns them with zero mean and unit variance over train."""

    problem = "sequence_classification"
    dtype = "float32"
    best_metric = "rmse"

    def fit(self, train: Sequence[Series]) -> None:
        self.shape = train[0].target.shape
        learn_targets(self.extractor, np.stack([self._numbers(series) for series in train]), self.targets)

    def encode(self, series: Series) -> np.ndarray:
        mean, std = np.array(self.extractor.target_mean), np.array(self.extractor.target_std)
        return ((self._numbers(series) - mean) / std).astype(self.dtype)

    def _numbers(self, series: Series) -> np.ndarray:
        try:
            found = series.target.astype(np.float64)
        except (TypeError, ValueError):
            found = np.array([np.nan])
        if np.isnan(found).any():
            raise ValueError(
                f"target {', '.join(self.targets)} of sequence {shortened(series.key)} is not a number: "
                f"{series.target.tolist()}"
            )
        return found

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": self.shape[-1], "problem_type": "regression"}

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        labels = np.asarray(prediction.label_ids)
        return error_metrics((np.asarray(logits).reshape(labels.shape) - labels) * np.array(self.extractor.target_std))


class Labelling(Classification):
    """A class for each step, or numbers where a target has fractions; steps without a target do not count."""

    problem = "token_classification"
    per_step = True
    shape: tuple[int, ...] = (-1,)

    def fit(self, train: Sequence[Series]) -> None:
        rows = [self._numbers(series) for series in train]
        self.values = all(row is not None for row in rows) and any((row % 1 > 0).any() for row in rows)
        if self.values:
            self.dtype, self.shape = "float32", (-1, train[0].target.shape[-1])
            self.best_metric, self.greater_is_better = "rmse", False
            learn_targets(self.extractor, np.concatenate(rows), self.targets)
        else:
            super().fit(train)

    def _numbers(self, series: Series) -> Any:
        try:
            return series.target.astype(np.float64)
        except (TypeError, ValueError):
            return None

    def encode(self, series: Series) -> np.ndarray:
        if not self.values:
            found = series.target[:, 0].tolist()
            return np.array([IGNORED if _is_missing(v) else self._class(v, series) for v in found], dtype=self.dtype)
        if (numbers := self._numbers(series)) is None:
            raise ValueError(f"target {', '.join(self.targets)} of sequence {shortened(series.key)} has no numbers")
        mean, std = np.array(self.extractor.target_mean), np.array(self.extractor.target_std)
        return np.nan_to_num((numbers - mean) / std, nan=IGNORED).astype(self.dtype)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": self.shape[-1], "problem_type": "regression"} if self.values else super().model_kwargs

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        labels, found = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
        if self.values:
            errors = np.where(labels == IGNORED, np.nan, found - labels)
            return error_metrics(errors * np.array(self.extractor.target_std))
        labels, found = labels[labels != IGNORED], found[labels != IGNORED]
        shares = f1_score(labels, found, average="macro", zero_division=0.0)
        return {"accuracy": float((labels == found).mean()), "f1": float(shares)}

    def preprocess(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """What `Trainer` takes as `preprocess_logits_for_metrics`: classes (B, L), or values (B, L, K)."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits if self.values else logits.argmax(-1)


KINDS: dict[str, type[Kind]] = {"classification": Classification, "regression": Regression, "labelling": Labelling}


def learn_targets(extractor: MimoSSMFeatureExtractor, values: np.ndarray, names: Sequence[str]) -> None:
    """Keep mean and standard deviation of targets (n, K) in the extractor, unless it has them from a saved model.

    Raises:
        ValueError: if it has them of another number of targets.
    """
    if extractor.target_mean is None:
        extractor.target_mean, extractor.target_std = mean_and_std(values)
    if len(extractor.target_mean) != values.shape[1]:
        raise ValueError(
            f"the saved feature extractor knows {len(extractor.target_mean)} targets; the data have {values.shape[1]}"
        )
    extractor.targets = list(names)


def mean_and_std(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each column of (n, C) over what is not NaN; 1 in place of a std of 0."""
    std = np.nanstd(values, axis=0)
    return np.nanmean(values, axis=0).tolist(), np.where(std > 0, std, 1.0).tolist()


def error_metrics(errors: np.ndarray) -> dict[str, float]:
    """Mean absolute and root mean square error of differences of any shape, NaN left out."""
    return {"mae": float(np.nanmean(np.abs(errors))), "rmse": float(np.sqrt(np.nanmean(errors**2)))}


def _is_missing(value: Any) -> bool:
    return value is None or value != value


@dataclass(frozen=True)
class DecodeSeries:
    """Decode `binary` columns: a transform for `datasets`.

    `input_values` become float32 tensors (L, C), and `labels` a tensor of a kind's `dtype` and `shape` for each item.

    Attributes:
        channels: C.
        dtype, shape: of labels; -1 stands for L.
    """

    channels: int
    dtype: str
    shape: tuple[int, ...]

    def __call__(self, batch: dict[str, list[bytes]]) -> dict[str, Any]:
        forms = {"input_values": ("float32", (-1, self.channels)), "labels": (self.dtype, self.shape)}
        return {name: [_tensor(row, *forms[name]) for row in rows] for name, rows in batch.items()}


def _tensor(row: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(row, dtype=dtype).reshape(shape).copy())
