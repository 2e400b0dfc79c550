"""`imdb`: reviews of films, read byte by byte, from the hub, its cache or a local folder.

Sources: Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis"; byte by byte it is the task "Text" of Tay et
al. 2020, "Long Range Arena", arXiv 2011.04006.
"""

from __future__ import annotations

import os
from typing import Any

from .byte_text import TEXT_FEATURES, decode_bytes, encoded, first_bytes, text_model_kwargs
from .collators import pad_right
from .metrics import classification_metrics
from .pixels import stratified_split
from .sources import load_from_folder, load_from_hub, require_columns
from .task import Task, register_task

REPO = "stanfordnlp/imdb"
SPLITS = ("train", "test")
COLUMNS = ("text", "label")
LABELS = ("neg", "pos")
VALIDATION_FRACTION = 0.1


@register_task("imdb")
def imdb(*, data_dir: str | os.PathLike[str] | None = None, max_length: int = 4096) -> Task:
    """Load 50,000 reviews of up to `max_length` bytes: is the sentiment negative or positive? Half are of each class.

    Validation is a fixed, stratified tenth of the train split; test is the data set's own. Long Range Arena has no such
    part and selects models by the test split instead.

    `input_ids`, int64 (L,) in [1, 257), are bytes plus one and of different lengths; the collator pads a batch on the
    right with 0 and adds the `attention_mask`.

    Args:
        data_dir: a folder with `train-*.parquet` and `test-*.parquet`, columns `text` and `label`, or with one
            sub-folder that holds them, as in the hub's repository. None reads from the hub or its cache.
        max_length: bytes of a sequence, >= 1; the rest of a review is left out.

    Raises:
        ConnectionError: if the hub does not yield the data set.
        FileNotFoundError: if `data_dir` is not a folder.
        ValueError: if a split or column is missing, a review is empty, or a label is neither 0 nor 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1; got {max_length}")
    raw = load_from_hub("imdb", REPO, SPLITS, COLUMNS) if data_dir is None else load_from_folder(data_dir, SPLITS)
    splits = []
    for split in SPLITS:
        where = f"split {split!r} of 'imdb'"
        require_columns(raw[split], COLUMNS, where)
        splits.append(encoded(raw[split], _encode, TEXT_FEATURES, where, max_length=max_length))
    train, test = splits
    fractions = (1 - VALIDATION_FRACTION, VALIDATION_FRACTION)
    keep, hold_out = stratified_split(train.data.column("labels").to_numpy(), fractions)
    return Task(
        name="imdb",
        train=train.select(keep).with_transform(decode_bytes),
        validation=train.select(hold_out).with_transform(decode_bytes),
        test=test.with_transform(decode_bytes),
        model_kwargs=text_model_kwargs(LABELS),
        compute_metrics=classification_metrics,
        metric_for_best_model="accuracy",
        problem="sequence_classification",
        collator=pad_right,
        hub_dataset=REPO,
    )


def _encode(batch: dict[str, list[Any]], where: str, max_length: int) -> dict[str, list[Any]]:
    return {"input_ids": [first_bytes(text, max_length, where) for text in batch["text"]], "labels": batch["label"]}
