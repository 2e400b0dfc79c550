"""Read the Long Range Arena's own files of `listops`, in place of generated expressions."""

from __future__ import annotations

import os
from typing import Any

from datasets import Dataset, Features, Sequence, Value

from .sources import check_labels, find_files, read_tsv

FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
COLUMNS = Features({"Source": Value("string"), "Target": Value("int64")})
FEATURES = Features({"input_ids": Sequence(Value("uint8")), "labels": Value("int64")})
"""Of a split, from files or generated."""


def read_listops(
    data_dir: str | os.PathLike[str], ids: dict[str, int], bounds: tuple[int, int], counts: dict[str, int]
) -> dict[str, Dataset]:
    """Read the splits from basic_train.tsv, basic_val.tsv and basic_test.tsv: columns Source and Target, with a header.

    Args:
        data_dir: the folder with them, or with one sub-folder that holds them.
        ids: of the tokens; parentheses, which the files have around every operator, are left out.
        bounds: least and greatest number of tokens; other expressions are left out.
        counts: at most as many of each split, from the start of its file.

    Raises:
        FileNotFoundError: if `data_dir` is not a folder.
        ValueError: if a file or column is missing, a token or value is unknown, or nothing is left of a split.
    """
    found = {}
    for split, file in zip(FILES, find_files(data_dir, list(FILES.values())), strict=True):
        data = read_tsv(file, COLUMNS, header=True).map(
            _encode,
            batched=True,
            fn_kwargs={"ids": ids, "bounds": bounds, "where": file.name},
            remove_columns=list(COLUMNS),
            features=FEATURES,
            desc=f"Encoding {file.name}",
        )
        if not len(data):
            raise ValueError(f"{file} has no expression of {bounds[0]} to {bounds[1]} tokens; widen the lengths")
        check_labels(data.data.column("labels").to_numpy(), 10, file.name)
        found[split] = data.select(range(min(counts[split], len(data)))).with_format("torch")
    return found


def _encode(
    batch: dict[str, list[Any]], ids: dict[str, int], bounds: tuple[int, int], where: str
) -> dict[str, list[Any]]:
    rows = []
    for source, label in zip(batch["Source"], batch["Target"], strict=True):
        tokens = (source or "").replace("(", " ").replace(")", " ").split()
        if unknown := set(tokens) - ids.keys():
            raise ValueError(f"{where} has the token {min(unknown)!r}; known are {' '.join(ids)}")
        if bounds[0] <= len(tokens) <= bounds[1]:
            rows.append(([ids[token] for token in tokens], label))
    return {"input_ids": [row for row, _ in rows], "labels": [label for _, label in rows]}
