"""Metrics with the interface of `evaluate` that load no script and so need no network."""

import math
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from transformers import EvalPrediction


class _InMemoryMetric(evaluate.Metric):
    """Keeps its inputs in memory, so that instances and processes do not share a cache file.

    With `num_process > 1`, `evaluate` has to exchange files; then `experiment_id` must name the evaluation.
    """

    def __init__(self, **kwargs: Any):
        distributed = kwargs.get("num_process", 1) > 1
        if distributed and kwargs.get("experiment_id") is None:
            raise ValueError("num_process > 1 needs an experiment_id that no other running evaluation uses")
        kwargs.setdefault("keep_in_memory", not distributed)
        super().__init__(**kwargs)

    def _build_data_dir(self) -> str:
        # The parent creates this folder even when nothing will be written to it.
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def _finalize(self) -> None:
        if self.writer is None:
            names = ", ".join(self._feature_names())
            raise ValueError(f"{self.name} has nothing to compute: call add_batch, or give compute {names}")
        super()._finalize()


class Accuracy(_InMemoryMetric):
    """The share of predictions that equal their reference.

    `add_batch` and `compute` take `predictions` and `references`, class indices of any integer type and shape
    (n,). `compute` returns `{"accuracy": float in [0, 1]}`.

    Raises:
        ValueError: if the two differ in length, are not integers, or if nothing was added.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions, references: class indices, shape (n,).",
            # float64, because as integers 0.9 would arrive as 0
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        if not predictions:
            raise ValueError("accuracy of no predictions is undefined")
        classes = np.array([predictions, references])
        if (classes != np.rint(classes)).any():
            raise ValueError("accuracy takes class indices, not probabilities or logits: found fractions")
        return {"accuracy": float(np.mean(classes[0] == classes[1]))}


class Perplexity(_InMemoryMetric):
    """exp of the mean negative log-likelihood per token.

    `add_batch` and `compute` take two arrays of shape (n,): `nll`, float, mean negative log-likelihoods in
    nats, and `num_tokens`, int >= 1, the number of tokens that each mean is over. For values of single tokens
    that is 1; for a batch's loss it is the number of tokens which the loss counts, so that batches of unequal
    size weigh right: nats = sum(nll * num_tokens) / sum(num_tokens).

    `compute` returns `{"perplexity": exp(nats), "nats_per_token": nats}`, the first infinite where it exceeds
    the range of a float.

    Raises:
        ValueError: if the two differ in length, if a count is below 1, or if nothing was added.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood per token.",
            citation="",
            inputs_description="nll: nats per token, shape (n,). num_tokens: tokens in each, shape (n,).",
            features=Features({"nll": Value("float64"), "num_tokens": Value("int64")}),
        )

    def _compute(self, nll: list[float], num_tokens: list[int]) -> dict[str, float]:
        if not nll:
            raise ValueError("perplexity of no tokens is undefined")
        if min(num_tokens) < 1:
            raise ValueError(f"num_tokens must be at least 1, got {min(num_tokens)}")
        nats = float(np.average(nll, weights=num_tokens))
        try:
            perplexity = math.exp(nats)
        except OverflowError:
            perplexity = math.inf
        return {"perplexity": perplexity, "nats_per_token": nats}


def classification_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """Compute the accuracy of the largest logit: a `compute_metrics` for classification.

    Args:
        eval_prediction: `predictions` are the logits, float of shape (n, num_labels), or a tuple that starts
            with them; `label_ids` are class indices of shape (n,).

    Raises:
        ValueError: if the shapes are others.
    """
    logits = eval_prediction.predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    labels = np.asarray(eval_prediction.label_ids)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits (n, num_labels) and labels (n,), got shapes {logits.shape} and {labels.shape}"
        )
    return Accuracy().compute(predictions=logits.argmax(axis=-1), references=labels)
