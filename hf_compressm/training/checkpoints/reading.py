"""Read the files of a checkpoint as data, so that no code in them is run, and check each on its own.

JSON and safetensors are data. The Trainer's own files are pickles, which torch reads with `weights_only`: tensors and
plain values, and an error at anything that could run code.
"""

from __future__ import annotations

import json
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
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

MOMENTS = ("exp_avg", "momentum_buffer")
"""Optimizer state of the shape of its parameter; at least one of them in every optimizer that keeps any such."""


def read_weight_shapes(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors on the meta device, (saved shape) each, by their names in a checkpoint's weight files.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged.
    """
    shapes = {}
    for file in weight_files(folder):
        with reading(file), safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  not a dict
                shapes[key] = torch.empty(weights.get_slice(key).get_shape(), device="meta")
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if their index is damaged.
    """
    index, files = folder / SAFE_WEIGHTS_INDEX_NAME, {SAFE_WEIGHTS_NAME}
    if index.is_file():
        with reading(index):
            files = set(json.loads(index.read_text())["weight_map"].values())
            if outside := [name for name in files if Path(name).name != name]:
                raise ValueError(f"{outside[0]!r} is not the name of a file in this folder")
    for file in sorted(files):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {file}; it is not a complete checkpoint. Weights are read from safetensors only."
            )
    return [folder / file for file in sorted(files)]


def read_trainer_state(folder: Path) -> TrainerState:
    """The Trainer's state in a checkpoint.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged, or a field has a value of the wrong type.
    """
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {TRAINER_STATE_NAME}; it is not a complete checkpoint")
    with reading(path):
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


def check_pickles(folder: Path, shapes: Mapping[str, torch.Tensor]) -> None:
    """Read the Trainer's own files as data, and check that they are what it writes.

    Args:
        folder: the checkpoint.
        shapes: the weights, (saved shape) each, to which the optimizer's state must belong.

    Raises:
        ValueError: if a file is damaged, could run code, or belongs to other weights.
    """
    if (path := folder / OPTIMIZER_NAME).is_file():
        with reading(path):
            content = load_pickle(path, "meta")
            if not all(isinstance(group["params"], list) for group in content["param_groups"]):
                raise ValueError("its groups have no parameters")
            check_moments(content["state"], shapes)
    if (path := folder / SCHEDULER_NAME).is_file():
        with reading(path):
            int(load_pickle(path)["last_epoch"])
    if (path := folder / SCALER_NAME).is_file():
        with reading(path):
            dict(load_pickle(path))
    for path in sorted(folder.glob("rng_state*.pth")):
        with reading(path):
            content = load_pickle(path)
            random.Random().setstate(content["python"])
            np.random.RandomState().set_state(content["numpy"])
            torch.Generator().set_state(content["cpu"])


def load_pickle(path: Path, device: str = "cpu") -> Any:
    """What a file of torch.save holds, read as tensors and plain values.

    Raises:
        ValueError: if it holds anything else.
    """
    try:
        with safe_globals():
            return torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's own message advises to load it all the same
        raise ValueError(
            "it is damaged, or holds more than tensors and plain values, which could run code; none was run"
        ) from error


def check_moments(states: Mapping[Any, Mapping[str, Any]], shapes: Mapping[str, Any]) -> None:
    """Check that an optimizer's state can be that of parameters with these shapes, in any order.

    Raises:
        ValueError: if a moment has the shape of no parameter that is left.
    """
    for key in MOMENTS:
        found = Counter(
            tuple(state[key].shape) for state in states.values() if isinstance(state.get(key), torch.Tensor)
        )
        if foreign := found - Counter(tuple(tensor.shape) for tensor in shapes.values()):
            raise ValueError(f"it belongs to other weights: {key} of shape {next(iter(foreign))} has no parameter")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn any error of reading a file into a ValueError that names the file.

    Raises:
        ValueError: as it says.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {message_of(error)}. Use another checkpoint.") from error


def message_of(error: Exception) -> str:
    """The message of an error, with its type unless that is ValueError."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
