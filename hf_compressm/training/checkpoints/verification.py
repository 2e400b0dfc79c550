"""Check that a checkpoint is whole and that its files belong together, before training goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME

from ...compatibility import saved_form
from ...surgery import Snapshot, check_fixed_tensors, find_mixers, last_sizes, sizes_in_state_dict
from ...surgery import record_keys as keys
from ..stability import StabilityTracker
from .contents import check_records, exported_state, load_callback_state, read_exported
from .reading import check_moments, check_pickles, reading
from .sharded_files import check_sharded_moments, saved_weight_shapes


def verify_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Check that training can go on from a checkpoint: its files can be read, and agree with each other.

    Of the weights only headers are read, so a changed value goes unnoticed; that is what a manifest is for. Files of
    the Trainer that a checkpoint may lack, such as the optimizer's, are checked if they are there.

    Raises:
        FileNotFoundError: if the folder lacks a config, the Trainer's state or weights (safetensors, or FSDP2's), or
            one rank's shard of them.
        ValueError: if a file is damaged or could run code, a tensor's shape disagrees with the config, or the
            compression callback's state belongs to another model; the message names the file or tensor.
    """
    folder = Path(folder)
    model = _planned_model(folder)
    shapes = saved_weight_shapes(folder)
    prefix = f"{model.base_model_prefix}."
    prefix = prefix if any(key.startswith(prefix) for key in shapes) else ""
    if (renamed := _model_under_other_names(model.config, shapes, folder)) is not None:
        model, shapes, prefix = renamed, dict(renamed.state_dict()), ""
    _compare(model, shapes, prefix, folder)
    exported = exported_state(folder, keys.CALLBACK)
    records, judging = ([], None) if exported is None else read_exported(exported)
    check_history(records, model)
    check_pickles(folder, shapes)
    check_sharded_moments(folder, shapes)
    if (tensors := load_callback_state([folder])) is not None:
        pending_work(tensors, model, str(folder / keys.STATE_FILE), prefix)


def check_history(records: list[dict[str, Any]], model: nn.Module) -> None:
    """Check that the changes of size on record lead to the state sizes that the weights have.

    Raises:
        ValueError: if they do not.
    """
    recorded = last_sizes(model, records)
    present = {site.name: site.state_size for site in find_mixers(model)}
    if recorded and recorded != {name: present[name] for name in recorded}:
        raise ValueError(
            f"the checkpoint's compression history ends with state sizes {list(recorded.values())}, its weights have "
            f"{list(present.values())}; the checkpoint is inconsistent. Resume from another one."
        )


def pending_work(
    tensors: Mapping[str, Any], model: nn.Module, source: str, prefix: str = ""
) -> tuple[Snapshot | None, StabilityTracker | None]:
    """The copy of the model from before a cut, and the ranking's record, if the callback saved them.

    Args:
        tensors: what `load_callback_state` read.
        model: the model that they must belong to.
        source: the file, for the message.
        prefix: what precedes the model's own names in it.

    Raises:
        ValueError: if they are malformed or belong to another model.
    """
    with reading(source):
        snapshot = None if keys.SNAPSHOT not in tensors else Snapshot(**tensors[keys.SNAPSHOT])
        if snapshot is not None:
            sizes = {prefix + name: size for name, size in sizes_in_state_dict(model, snapshot.tensors, prefix).items()}
            if sizes != snapshot.sizes:
                raise ValueError(f"its tensors have state sizes {sizes}, it speaks of {snapshot.sizes}")
            check_fixed_tensors(model, snapshot.tensors, prefix, complete=True)
            check_moments(snapshot.optimizer, snapshot.tensors)
            for name, gradient in snapshot.gradients.items():
                if gradient.shape != snapshot.tensors[name].shape:
                    raise ValueError(f"the gradient of {name} has shape {tuple(gradient.shape)}")
        tracker = None
        if keys.TRACKER in tensors:
            tracker = StabilityTracker(threshold=1.0)
            measurements = tensors[keys.TRACKER]["measurements"].items()
            own = {name.removeprefix(prefix): measurement for name, measurement in measurements}
            tracker.load_state_dict({**tensors[keys.TRACKER], "measurements": own}, model)
    return snapshot, tracker


def _planned_model(folder: Path) -> Any:
    """The model that a checkpoint's config describes, without memory for its tensors."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; it is not a complete checkpoint")
    with reading(path):
        content = json.loads(path.read_text())
        kind = content["model_type"]
        if kind not in CONFIG_MAPPING:  # otherwise it would be guessed from the folder's name, or code fetched for it
            raise ValueError(f"unknown model_type {kind!r}")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for records in _histories(content):
            check_records(records)
        with torch.device("meta"):
            return AutoModel.from_config(config, trust_remote_code=False)


def _model_under_other_names(config: Any, shapes: Mapping[str, torch.Tensor], folder: Path) -> Any:
    """The saved model, without memory for its tensors, if transformers saves it under other names than it trains with.

    None where the names are the model's own, or of no class of transformers.

    Raises:
        ValueError: if the shapes of tensors disagree with the config, or tensors are missing.
    """
    with reading(folder / CONFIG_NAME), torch.device("meta"):
        cls = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
            return None
        model: Any = cls(config)
    own = model.state_dict(keep_vars=True)
    if not shapes.keys() - own.keys():
        return None
    expected = saved_form(model, own)
    if shapes.keys() - expected.keys():
        return None
    wrong = [
        f"{name} is {tuple(shape.shape)}, the config wants {tuple(expected[name].shape)}"
        for name, shape in shapes.items()
        if shape.shape != expected[name].shape
    ]
    present = {id(expected[name]) for name in shapes}
    wrong += [
        f"{name} is missing, and would start anew" for name, tensor in expected.items() if id(tensor) not in present
    ]
    _refuse(wrong, folder)
    return model


def _compare(model: nn.Module, shapes: Mapping[str, torch.Tensor], prefix: str, folder: Path) -> None:
    own = model.state_dict(keep_vars=True)
    wrong = [
        f"{prefix}{name} is {tuple(shapes[prefix + name].shape)}, the config wants {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if prefix + name in shapes and shapes[prefix + name].shape != tensor.shape
    ]
    present = {id(tensor) for name, tensor in own.items() if prefix + name in shapes}  # one of several names will do
    wrong += [
        f"{prefix}{name} is missing, and would start anew" for name, tensor in own.items() if id(tensor) not in present
    ]
    _refuse(wrong, folder)


def _refuse(wrong: list[str], folder: Path) -> None:
    if wrong:
        raise ValueError(
            f"the tensors in {folder} disagree with its {CONFIG_NAME}: {'; '.join(wrong[:4])}"
            f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}. Restore the {CONFIG_NAME} that was saved with "
            "them, or use another checkpoint."
        )


def _histories(config: Any) -> Iterator[Any]:
    """The compression histories in a config and in the configs within it."""
    if isinstance(config, dict):
        yield config.get(keys.HISTORY) or []
        for name, value in config.items():
            if name != keys.HISTORY:
                yield from _histories(value)
