"""Tokenise texts and pack them into sequences of one length, for the tasks of language modelling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from .language import TOKEN_FEATURES, DecodeTokens, language_metrics, token_scores
from .task import Task

BYTE_KWARGS = {"vocab_size": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
"""Config fields of a model of bytes."""


@dataclass(frozen=True)
class Encoder:
    """Turns texts into tokens: those of a tokenizer, or bytes in UTF-8.

    Attributes:
        tokenizer: with an EOS token; None for bytes.
    """

    tokenizer: Any = None

    @classmethod
    def load(cls, name: str, task: str) -> Encoder:
        """Load a tokenizer.

        Args:
            name: on the hub, or a local folder.
            task: the task's name, for errors.

        Raises:
            ConnectionError: if it cannot be loaded.
            ValueError: if it has no EOS token.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # as for data sets, many classes mean "cannot be had"
            raise ConnectionError(
                f"Task {task!r}: could not load the tokenizer {name!r} ({type(error).__name__}: {error}). Without a "
                "connection, either set the task's option `tokenizer` to a folder that a tokenizer's save_pretrained "
                "has written, or set HF_HOME to a cache in which it has been loaded before."
            ) from error
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {name!r} has no EOS token, which separates documents; set its eos_token and save it "
                "again, or choose another tokenizer"
            )
        return cls(tokenizer)

    @property
    def end(self) -> int:
        """The token between documents."""
        return 0 if self.tokenizer is None else self.tokenizer.eos_token_id

    @property
    def unit(self) -> str:
        """What a token is called in the names of metrics."""
        return "byte" if self.tokenizer is None else "token"

    @property
    def stored(self) -> str:
        """NumPy's name of the type in which a token is stored."""
        return "uint8" if self.tokenizer is None else "uint32"

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Config fields of a model of these tokens."""
        if self.tokenizer is None:
            return dict(BYTE_KWARGS)
        return {
            # more than len(tokenizer) where ids are left out
            "vocab_size": max(self.tokenizer.get_vocab().values()) + 1,
            **{name: getattr(self.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        }

    def encode(self, texts: list[str]) -> Iterable[Any]:
        """Return the tokens of each text, without special ones."""
        if self.tokenizer is None:
            return [text.encode() for text in texts]
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def task(self, name: str, splits: dict[str, Any], **fields: Any) -> Task:
        """Make the task of predicting these tokens."""
        return Task(
            name=name,
            **splits,
            model_kwargs=self.model_kwargs,
            compute_metrics=language_metrics(self.unit),
            preprocess_logits_for_metrics=token_scores,
            metric_for_best_model=f"nats_per_{self.unit}",
            greater_is_better=False,
            problem="causal_lm",
            tokenizer=self.tokenizer,
            **fields,
        )


def pack_stream(stream: list[int], length: int, dtype: str) -> dict[str, list[bytes]]:
    """Divide tokens into sequences of `length` as rows of `TOKEN_FEATURES`; what is left over is dropped."""
    sequences = np.array(stream[: len(stream) // length * length], dtype=dtype).reshape(-1, length)
    return {"input_ids": [sequence.tobytes() for sequence in sequences]}


def pack_dataset(dataset: Dataset, pack: Any, rows: int, encoder: Encoder, length: int, where: str) -> Dataset:
    """Pack the rows of a data set in groups. The result stays in the `datasets` cache.

    Args:
        dataset: of texts.
        pack: batch, encoder, length -> rows of `TOKEN_FEATURES`.
        rows: rows of a group.
        encoder: makes the tokens.
        length: tokens of a sequence.
        where: which data they are, for the error.

    Raises:
        ValueError: if there are too few tokens for one sequence.
    """
    packed = dataset.map(
        pack,
        batched=True,
        batch_size=rows,
        fn_kwargs={"encoder": encoder, "length": length},
        remove_columns=dataset.column_names,
        features=TOKEN_FEATURES,
        desc=f"Tokenising {where}",
    )
    if not len(packed):
        raise ValueError(
            f"{where} has too few {encoder.unit}s for one sequence of {length}; choose a smaller length, "
            "or give it more text"
        )
    return packed.with_transform(DecodeTokens(length, encoder.stored))
