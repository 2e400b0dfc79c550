"""Numeric sequences as models read them: filled, normalised and padded. B batch, L length, C channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, SequenceFeatureExtractor

from .carried_code import CarriesExtractorCode

MASK = "attention_mask"


def fill_missing(values: np.ndarray, at_start: np.ndarray) -> np.ndarray:
    """Replace each NaN by the last value before it in its channel, and at the beginning by `at_start`.

    Args:
        values: (L, C) floats.
        at_start: (C,) floats.
    """
    rows = np.where(np.isnan(values), -1, np.arange(len(values))[:, None])
    last = np.maximum.accumulate(rows, axis=0)
    filled = np.take_along_axis(values, last.clip(min=0), axis=0)
    return np.where(last < 0, at_start, filled)


def pad_series(rows: Sequence[Tensor], side: str = "right", value: float = 0.0) -> Tensor:
    """Pad rows (L_i, ...) on one side to the longest: (B, L, ...)."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def steps_mask(rows: Sequence[Tensor], side: str = "right") -> Tensor:
    """Return the `attention_mask` of `pad_series`, int64 (B, L): 1 at real steps."""
    return pad_series([row.new_ones(len(row), dtype=torch.int64) for row in rows], side)


class MimoSSMFeatureExtractor(CarriesExtractorCode, SequenceFeatureExtractor):
    """Makes a model's `input_values` of numeric sequences, with what was learnt on the training data.

    A missing value (NaN) becomes the last one before it in its channel, and the channel's mean where there is none.
    Then x -> (x - mean) / std for each channel. With `indicators`, as many channels follow that are 1 where a value was
    missing and 0 elsewhere.

    Args:
        feature_size: channels C that are given, >= 1.
        mean, std: of each channel, std > 0; None for 0 and 1.
        channels: names of the channels.
        indicators: whether channels follow that tell what was missing.
        target_mean, target_std: of what the model predicts, in the data's own unit; None for 0 and 1.
        targets: names of what the model predicts.
        padding_side: "right" or "left".
        sampling_rate, padding_value, **kwargs: as for transformers' feature extractors.

    Raises:
        ValueError: if a list does not have one entry for each channel, or a std is not positive.
    """

    model_input_names = ["input_values", MASK]

    def __init__(
        self,
        feature_size: int = 1,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        channels: list[str] | None = None,
        indicators: bool = False,
        target_mean: list[float] | None = None,
        target_std: list[float] | None = None,
        targets: list[str] | None = None,
        sampling_rate: int = 1,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.mean = [0.0] * feature_size if mean is None else list(mean)
        self.std = [1.0] * feature_size if std is None else list(std)
        if len(self.mean) != feature_size or len(self.std) != feature_size or not all(s > 0 for s in self.std):
            raise ValueError(
                f"mean and std must have feature_size = {feature_size} entries, std positive; got {self.mean} and "
                f"{self.std}"
            )
        self.channels, self.indicators, self.targets = channels, indicators, targets
        self.target_mean, self.target_std = target_mean, target_std

    @property
    def num_channels(self) -> int:
        """Channels that the model reads."""
        return self.feature_size * (2 if self.indicators else 1)

    def features(self, values: Any) -> np.ndarray:
        """Fill and normalise one sequence: (L,) for one channel or (L, C) -> float32 (L, num_channels).

        Raises:
            ValueError: if it has another number of channels.
        """
        given = np.asarray(values, dtype=np.float64)
        given = given[:, None] if given.ndim == 1 else given
        if given.ndim != 2 or given.shape[1] != self.feature_size:
            raise ValueError(
                f"a sequence must have shape (L, {self.feature_size})"
                f"{' or (L,)' if self.feature_size == 1 else ''}; got {np.shape(values)}"
            )
        found = (fill_missing(given, np.array(self.mean)) - self.mean) / self.std
        parts = [found, np.isnan(given)] if self.indicators else [found]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def __call__(self, values: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Make a batch of one or several sequences.

        Args:
            values: an array (B, L, C), or (B, L) for one channel; one sequence (L, C), or (L,) for one channel; or a
                list of sequences of any lengths.
            return_tensors: "pt" for tensors, "np" for arrays.

        Returns:
            `input_values`, float32 (B, L, num_channels), and `attention_mask`, int64 (B, L), 1 at real steps.

        Raises:
            ValueError: if a sequence has another number of channels.
        """
        rows = [torch.from_numpy(self.features(row)) for row in self._as_sequences(values)]
        batch = {
            "input_values": pad_series(rows, self.padding_side, self.padding_value),
            MASK: steps_mask(rows, self.padding_side),
        }
        return BatchFeature({name: value.numpy() for name, value in batch.items()} if return_tensors == "np" else batch)

    def denormalise(self, predictions: Any) -> Any:
        """Give what a model predicts the data's own unit: (..., K) -> (..., K), for targets that are numbers."""
        if self.target_mean is None or self.target_std is None:
            return predictions
        if isinstance(predictions, Tensor):
            return predictions * predictions.new_tensor(self.target_std) + predictions.new_tensor(self.target_mean)
        return np.asarray(predictions) * np.array(self.target_std) + np.array(self.target_mean)

    def _as_sequences(self, values: Any) -> list[Any]:
        if isinstance(values, (list, tuple)) and np.ndim(values[0]) > 0:
            return list(values)
        given = np.asarray(values, dtype=np.float64)
        several = given.ndim == 3 or (given.ndim == 2 and self.feature_size == 1 and given.shape[1] != 1)
        return list(given) if several else [given]
