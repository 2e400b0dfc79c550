"""Make a language-modelling task of local text files, read with a model's own tokenizer or as bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from . import Task
from .language import language_metrics, token_scores
from .own_files import read_own_files

BLOCK = 1 << 16
"""Bytes of a file that are tokenised at a time, rounded up to whole lines: no more is read than is needed."""


def text_task(path: str | os.PathLike[str], tokenizer: Any = None, *, length: int = 512, sequences: int = 64) -> Task:
    """Read the beginning of a text as sequences of `length` tokens, one document after the other.

    A parquet file holds one document a row, in its column `text` or else its only column of strings; any other file is
    one document in UTF-8. Of a folder all files are read, in the order of their names, but hidden ones. Documents end
    with the tokenizer's end-of-sequence token if it has one, and as bytes with a zero.

    Args:
        path: a file or folder.
        tokenizer: of the model, or None to read bytes.
        length: tokens of a sequence, >= 2.
        sequences: sequences to calibrate on, >= 1. As many again are held out, if the text is long enough, and at least
            a tenth of what there is.

    Raises:
        ValueError: if there are fewer than two sequences, a file is not UTF-8, or it is unclear which column of a
            parquet file holds text.
        FileNotFoundError: if there is no such file, or the folder holds none.
    """
    if length < 2 or sequences < 1:
        raise ValueError(f"length must be at least 2 and sequences at least 1; got {length} and {sequences}")
    path = Path(path).expanduser()
    tokens: list[int] = []
    for part in _tokens(path, tokenizer):
        tokens += part
        if len(tokens) >= 2 * sequences * length:
            break
    count = min(len(tokens) // length, 2 * sequences)
    if count < 2:
        raise ValueError(
            f"{path} is too short: its {len(tokens)} {'bytes' if tokenizer is None else 'tokens'} are less than two "
            f"sequences of {length}, one to calibrate on and one held out; choose a smaller length"
        )
    rows = np.array(tokens[: count * length]).reshape(count, length)
    first = min(sequences, count - max(count // 10, 1))
    held_out = _dataset(rows[first:])
    return Task(
        name=str(path),
        train=_dataset(rows[:first]),
        validation=held_out,
        test=held_out,
        model_kwargs={},
        compute_metrics=language_metrics("token" if tokenizer is not None else "byte"),
        preprocess_logits_for_metrics=token_scores,
        metric_for_best_model="accuracy",
        problem="causal_lm",
    )


def _dataset(rows: np.ndarray) -> Dataset:
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def _tokens(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    for file in text_files(path):
        for document in _documents(file):
            for block in document:
                yield list(block) if tokenizer is None else _encoded(file, block, tokenizer)
            yield [0] if tokenizer is None else [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)


def text_files(path: Path) -> list[Path]:
    """Return the files that `text_task` reads: the file itself, or those of a folder in the order of their names.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    if not path.is_dir():
        return [path]
    names = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    files = [path / name for name in sorted(names) if not any(part.startswith(".") for part in name.parts)]
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no files")
    return files


def _documents(file: Path) -> Iterator[Iterable[bytes]]:
    """The documents of a file, each in blocks of bytes that end where a line does."""
    if file.suffix != ".parquet":
        with file.open("rb") as lines:
            yield iter(lambda: b"".join(lines.readlines(BLOCK)), b"")
        return
    rows = read_own_files([str(file)], streaming=True)
    features = rows.features or {}
    strings = [
        name for name, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if "text" not in strings and len(strings) != 1:
        raise ValueError(
            f"{file} needs a column 'text', or exactly one column of strings; its columns are {', '.join(features)}"
        )
    column = "text" if "text" in strings else strings[0]
    for row in rows:
        if row[column]:
            yield [row[column].encode()]


def _encoded(file: Path, block: bytes, tokenizer: Any) -> list[int]:
    try:
        text = block.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
