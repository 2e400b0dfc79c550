"""`text`: language modelling of text files of one's own, as bytes or with any tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import Dataset

from .language import TOKEN_FEATURES, DecodeTokens
from .own_files import SPLITS, Shares, file_ending, find_own_files, named_files, read_own_files, split_of
from .packing import Encoder, pack_dataset, pack_stream
from .sources import require_columns
from .task import Task, register_task

ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
DOCUMENTS = {"paragraph": "paragraph", "line": "line", "file": "document"}
"""What may be one document of a .txt file, and the name that `datasets` has for it."""
GROUP = 1000
"""Documents that are packed together."""
EVALUATED = 1000
"""Most sequences of validation and of test when streaming, unless told otherwise."""
SHUFFLED = 1000
"""Sequences from which the next one is drawn when streaming."""


@register_task("text")
def text(
    *,
    files: str | list[str] | dict[str, Any] | None = None,
    column: str = "text",
    document: str = "paragraph",
    tokenizer: str | None = None,
    length: int = 512,
    validation_percent: int = 5,
    test_percent: int = 5,
    streaming: bool = False,
    evaluation_sequences: int | None = None,
    seed: int = 0,
) -> Task:
    """Your own text files (txt, jsonl, json, csv, parquet), as bytes or with any tokenizer.

    Documents are packed: each is followed by an end token, the tokenizer's EOS or a zero byte, and the resulting stream
    is divided into sequences of `length` tokens. So a sequence may hold several documents, and a document may begin in
    one sequence and go on in the next. Nothing but the end token marks a boundary: the state runs on over it, as models
    here have no reset within a sequence, and the token after it counts in the loss. Every sequence starts from a zero
    state. Documents are packed in groups of 1,000, and what is left of a group, less than a sequence, is dropped.

    Splits that are not given are made from `train`. Which one a document goes to follows from a hash of its text alone:
    more data move no document from one split to another, and copies of a document stay together.

    Args:
        files: a path or pattern such as `corpus/*.txt`, a folder, or a list of them; or a mapping of `train`,
            `validation` and `test` to these. A compressed .txt.gz, .jsonl.gz or .csv.gz is read too.
        column: of jsonl, json, csv and parquet, the one that holds a document in each row.
        document: of .txt files, what is one document: "paragraph" (between empty lines), "line" or "file".
        tokenizer: name on the hub or local folder, for `AutoTokenizer`; without it, bytes in UTF-8.
        length: tokens of a sequence, >= 2.
        validation_percent: documents of a made validation split, in percent.
        test_percent: documents of a made test split, in percent.
        streaming: read while training and keep nothing on disk, for a corpus beyond memory; needs `max_steps`.
            Sequences are drawn from a window of 1,000.
        evaluation_sequences: most sequences of validation and of test; by default all, or with streaming 1,000.
        seed: of the order when streaming.

    Raises:
        ConnectionError: if the tokenizer cannot be loaded.
        ValueError: if no file matches or can be read, a column is missing or holds no text, there is too little text
            for one sequence in a split, or an option is out of its range.
    """
    if length < 2 or document not in DOCUMENTS or (evaluation_sequences is not None and evaluation_sequences < 1):
        raise ValueError(
            f"length must be at least 2, document one of {', '.join(DOCUMENTS)}, and evaluation_sequences at least 1; "
            f"got {length}, {document!r} and {evaluation_sequences}"
        )
    shares = Shares(validation_percent, test_percent)
    found = find_own_files("text", files, ENDINGS)
    encoder = Encoder() if tokenizer is None else Encoder.load(tokenizer, "text")
    given = {split: _documents(paths, column, document, streaming) for split, paths in found.items()}
    limit = evaluation_sequences or (EVALUATED if streaming else None)
    pack = _streamed if streaming else _packed
    try:
        raw = _in_splits(given, shares.of(list(given)))
        splits = {split: pack(raw[split], encoder, length, split, limit) for split in SPLITS}
    except UnicodeDecodeError as error:  # of a column of JSON, which is decoded when it is used
        raise ValueError(f"{named_files(sum(found.values(), []))} cannot be read as UTF-8: {error}") from error
    if streaming:
        splits["train"] = splits["train"].shuffle(seed, buffer_size=SHUFFLED)
    return encoder.task("text", splits)


def _documents(paths: list[str], column: str, document: str, streaming: bool) -> Any:
    """The documents of these files, in a column `text`."""
    where = named_files(paths)
    plain = file_ending(paths[0]) == ".txt"
    raw = read_own_files(paths, streaming, **({"sample_by": DOCUMENTS[document]} if plain else {}))
    column = "text" if plain else column
    require_columns(raw, [column], where)
    kind = getattr(raw.features[column], "dtype", None) or type(raw.features[column]).__name__
    if kind not in ("string", "large_string"):
        raise ValueError(f"column {column!r} of {where} holds {kind}, not text; its columns are {raw.column_names}")
    raw = raw.select_columns([column])
    return raw if column == "text" else raw.rename_column(column, "text")


def _in_splits(given: Mapping[str, Any], shares: Mapping[str, int]) -> dict[str, Any]:
    """Take the splits that are to be made out of `train`, and documents without text out of all."""
    splits = {}
    for split in SPLITS:
        made = shares if split in ("train", *shares) else None
        splits[split] = given["train" if made is not None else split].filter(
            _belongs, input_columns=["text"], fn_kwargs={"split": split, "shares": made}
        )
    return splits


def _belongs(text: str | None, split: str, shares: Mapping[str, int] | None) -> bool:
    return bool(text) and (shares is None or split_of(str(text).encode(), shares) == split)


def _packed(documents: Any, encoder: Encoder, length: int, split: str, limit: int | None) -> Dataset:
    where = f"split {split!r} of task 'text' (documents: {len(documents)})"
    packed = pack_dataset(documents, _pack, GROUP, encoder, length, where)
    return packed if limit is None or split == "train" else packed.select(range(min(limit, len(packed))))


def _streamed(documents: Any, encoder: Encoder, length: int, split: str, limit: int | None) -> Any:
    """The sequences of a split: a stream to train on, and the first ones to evaluate on, in memory."""
    packed = documents.map(
        _pack,
        batched=True,
        batch_size=GROUP,
        fn_kwargs={"encoder": encoder, "length": length},
        remove_columns=["text"],
        features=TOKEN_FEATURES,
    )
    decode = DecodeTokens(length, encoder.stored)
    first = list(islice(packed, 1 if split == "train" else limit))
    if not first:
        raise ValueError(
            f"split {split!r} of task 'text' has too few {encoder.unit}s for one sequence of {length}; choose a "
            "smaller length, or give it more text"
        )
    if split == "train":
        return packed.map(_as_arrays, batched=True, fn_kwargs={"decode": decode}).with_format("torch")
    return Dataset.from_list(first, features=TOKEN_FEATURES).with_transform(decode)


def _as_arrays(batch: dict[str, list[bytes]], decode: DecodeTokens) -> dict[str, Any]:
    return {name: tokens.numpy() for name, tokens in decode(batch).items()}


def _pack(batch: dict[str, list[str]], encoder: Encoder, length: int) -> dict[str, list[bytes]]:
    stream: list[int] = []
    for ids in encoder.encode(batch["text"]):
        stream += [*ids, encoder.end]
    return pack_stream(stream, length, encoder.stored)
