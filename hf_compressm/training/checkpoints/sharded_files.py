"""Read what Accelerate writes of a model under FSDP2: whole files (FULL_STATE_DICT) or a folder of shards (SHARDED).

A folder of shards is a checkpoint of torch.distributed.checkpoint: one file from each rank, and `.metadata`, a pickle,
which is read here as data: its classes are known by name, and an error at anything else.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME

from .reading import check_moments, load_pickle, read_weight_shapes, reading

WHOLE_WEIGHTS, SHARDED_WEIGHTS = f"{FSDP_MODEL_NAME}.bin", f"{FSDP_MODEL_NAME}_0"
WHOLE_MOMENTS, SHARDED_MOMENTS = f"{OPTIMIZER_NAME}.bin", f"{OPTIMIZER_NAME}_0"
METADATA = ".metadata"

_METADATA_CLASSES = (
    *("Metadata", "TensorProperties", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta"),
    *("MetadataIndex", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
_NAMES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES),
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
}


def sharded_format(folder: Path) -> str | None:
    """In which of Accelerate's formats a checkpoint of FSDP2 is, by its name there; None if it is none of FSDP2."""
    if (folder / WHOLE_WEIGHTS).is_file():
        return "FULL_STATE_DICT"
    return "SHARDED_STATE_DICT" if (folder / SHARDED_WEIGHTS).is_dir() else None


def saved_weight_shapes(folder: Path) -> dict[str, torch.Tensor]:
    """As `sharded_weight_shapes`, or of the safetensors files if the checkpoint is not one of FSDP2.

    Raises:
        FileNotFoundError, ValueError: as there.
    """
    return read_weight_shapes(folder) if sharded_format(folder) is None else sharded_weight_shapes(folder)


def sharded_weight_shapes(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors on the meta device, (saved shape) each, by the model's own names, of a checkpoint of FSDP2.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged or could run code.
    """
    if sharded_format(folder) == "FULL_STATE_DICT":
        with reading(folder / WHOLE_WEIGHTS):
            return dict(load_pickle(folder / WHOLE_WEIGHTS, "meta"))
    found = _shapes(folder / SHARDED_WEIGHTS)
    return {key.removeprefix("model."): tensor for key, tensor in found.items()}


def check_sharded_moments(folder: Path, shapes: Mapping[str, torch.Tensor]) -> None:
    """Check that an optimizer's state, if the checkpoint has it, is whole and that of parameters with these shapes.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, could run code, or belongs to other weights.
    """
    if (path := folder / WHOLE_MOMENTS).is_file():
        with reading(path):
            check_moments(load_pickle(path, "meta")["state"], shapes)
    if (path := folder / SHARDED_MOMENTS).is_dir():
        found = _shapes(path)
        states: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in found.items():
            name, _, kind = key.removeprefix("optimizer.state.").rpartition(".")
            states.setdefault(name, {})[kind] = tensor
        with reading(path):
            check_moments(states, shapes)


def _shapes(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder of shards, on the meta device, after a check that every file is there and long enough."""
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the shards were not finished")
    with reading(path):
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
        ends: dict[str, int] = {}
        for entry in content.storage_data.values():
            ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
        shapes = {
            name: torch.empty(entry.size, device="meta")
            for name, entry in content.state_dict_metadata.items()
            if hasattr(entry, "size")
        }
        if outside := [name for name in ends if Path(name).name != name]:
            raise ValueError(f"{outside[0]!r} is not the name of a file in this folder")
    for name, end in sorted(ends.items()):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: the shards of one rank are not there")
        if (size := (folder / name).stat().st_size) < end:
            raise ValueError(
                f"{folder / name} has {size} bytes, its {METADATA} speaks of {end}. Use another checkpoint."
            )
    return shapes


class _Unpickler(pickle.Unpickler):
    """Makes objects of torch's metadata and plain values only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickle a member of an Enum
            return _enum_member
        if (module, name) in _NAMES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ValueError(f"it names {module}.{name}, which could run code; none was run")


def _enum_member(cls: Any, name: str) -> Any:
    if isinstance(cls, type) and issubclass(cls, Enum):
        return cls[name]
    raise ValueError(f"it reads the attribute {name!r} of something, which could run code; none was run")
