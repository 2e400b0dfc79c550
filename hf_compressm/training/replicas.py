"""Compare a model and its optimizer across ranks after a change of state size; else two models would be trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..surgery import unwrap_optimizer
from ..surgery.processes import processes, raise_together
from ..surgery.shards import is_sharded, reshard, sharded_entries
from ..surgery.wrappers import plain_name

CHUNK = 1 << 22
"""Elements of a tensor that a checksum takes at once, so that it needs little memory."""


def verify_replicas(model: nn.Module, optimizer: Any = None) -> None:
    """Compare checksums of all parameters and optimizer moments across ranks.

    Of parameters that FSDP2 shards, shapes are compared across all ranks, and values among those that hold the same
    part; nothing is gathered. That each is the one which FSDP gathers and the optimizer steps is checked too. Buffers
    are left out: running statistics of a batch norm are each rank's own until the next forward pass.

    Raises:
        RuntimeError: on every rank, if any tensor differs, or a parameter is not where it must be; the message names
            the first and the rank.
    """
    if processes() == 1:
        return
    problem = None
    if is_sharded(model):
        reshard(model)
        problem = _misplaced(model, optimizer)
    entries = [_entry(name, tensor) for name, tensor in _tensors(model, optimizer)]
    shapes = [(name, shape) for name, shape, _, _ in entries]
    checksums = [(name, checksum) for name, _, _, checksum in entries]
    part = _digest([part for _, _, part, _ in entries])
    own = [int(problem is not None), _digest(shapes), part, _digest(checksums)]
    found = _gather(own, next(model.parameters()).device)
    if any(one[0] for one in found):
        raise_together(problem)
    differing, listed = _first_pair([(0, one[1]) for one in found]), shapes
    if differing is None:
        differing, listed = _first_pair([(one[2], one[3]) for one in found]), checksums
    if differing is not None:
        raise RuntimeError(
            f"rank {differing[1]} and rank {differing[0]} differ in {_first_name(listed, *differing)} after a change "
            "of state size; going on would train two models. Resume from the last checkpoint, and report this."
        )


def _entry(name: str, tensor: Tensor) -> tuple[str, str, Any, int]:
    """Name, shape and kind, the part of it that this rank holds, and the checksum of that part."""
    if not isinstance(tensor, DTensor):
        return name, f"{tuple(tensor.shape)} {tensor.dtype}", None, _checksum(tensor)
    spread = f"{tuple(tensor.shape)} {tensor.dtype} {tensor.placements} {tuple(tensor.device_mesh.shape)}"
    coordinate: Any = tensor.device_mesh.get_coordinate()
    part = [at for at, placement in zip(coordinate, tensor.placements, strict=True) if not placement.is_replicate()]
    return name, spread, part, _checksum(tensor.to_local())


def _gather(own: list[int], device: torch.device) -> list[list[int]]:
    """These integers of every rank."""
    sent = torch.tensor(own, device=device)
    received = [torch.empty_like(sent) for _ in range(processes())]
    dist.all_gather(received, sent)
    return [one.tolist() for one in received]


def _first_pair(found: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The first rank of those with the same first number, and one with another second number; None if none has."""
    first: dict[int, int] = {}
    for rank, (part, value) in enumerate(found):
        other = first.setdefault(part, rank)
        if found[other][1] != value:
            return other, rank
    return None


def _first_name(listed: list[tuple[str, Any]], one: int, other: int) -> str:
    """The name of the first entry in which two ranks differ."""
    lists: list[Any] = [None] * processes()  # only now: at a thousand ranks they are long
    dist.all_gather_object(lists, listed)
    names = [mine[0] for mine, yours in zip(lists[other], lists[one], strict=False) if mine != yours]
    return (names or ["the number of tensors"])[0]


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big", signed=True)


def _misplaced(model: nn.Module, optimizer: Any) -> RuntimeError | None:
    """A parameter that FSDP does not know, or that the optimizer does not step, if there is one."""
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    held = None
    if optimizer is not None:
        groups = unwrap_optimizer(optimizer).param_groups
        held = {id(parameter) for group in groups for parameter in group["params"]}
    for (owner, attribute), (_, entry) in sharded_entries(model).items():
        present: Any = owner._parameters.get(attribute)
        name = names.get(id(present), attribute)
        if present is not entry.sharded_param:
            return RuntimeError(
                f"{name} is not the parameter that FSDP gathers and reduces, so it was replaced without its shards, "
                "and the next forward pass would undo it. Resume from the last checkpoint, and report this."
            )
    for parameter_id, name in names.items():
        if held is not None and parameter_id not in held and model.get_parameter(name).requires_grad:
            return RuntimeError(
                f"{name} is trained but not in the optimizer, which would never step it. Resume from the last "
                "checkpoint, and report this."
            )
    return None


def _tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    named = [(plain_name(name), parameter) for name, parameter in model.named_parameters()]
    yield from named
    if optimizer is None:
        return
    state = unwrap_optimizer(optimizer).state
    for name, parameter in named:
        for key, value in sorted(state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                yield f"{name} ({key})", value


def _checksum(tensor: Tensor) -> int:
    """A sum over the bits of a tensor, weighted by position, modulo 2^63."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    bits = flat.view(width[flat.element_size()])
    total = 0
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        weights = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        total += int((part * (2 * weights + 1)).sum())
    return total % (1 << 63)
