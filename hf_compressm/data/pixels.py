"""Store images as bytes, and read them as sequences of normalised pixels. L pixels, C channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value

from .metrics import classification_metrics
from .task import Task, label_fields

# One item is L * C bytes, row by row. As `binary`, a batch leaves Arrow as a few `bytes` objects; as a list
# column it would leave as L * C Python integers per item. The names are those of the model's arguments,
# because Trainer drops columns with other names before any transform runs.
PIXEL_FEATURES = Features({"input_values": Value("binary"), "labels": Value("int64")})


@dataclass(frozen=True)
class DecodePixels:
    """Decode pixels to x = (pixel / full_scale - mean) / std, channel by channel: a transform for `datasets`.

    Maps a batch of `PIXEL_FEATURES` rows to `input_values`, float32 of shape (B, L, C), and `labels`, int64
    of shape (B,). A batch may lack either column.

    Attributes:
        length: L.
        mean: C means of pixel / full_scale.
        std: C standard deviations of pixel / full_scale, > 0.
        full_scale: the value of the brightest pixel.
    """

    length: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    full_scale: float = 255.0

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        decoded = {}
        if "input_values" in batch:
            rows = batch["input_values"]
            pixels = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), self.length, len(self.mean))
            scale = 1.0 / (self.full_scale * np.asarray(self.std))
            shift = np.asarray(self.mean) / np.asarray(self.std)
            values = pixels * scale.astype(np.float32) - shift.astype(np.float32)
            decoded["input_values"] = torch.from_numpy(values)
        if "labels" in batch:
            decoded["labels"] = torch.tensor(batch["labels"], dtype=torch.int64)
        return decoded


def stratified_split(labels: np.ndarray, fractions: Sequence[float], seed: int = 0) -> list[np.ndarray]:
    """Split the indices of `labels` into parts that hold the same share of every class.

    Args:
        labels: int, shape (n,).
        fractions: the share of each part, summing to 1. A class of m items gives each part its share of m to
            within one item.
        seed: which of the many such splits. Each seed's is the same on every machine.

    Returns:
        one sorted int64 array of indices per fraction; together they hold every index once.

    Raises:
        ValueError: if the fractions are negative or do not sum to 1, or if a part would be empty.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be at least 0 and sum to 1, got {tuple(fractions)}")
    # RandomState, not Generator: NumPy promises that its stream stays the same from version to version.
    rng = np.random.RandomState(seed)
    bounds = np.cumsum(fractions)[:-1]
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(bounds * len(members)).astype(int)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.append(chunk)
    joined = [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]
    if not all(map(len, joined)):
        raise ValueError(
            f"{len(labels)} items are too few for parts of {tuple(fractions)}, which would have "
            f"{[len(part) for part in joined]} items"
        )
    return joined


def pixel_task(
    name: str,
    train: Dataset,
    validation: Dataset,
    test: Dataset,
    *,
    decode: DecodePixels,
    label_names: Sequence[str],
    hub_dataset: str | None = None,
) -> Task:
    """Make a classification task of three data sets with `PIXEL_FEATURES`."""
    return Task(
        name=name,
        train=train.with_transform(decode),
        validation=validation.with_transform(decode),
        test=test.with_transform(decode),
        model_kwargs={"num_channels": len(decode.mean), **label_fields(label_names)},
        compute_metrics=classification_metrics,
        metric_for_best_model="accuracy",
        problem="sequence_classification",
        hub_dataset=hub_dataset,
    )
