"""`wikitext`: language modelling of Wikipedia articles, from the hub, its cache or a local folder.

Source: Merity et al. 2016, "Pointer Sentinel Mixture Models", arXiv 1609.07843.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from .language import TOKEN_FEATURES, DecodeTokens, language_metrics, token_scores
from .sources import load_from_folder, load_from_hub, require_columns
from .task import Task, register_task

REPO = "Salesforce/wikitext"
CONFIGS = ("wikitext-2-raw-v1", "wikitext-103-raw-v1")
SPLITS = ("train", "validation", "test")
COLUMN = "text"
STORED = "uint32"

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
    """Read the articles, one after the other, as sequences of `length` tokens.

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
    encoder = _load_tokenizer(tokenizer)
    if data_dir is None:
        raw = load_from_hub("wikitext", REPO, SPLITS, [COLUMN], config)
    else:
        named = Path(data_dir).expanduser() / config
        raw = load_from_folder(named if named.is_dir() else data_dir, SPLITS, (".parquet", ".txt"))
    splits = {split: _packed(raw[split], encoder, length, f"split {split!r} of 'wikitext'") for split in SPLITS}
    return Task(
        name="wikitext",
        **splits,
        model_kwargs={
            "vocab_size": max(encoder.get_vocab().values()) + 1,  # more than len(encoder) where ids are left out
            "pad_token_id": encoder.pad_token_id,
            "bos_token_id": encoder.bos_token_id,
            "eos_token_id": encoder.eos_token_id,
        },
        compute_metrics=language_metrics("token"),
        preprocess_logits_for_metrics=token_scores,
        metric_for_best_model="nats_per_token",
        greater_is_better=False,
        problem="causal_lm",
        tokenizer=encoder,
        hub_dataset=REPO,
    )


def _load_tokenizer(name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as for data sets, many classes mean "cannot be had"
        raise ConnectionError(
            f"Task 'wikitext': could not load the tokenizer {name!r} ({type(error).__name__}: {error}). Without a "
            "connection, either set the task's option `tokenizer` to a folder that a tokenizer's save_pretrained has "
            "written, or set HF_HOME to a cache in which it has been loaded before."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {name!r} has no EOS token, which articles begin with; set its eos_token and save it again, "
            "or choose another tokenizer"
        )
    return tokenizer


def _packed(dataset: Dataset, tokenizer: Any, length: int, where: str) -> Dataset:
    require_columns(dataset, [COLUMN], where)
    packed = dataset.map(
        _pack,
        batched=True,
        batch_size=ROWS,
        fn_kwargs={"tokenizer": tokenizer, "length": length},
        remove_columns=dataset.column_names,
        features=TOKEN_FEATURES,
        desc=f"Tokenising {where}",
    )
    if not len(packed):
        raise ValueError(f"{where} has too few tokens for one sequence of {length}; choose a smaller length")
    return packed.with_transform(DecodeTokens(length, STORED))


def _pack(batch: dict[str, list[str]], tokenizer: Any, length: int) -> dict[str, list[bytes]]:
    rows = batch[COLUMN]
    stream: list[int] = []
    for row, ids in zip(rows, tokenizer(rows, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
        if TITLE.fullmatch(row):
            stream.append(tokenizer.eos_token_id)
        stream += ids
    sequences = np.array(stream[: len(stream) // length * length], dtype=STORED).reshape(-1, length)
    return {"input_ids": [sequence.tobytes() for sequence in sequences]}
