"""Is a checkpoint whole, and do its files agree? Asked before training goes on from it, so that no code in it is run.

JSON and safetensors are data. The Trainer's own files are pickles, which torch reads with `weights_only`: tensors and
plain values, and an error at anything that could run code.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import typing
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, TrainerState
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...compatibility import saved_form
from ...surgery import Snapshot, check_fixed_tensors, find_mixers, last_sizes, sizes_in_state_dict
from ...surgery import record_keys as keys
from ..stability import StabilityTracker
from .resume import load_callback_state

MOMENTS = ("exp_avg", "momentum_buffer")
"""Optimizer state of the shape of its parameter; at least one of them in every optimizer that keeps any such."""


def verify_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Check that training can go on from a checkpoint: its files can be read, and agree with each other.

    Of the weights only headers are read, so a changed value goes unnoticed; that is what a manifest is for. Files of
    the Trainer that a checkpoint may lack, such as the optimizer's, are checked if they are there.

    Raises:
        FileNotFoundError: if the folder lacks a config, the Trainer's state or safetensors weights.
        ValueError: if a file is damaged or could run code, a tensor's shape disagrees with the config, or the
            compression callback's state belongs to another model; the message names the file or tensor.
    """
    folder = Path(folder)
    model = _planned_model(folder)
    shapes = _weight_shapes(folder)
    prefix = f"{model.base_model_prefix}."
    prefix = prefix if any(key.startswith(prefix) for key in shapes) else ""
    if (renamed := _model_under_other_names(model.config, shapes, folder)) is not None:
        model, shapes, prefix = renamed, dict(renamed.state_dict()), ""
    _compare(model, shapes, prefix, folder)
    exported = exported_state(folder, keys.CALLBACK)
    records, judging = ([], None) if exported is None else read_exported(exported)
    check_history(records, model)
    _check_pickles(folder, shapes)
    if (tensors := load_callback_state([folder])) is not None:
        pending_work(tensors, model, str(folder / keys.STATE_FILE), prefix)


def exported_state(folder: str | os.PathLike[str], name: str) -> Any:
    """What a callback of this name exported into a checkpoint; None if it did not.

    Raises:
        FileNotFoundError, ValueError: the Trainer's state is missing or damaged.
    """
    callbacks: Any = _read_trainer_state(Path(folder)).stateful_callbacks
    return callbacks.get(name)


def read_exported(exported: Any) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The compression history, and the cut that is still to be judged, from what the callback exported.

    Raises:
        ValueError: if it is not what a callback exports.
    """
    try:
        saved = keys.saved_in(exported)
        records, judging = saved["history"], saved["judging"]
        _check_records(records)
        if judging is not None:
            numbers = [judging["step"], judging["reference"], *([judging["value"]] if judging["undo"] else [])]
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise TypeError(f"numbers expected, got {numbers}")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the compression callback's entry in {TRAINER_STATE_NAME} is malformed: {_say(error)}. Use another "
            "checkpoint."
        ) from error
    return records, judging


def check_history(records: list[dict[str, Any]], model: nn.Module) -> None:
    """Raise ValueError unless the changes of size on record led to the state sizes that the weights have."""
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
    with _reading(source):
        snapshot = None if keys.SNAPSHOT not in tensors else Snapshot(**tensors[keys.SNAPSHOT])
        if snapshot is not None:
            sizes = {prefix + name: size for name, size in sizes_in_state_dict(model, snapshot.tensors, prefix).items()}
            if sizes != snapshot.sizes:
                raise ValueError(f"its tensors have state sizes {sizes}, it speaks of {snapshot.sizes}")
            check_fixed_tensors(model, snapshot.tensors, prefix, complete=True)
            _check_moments(snapshot.optimizer, snapshot.tensors)
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
    with _reading(path):
        content = json.loads(path.read_text())
        kind = content["model_type"]
        if kind not in CONFIG_MAPPING:  # otherwise it would be guessed from the folder's name, or code fetched for it
            raise ValueError(f"unknown model_type {kind!r}")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for records in _histories(content):
            _check_records(records)
        with torch.device("meta"):
            return AutoModel.from_config(config, trust_remote_code=False)


def _model_under_other_names(config: Any, shapes: Mapping[str, torch.Tensor], folder: Path) -> Any:
    """The saved model, without memory for its tensors, if transformers saves it under other names than it trains with.

    None where the names are the model's own, or of no class of transformers.

    Raises:
        ValueError: if the shapes of tensors disagree with the config, or tensors are missing.
    """
    with _reading(folder / CONFIG_NAME), torch.device("meta"):
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


def _weight_shapes(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors on the meta device, of the shapes in a checkpoint's weight files."""
    index, files = folder / SAFE_WEIGHTS_INDEX_NAME, {SAFE_WEIGHTS_NAME}
    if index.is_file():
        with _reading(index):
            files = set(json.loads(index.read_text())["weight_map"].values())
            if outside := [name for name in files if Path(name).name != name]:
                raise ValueError(f"{outside[0]!r} is not the name of a file in this folder")
    shapes = {}
    for file in sorted(files):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {file}; it is not a complete checkpoint. Weights are read from safetensors only."
            )
        with _reading(folder / file), safe_open(folder / file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  not a dict
                shapes[key] = torch.empty(weights.get_slice(key).get_shape(), device="meta")
    return shapes


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


def _read_trainer_state(folder: Path) -> TrainerState:
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {TRAINER_STATE_NAME}; it is not a complete checkpoint")
    with _reading(path):
        state = TrainerState.load_from_json(str(path))
        for name, hint in typing.get_type_hints(TrainerState).items():
            value, kinds = getattr(state, name), _kinds(hint)
            if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"{name} cannot be {value!r}")
        if not isinstance(state.global_step, int) or state.global_step < 0:
            raise ValueError(f"global_step cannot be {state.global_step!r}")
        if not isinstance(state.stateful_callbacks, dict) or not all(isinstance(e, dict) for e in state.log_history):
            raise ValueError("stateful_callbacks must be a mapping, and log_history a list of mappings")
    return state


def _kinds(hint: Any) -> set[type]:
    """Classes whose values a field with this type hint may hold after a passage through JSON."""
    kinds = {typing.get_origin(part) or part for part in typing.get_args(hint) or (hint,)}
    kinds = {typing.get_origin(hint)} if typing.get_origin(hint) in (list, dict) else kinds
    kinds |= {int, float} if kinds & {int, float} else set()
    return kinds | {dict} if list in kinds else kinds  # callbacks are a list in memory, a mapping in the file


def _check_pickles(folder: Path, shapes: Mapping[str, torch.Tensor]) -> None:
    """Read the Trainer's own files as data, and check that they are what it writes."""
    if (path := folder / OPTIMIZER_NAME).is_file():
        with _reading(path):
            content = _load(path, "meta")
            if not all(isinstance(group["params"], list) for group in content["param_groups"]):
                raise ValueError("its groups have no parameters")
            _check_moments(content["state"], shapes)
    if (path := folder / SCHEDULER_NAME).is_file():
        with _reading(path):
            int(_load(path)["last_epoch"])
    if (path := folder / SCALER_NAME).is_file():
        with _reading(path):
            dict(_load(path))
    for path in sorted(folder.glob("rng_state*.pth")):
        with _reading(path):
            content = _load(path)
            random.Random().setstate(content["python"])
            np.random.RandomState().set_state(content["numpy"])
            torch.Generator().set_state(content["cpu"])


def _load(path: Path, device: str = "cpu") -> Any:
    try:
        with safe_globals():
            return torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's own message advises to load it all the same
        raise ValueError(
            "it is damaged, or holds more than tensors and plain values, which could run code; none was run"
        ) from error


def _check_moments(states: Mapping[Any, Mapping[str, Any]], shapes: Mapping[str, Any]) -> None:
    """Raise ValueError if an optimizer's state cannot be that of the parameters with these shapes, in any order."""
    for key in MOMENTS:
        found = Counter(
            tuple(state[key].shape) for state in states.values() if isinstance(state.get(key), torch.Tensor)
        )
        if foreign := found - Counter(tuple(tensor.shape) for tensor in shapes.values()):
            raise ValueError(f"it belongs to other weights: {key} of shape {next(iter(foreign))} has no parameter")


def _check_records(records: list[dict[str, Any]]) -> None:
    """Raise KeyError or TypeError unless every change of size on record names layers and their sizes."""
    for record in records:
        if record["event"] in ("cut", "undo"):
            _ = [(layer["name"], layer["new_size"]) for layer in record["layers"]]


def _histories(config: Any) -> Iterator[Any]:
    """The compression histories in a config and in the configs within it."""
    if isinstance(config, dict):
        yield config.get(keys.HISTORY) or []
        for name, value in config.items():
            if name != keys.HISTORY:
                yield from _histories(value)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Whatever a reader of a damaged file raises becomes a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {_say(error)}. Use another checkpoint.") from error


def _say(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
