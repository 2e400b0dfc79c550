"""Packed sequences of tokens, and metrics that keep no logits, for the tasks of language modelling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset, Features, Value
from torch import Tensor
from transformers import EvalPrediction

from .metrics import Accuracy, Perplexity

IGNORED = -100
TOKEN_FEATURES = Features({"input_ids": Value("binary")})


@dataclass(frozen=True)
class DecodeTokens:
    """Decode a `binary` column of L tokens to `input_ids` and `labels`, int64 (B, L): a transform for `datasets`.

    Labels equal the inputs: models shift them by one themselves.

    Attributes:
        length: L.
        dtype: NumPy's name of the type of a stored token.
    """

    length: int
    dtype: str = "uint8"

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Tensor]:
        rows = batch["input_ids"]
        ids = np.frombuffer(b"".join(rows), dtype=self.dtype).reshape(len(rows), self.length)
        tokens = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": tokens, "labels": tokens.clone()}


def packed_bytes(documents: list[bytes], length: int) -> Dataset:
    """Join documents, each followed by a zero byte, and divide them into sequences of `length` bytes; drop the rest.

    Args:
        documents: less than 2 GiB in all.
        length: bytes of a sequence, >= 1.

    Returns:
        a data set of `input_ids` and `labels`, int64 (length,) with values in [0, 256).

    Raises:
        ValueError: if there are too few bytes for one sequence.
    """
    stream = b"".join(document + b"\0" for document in documents)
    count = len(stream) // length
    if count == 0:
        raise ValueError(f"{len(stream)} bytes are too few for one sequence of {length}; choose a smaller length")
    # The rows lie one after the other in memory already: Arrow needs to know only where each begins.
    starts = pyarrow.py_buffer(np.arange(count + 1, dtype=np.int32) * np.int32(length))
    rows = pyarrow.Array.from_buffers(pyarrow.binary(), count, [None, starts, pyarrow.py_buffer(stream)])
    dataset = Dataset.from_dict({"input_ids": rows}, features=TOKEN_FEATURES)
    return dataset.with_transform(DecodeTokens(length))


def token_scores(logits: Any, labels: Tensor) -> Tensor:
    """Replace the logits of each token by its negative log-likelihood and whether the prediction is right.

    The Trainer takes this function as `preprocess_logits_for_metrics`.

    Args:
        logits: (B, L, V), or a tuple that starts with them.
        labels: (B, L), with -100 where a token does not count.

    Returns:
        float32 (B, L - 1, 2), for the tokens from the second on.
    """
    logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
    wanted = labels[:, 1:].to(logits.device)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return torch.stack([nll.view_as(wanted), (logits.argmax(-1) == wanted).float()], dim=-1)


def language_metrics(unit: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make a `compute_metrics` for `token_scores`: `accuracy`, and the mean negative log-likelihood, `nats_per_<unit>`.

    If the unit is "token", there is also its exponential, `perplexity`.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        scores, counted = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)[:, 1:] != IGNORED
        nll, correct = scores[..., 0][counted], scores[..., 1][counted].astype(int)
        found: Any = Perplexity().compute(nll=nll, num_tokens=np.ones(len(nll), dtype=int))
        right: Any = Accuracy().compute(predictions=correct, references=np.ones(len(correct), dtype=int))
        scores = {f"nats_per_{unit}": found["nats_per_token"], "accuracy": right["accuracy"]}
        return scores | ({"perplexity": found["perplexity"]} if unit == "token" else {})

    return compute
