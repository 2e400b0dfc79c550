"""Load the data for a saved model: batches to rank states on, and a held-out part to evaluate on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import EvalPrediction, default_data_collator
from transformers.trainer_pt_utils import nested_concat

from ..data import Task, load_task, task_names
from ..data.language import IGNORED
from ..data.text_files import text_task
from ..models.heads import CLASS_ENDINGS
from ..models.saved import TOKENIZER_FILES, has_feature_extractor
from ..moved import old_names
from ..progress import with_progress
from ..surgery import needs_calibration
from ..training.calibration import calibration_batches
from .arguments import DataSource
from .early_checks import check_source

__getattr__ = old_names(__name__)

TOKENISED = ("text", "wikitext")
"""Tasks with an option `tokenizer`, which here is the model's own unless given."""
NORMALISED = ("series",)
"""Tasks with an option `feature_extractor`, which here is the model's own unless given."""
PADDING = 256
"""A model's vocabulary is often padded to a multiple of a power of two; a larger difference means other data."""


def load_data(source: DataSource, model: Any, tokenizer: Any) -> Task:
    """Load the task or text that a source names, and check that the model reads such data.

    Args:
        source: where the data come from.
        model: a loaded model.
        tokenizer: of the model; None if it has none.

    Raises:
        ValueError: if there is no such task or file, or the model was made for other data.
        OSError: if the data cannot be read.
    """
    check_source(source)
    if source.name in task_names():
        options: dict[str, Any] = {} if source.length is None else {"length": source.length}
        if source.name in TOKENISED and tokenizer is not None:
            options["tokenizer"] = tokenizer.name_or_path
        if source.name in NORMALISED and has_feature_extractor(model.name_or_path):
            options["feature_extractor"] = model.name_or_path
        task = load_task(source.name, data_dir=source.data_dir, seed=source.seed, **(options | dict(source.options)))
        _check_task(model, task)
        return task
    _check_vocabulary(model, tokenizer)
    return text_task(source.name, tokenizer, length=source.length or 512, sequences=source.batches * source.batch_size)


def draw_calibration(
    model: Any, source: DataSource | None, task: Task | None, rank: int = 0, processes: int = 1
) -> list[Mapping[str, Any]] | None:
    """Draw the batches to rank states on, or a process's part of them; None if the model has no layer that needs them.

    Args:
        model: a loaded model.
        source: how many batches of which size; None if no data were given.
        task: the data that were loaded.
        rank, processes: with several processes each gets its own part.

    Raises:
        ValueError: if there is no data and the model needs it.
    """
    if not needs_calibration(model):
        return None
    if source is None or task is None:
        raise ValueError(
            f"{type(model).__name__} has layers whose states can only be ranked on data: give --data a task or a text "
            f"file. Tasks: {', '.join(task_names())}"
        )
    loader = _loader(task, task.train, source.batch_size)
    return calibration_batches(loader, source.batches, source.seed, rank, processes)


@torch.no_grad()
def evaluate(
    model: Any, task: Task, batch_size: int, split: str = "test", rank: int = 0, processes: int = 1
) -> dict[str, float]:
    """Compute the mean loss on a held-out part, per counted label, and the task's metrics.

    Args:
        model: causal language model or classifier.
        task: as the model's head wants it.
        batch_size: sequences of a batch.
        split: of the task: train, validation or test.
        rank, processes: with several processes each takes its own part; all get the same result.

    Raises:
        ValueError: if the model's head is not the task's.
    """
    head = CLASS_ENDINGS[task.problem]
    if not type(getattr(model, "get_base_model", lambda: model)()).__name__.endswith(head):
        raise ValueError(f"{task.name!r} has labels for a model {head}, so {type(model).__name__} has no loss on it")
    found: list[tuple[float, int, np.ndarray, np.ndarray]] = []
    part = getattr(task, split)
    part = part.shard(processes, rank, contiguous=True) if processes > 1 else part
    for batch in with_progress(_loader(task, part, batch_size), "evaluating", "batch"):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        outputs, labels = model(**batch), batch["labels"]
        scores = outputs.logits.float()
        if task.preprocess_logits_for_metrics is not None:
            scores = task.preprocess_logits_for_metrics(scores, labels)
        counted = labels[:, 1:] if task.problem == "causal_lm" else labels
        weight = int((counted != IGNORED).sum())
        found.append((float(outputs.loss), weight, scores.cpu().numpy(), labels.cpu().numpy()))
    found = gather_object(found) if processes > 1 else found
    losses, weights, predictions, references = zip(*found, strict=True)
    prediction = EvalPrediction(_joined(predictions), _joined(references))
    return {"loss": float(np.average(losses, weights=weights)), **task.compute_metrics(prediction)}


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate, padded to one length where there are scores for each step."""
    return functools.reduce(nested_concat, parts)


def _check_task(model: Any, task: Task) -> None:
    for key, slack in {"vocab_size": PADDING, "num_channels": 1}.items():
        wanted, present = task.model_kwargs.get(key), getattr(model.config.get_text_config(), key, None)
        if wanted is not None and (present is None or not 0 <= present - wanted < slack):
            raise ValueError(f"the task {task.name!r} is for models with {key} {wanted}; this one has {present}")
    for key in ("prediction_length", "prediction_channel_indices", "quantiles"):
        wanted, present = task.model_kwargs.get(key), getattr(model.config, key, None)
        if key in task.model_kwargs and wanted != present:
            raise ValueError(f"the task {task.name!r} is for models with {key} {wanted}; this one has {present}")


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    config = model.config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if getattr(config, "num_channels", None) is not None or vocabulary is None:
        raise ValueError(f"this {type(model).__name__} reads continuous values, not text: give --data a task")
    if tokenizer is None and vocabulary != 256:
        raise ValueError(
            f"the model has no tokenizer (no {' or '.join(TOKENIZER_FILES)} beside it), and its vocabulary of "
            f"{vocabulary} is not that of bytes, 256. Save the tokenizer with the model, or give --data a task."
        )
    if tokenizer is not None and len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}")


def _loader(task: Task, split: Any, batch_size: int) -> DataLoader:
    return DataLoader(split, batch_size=batch_size, collate_fn=task.collator or default_data_collator)
