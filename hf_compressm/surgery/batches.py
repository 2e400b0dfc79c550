"""Select the model inputs of a calibration batch, and unpack sequences that are packed into one row.

Shapes: batch B, length L.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .wrappers import class_name, uncompiled

logger = logging.get_logger(__name__)

_LABELS = ("labels", "label", "label_ids")
_INPUTS = ("input_ids", "inputs_embeds", "input_values")
_PACKING = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "max_length_q", "max_length_k")
_LIBRARIES = ("transformers.", "hf_compressm.", "transformers_modules.")


def model_inputs(model: nn.Module, batch: Any) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the forward passes that read a batch: one, or some for a batch of packed sequences.

    Fields that the model's forward does not name are left out, as are labels, unless it requires them; use_cache=False
    and logits_to_keep=1 are added where it has them. A forward with `**kwargs` of a model of your own gets all fields.

    Sequences that are packed into one row (as `position_ids` that begin anew, `seq_idx` or `cu_seq_lens_q` tell) are
    read as rows of their own, of similar lengths together, padded on the right.

    Raises:
        TypeError: if the batch is not a mapping.
        ValueError: if it lacks what the model's forward needs.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a calibration batch must be a mapping from names to tensors; got {type(batch).__name__}. "
            "For a list of examples use a DataLoader with a collator."
        )
    # A model within PEFT's names what it takes; PEFT's own forward passes on whatever it is given.
    whole = uncompiled(model)
    named = uncompiled(getattr(whole, "get_base_model", lambda: whole)())
    parameters = inspect.signature(named.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not _of_a_library(named.forward)
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind not in variable}
    fields = {name: value for name, value in batch.items() if name not in _LABELS or name in needed}
    inputs = {*_INPUTS, getattr(named, "main_input_name", "input_ids")} & {*parameters, *(fields if takes_all else ())}
    if not needed <= fields.keys() or not (inputs & fields.keys() or needed):
        raise ValueError(
            f"calibration batch with fields {', '.join(map(str, batch))}: there is no input for "
            f"{class_name(model)}.forward, which takes {', '.join(sorted(inputs | needed))} and attention_mask"
        )
    known = {name: value for name, value in fields.items() if takes_all or name in parameters or name in _PACKING}
    if left := sorted(map(str, fields.keys() - known.keys())):
        logger.warning_once(
            f"States are ranked without {', '.join(left)}, which {type(named).__name__}.forward does not name."
        )
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in known.items()}
    economy: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if "logits_to_keep" in parameters and not needed & {*_LABELS}:
        economy["logits_to_keep"] = 1
    for part in _unpacked(moved, inputs | needed):
        yield economy | {name: value for name, value in part.items() if takes_all or name in parameters}


def _of_a_library(forward: Any) -> bool:
    """Whether a forward is of a library: its `**kwargs` ignore unknown fields, a user's own may use them."""
    return getattr(inspect.unwrap(forward), "__module__", "").startswith(_LIBRARIES)


def _unpacked(fields: dict[str, Any], inputs: set[str]) -> Iterator[dict[str, Any]]:
    """The fields with each packed sequence in a row of its own; unchanged if nothing is packed."""
    sequences = next((value for name, value in fields.items() if name in inputs and isinstance(value, Tensor)), None)
    starts = None if sequences is None or sequences.ndim < 2 else _starts(fields, sequences)
    if starts is None or starts.sum(1).max() < 2:
        yield {name: value for name, value in fields.items() if starts is None or name not in _PACKING[1:]}
        return
    assert sequences is not None
    shape, mask = sequences.shape[:2], fields.get("attention_mask")
    real = torch.ones_like(starts) if mask is None else mask != 0
    lengths = torch.bincount(starts.flatten().cumsum(0)[real.flatten()] - 1, minlength=int(starts.sum())).tolist()
    rows = {
        name: value.flatten(0, 1)[real.flatten()].split(lengths)
        for name, value in fields.items()
        if name not in _PACKING and isinstance(value, Tensor) and value.shape[:2] == shape
    }
    rows["attention_mask"] = tuple(torch.ones(n, dtype=torch.long, device=starts.device) for n in lengths)
    # Together go lengths within a factor of two, so that padding at most doubles the work.
    for size in sorted({length.bit_length() for length in lengths} - {0}):
        chosen = [i for i, length in enumerate(lengths) if length.bit_length() == size]
        yield {name: pad_sequence([row[i] for i in chosen], batch_first=True) for name, row in rows.items()}


def _starts(fields: Mapping[str, Any], sequences: Tensor) -> Tensor | None:
    """Where sequences begin, bool (B, L), by the first field that tells; None if none does."""
    shape = sequences.shape[:2]
    first = torch.zeros(shape, dtype=torch.bool, device=sequences.device)
    first[:, 0] = True
    mask = fields.get("attention_mask")
    if mask is not None and tuple(mask.shape) != tuple(shape):
        return None
    for name, step in (("seq_idx", 0), ("position_ids", 1)):
        value = fields.get(name)
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == shape[1] and len(value) in (1, shape[0]):
            value = value.expand(shape)
            first[:, 1:] = value.diff(dim=1) != step
            # Positions of padding tell nothing, but for where the first real token behind it begins.
            return first if mask is None else _starts_of_real(first, mask != 0)
    for name in ("cu_seq_lens_q", "cu_seqlens"):
        value = fields.get(name)
        if isinstance(value, Tensor) and shape[0] == 1:
            ends = value.flatten().long()
            first[0, ends[ends < shape[1]]] = True
            return first
    return None


def _starts_of_real(first: Tensor, real: Tensor) -> Tensor:
    """The starts among real tokens; the first real token of a row is one."""
    leading = real & (real.long().cumsum(1) == 1)
    return (first & real) | leading
