"""Store texts as bytes, and add one to each byte when it is read, so that 0 is free for padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Sequence, Value
from torch import Tensor

from .collators import PAD
from .sources import check_labels
from .task import label_fields

VOCABULARY = 257
"""Number of ids: 0 is padding, and b + 1 is the byte b."""

# The names are those of the model's arguments, because Trainer drops columns with other names.
TEXT_FEATURES = Features({"input_ids": Value("binary"), "labels": Value("int64")})
PAIR_FEATURES = Features({"input_ids": Sequence(Value("binary")), "labels": Value("int64")})


def decode_bytes(batch: dict[str, list[Any]]) -> dict[str, Any]:
    """Decode rows with `TEXT_FEATURES` or `PAIR_FEATURES`: a transform for `datasets`.

    `input_ids` become int64 tensors of shape (L,) with values in [1, 257), one or two for each item, and `labels` an
    int64 tensor of shape (B,). A batch may lack either column.
    """
    decoded: dict[str, Any] = {}
    if "input_ids" in batch:
        decoded["input_ids"] = [
            _ids(row) if isinstance(row, bytes) else [*map(_ids, row)] for row in batch["input_ids"]
        ]
    if "labels" in batch:
        decoded["labels"] = torch.tensor(batch["labels"], dtype=torch.int64)
    return decoded


def _ids(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64) + 1)


def first_bytes(text: Any, max_length: int, where: str, encoding: str = "utf-8") -> bytes:
    """Return the first `max_length` bytes of a text.

    Raises:
        ValueError: if it is empty or missing.
    """
    if not text:
        raise ValueError(f"{where} has a row without text; take it out")
    return text.encode(encoding)[:max_length]


def encoded(dataset: Dataset, encode: Any, features: Features, where: str, **settings: Any) -> Dataset:
    """Encode all rows by `encode(batch, where=where, **settings)`. The result stays in the `datasets` cache.

    Raises:
        ValueError: on a label other than 0 and 1, or no rows; and as `encode` does.
    """
    found = dataset.map(
        encode,
        batched=True,
        batch_size=500,
        fn_kwargs={"where": where, **settings},
        remove_columns=dataset.column_names,
        features=features,
        desc=f"Encoding {where}",
    )
    check_labels(found.data.column("labels").to_numpy(), 2, where)
    return found


def text_model_kwargs(label_names: tuple[str, ...]) -> dict[str, Any]:
    """Return the config fields of a classifier of bytes."""
    special = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    return {"vocab_size": VOCABULARY, **special, **label_fields(label_names)}
