"""`aan`: does one paper cite the other? Pairs of papers of the ACL Anthology Network, read byte by byte.

Sources: Radev et al. 2013, "The ACL Anthology Network Corpus"; the pairs, splits and lengths of the task "Retrieval" of
Tay et al. 2020, "Long Range Arena", arXiv 2011.04006, whose release has the files.
"""

from __future__ import annotations

import os
from typing import Any

from datasets import Dataset, Features, Value

from .byte_text import PAIR_FEATURES, decode_bytes, encoded, first_bytes, text_model_kwargs
from .collators import pad_pairs
from .metrics import classification_metrics
from .sources import find_files, no_hub, read_tsv
from .task import Task, register_task

FILES = {
    split: f"new_aan_pairs.{name}.tsv"
    for split, name in zip(("train", "validation", "test"), ("train", "eval", "test"), strict=True)
}
COLUMNS = Features(
    {"label": Value("float64"), "id1": Value("string"), "id2": Value("string")}
    | {name: Value("string") for name in ("text1", "text2")}
)
LABELS = ("unrelated", "cites")
ENCODING = "latin-1"
"""One character for each byte, whatever the encoding of the papers."""


@register_task("aan")
def aan(*, data_dir: str | os.PathLike[str] | None = None, max_length: int = 4000) -> Task:
    """Load pairs of papers of up to `max_length` bytes each, 2 classes. The splits are those of the release.

    `input_ids` are two int64 tensors (L,) with values in [1, 257), bytes plus one and of different lengths; the
    collator pads a batch on the right with 0 to (B, 2, L) and adds the `attention_mask`.

    Args:
        data_dir: a folder with new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv of the Long
            Range Arena's release, or with one sub-folder that holds them: without a header, five columns label, id1,
            id2, text1, text2. Must be given: they are not on the hub in this form.
        max_length: bytes of each paper, >= 1; the rest is left out.

    Raises:
        FileNotFoundError: if `data_dir` is not a folder.
        ValueError: without `data_dir`, or if a file is missing or has other columns, a text is empty, or a label is
            neither 0 nor 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1; got {max_length}")
    files = find_files(no_hub("aan", data_dir, list(FILES.values())), list(FILES.values()))
    splits: dict[str, Dataset] = {}
    for split, file in zip(FILES, files, strict=True):
        raw = read_tsv(file, COLUMNS, header=False, encoding=ENCODING)
        splits[split] = encoded(raw, _encode, PAIR_FEATURES, file.name, max_length=max_length)
    return Task(
        name="aan",
        **{split: data.with_transform(decode_bytes) for split, data in splits.items()},
        model_kwargs=text_model_kwargs(LABELS),
        compute_metrics=classification_metrics,
        metric_for_best_model="accuracy",
        problem="sequence_pair_classification",
        collator=pad_pairs,
    )


def _encode(batch: dict[str, list[Any]], where: str, max_length: int) -> dict[str, list[Any]]:
    texts = zip(batch["text1"], batch["text2"], strict=True)
    pairs = [[first_bytes(text, max_length, where, ENCODING) for text in pair] for pair in texts]
    labels = [-1 if label is None or label % 1 else int(label) for label in batch["label"]]
    return {"input_ids": pairs, "labels": labels}
