"""Pad sequences of different lengths to batches. B batch, L the greatest length in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.feature_extractor import pad_series, steps_mask
from .language import IGNORED

PAD = 0
"""The id of padding, which no real token may have."""


def pad_right(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Make a batch of items: `input_ids` and `attention_mask`, int64 (B, L), and `labels`, int64 (B,)."""
    return _with_mask(_padded([item["input_ids"] for item in items]), items)


def pad_pairs(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Make a batch of pairs: `input_ids` and `attention_mask`, int64 (B, 2, L), and `labels`, int64 (B,)."""
    rows = [row for item in items for row in item["input_ids"]]
    return _with_mask(_padded(rows).unflatten(0, (-1, 2)), items)


def pad_series_right(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Make a batch of continuous sequences: `input_values` (B, L, C), `attention_mask`, int64 (B, L), and `labels`.

    Args:
        items: `input_values` (L_i, C) and `labels`, of one shape for all or absent.
    """
    rows = [item["input_values"] for item in items]
    batch = {"input_values": pad_series(rows), "attention_mask": steps_mask(rows)}
    return batch | ({"labels": torch.stack([item["labels"] for item in items])} if "labels" in items[0] else {})


def pad_steps(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Make a batch as `pad_series_right`, with a label for each step: (B, L) or (B, L, K), -100 at padding."""
    batch = pad_series_right([{"input_values": item["input_values"]} for item in items])
    return batch | {"labels": pad_series([item["labels"] for item in items], value=IGNORED)}


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=PAD)


def _with_mask(input_ids: Tensor, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    labels = torch.stack([item["labels"] for item in items])
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": labels}
