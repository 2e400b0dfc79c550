"""`wikitext`: language modelling of Wikipedia articles, from the hub, its cache or a local folder.

Source: Merity et al. 2016, "Pointer Sentinel Mixture Models", arXiv 1609.07843.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .own_files import SPLITS
from .packing import Encoder, pack_dataset, pack_stream
from .sources import load_from_folder, load_from_hub, require_columns
from .task import Task, register_task

REPO = "Salesforce/wikitext"
CONFIGS = ("wikitext-2-raw-v1", "wikitext-103-raw-v1")
COLUMN = "text"

TITLE = re.compile(r" = [^=]+ = \s*")
"""A row of the data set that begins an article; headings within one have two or more signs on either side."""
ROWS = 10_000
"""Rows that are packed together."""


@register_task("wikitext")
def wikitext(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    config: str = "wikitext-2-raw-v1",
    tokenizer: str = "gpt2",
    length: int = 512,
) -> Task:
    """Read articles of Wikipedia, one after the other, as sequences of `length` tokens.

    Each article begins with the tokenizer's EOS token.

    The splits are the data set's own. Rows are tokenised and packed in groups of 10,000, and what is left of a group,
    less than a sequence, is dropped; the result stays in the `datasets` cache. `nats_per_token` and `perplexity` are
    over the tokens of this tokenizer and start anew in every sequence: neither compares with another tokenizer or
    length.

    Args:
        data_dir: a folder with `train-*`, `validation-*` and `test-*` files, or one that has them in a sub-folder
            with the name `config` or in its only one, as in the hub's repository: parquet with a column `text` of one
            line a row, or `.txt`. None reads from the hub or its cache.
        config: "wikitext-2-raw-v1", 2 million words, or "wikitext-103-raw-v1", 103 million.
        tokenizer: name on the hub or local folder, for `AutoTokenizer`.
        length: tokens of a sequence, >= 2.

    Raises:
        ConnectionError: if the hub does not yield the data set or the tokenizer.
        FileNotFoundError: if `data_dir` is not a folder.
        ValueError: if an option is out of its range, the tokenizer has no EOS token, or a split is missing, has no
            column `text` or too few tokens for one sequence.
    """
    if config not in CONFIGS or length < 2:
        raise ValueError(
            f"config must be one of {', '.join(CONFIGS)} and length at least 2; got {config!r} and {length}"
        )
    encoder = Encoder.load(tokenizer, "wikitext")
    if data_dir is None:
        raw = load_from_hub("wikitext", REPO, SPLITS, [COLUMN], config)
    else:
        named = Path(data_dir).expanduser() / config
        raw = load_from_folder(named if named.is_dir() else data_dir, SPLITS, (".parquet", ".txt"))
    for split in SPLITS:
        require_columns(raw[split], [COLUMN], f"split {split!r} of 'wikitext'")
    splits = {
        split: pack_dataset(raw[split], _pack, ROWS, encoder, length, f"split {split!r} of 'wikitext'")
        for split in SPLITS
    }
    return encoder.task("wikitext", splits, hub_dataset=REPO)


def _pack(batch: dict[str, list[str]], encoder: Encoder, length: int) -> dict[str, list[bytes]]:
    rows = batch[COLUMN]
    stream: list[int] = []
    for row, ids in zip(rows, encoder.encode(rows), strict=True):
        if TITLE.fullmatch(row):
            stream.append(encoder.end)
        stream += ids
    return pack_stream(stream, length, encoder.stored)
