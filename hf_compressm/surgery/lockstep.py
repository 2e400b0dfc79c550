"""Passes through a sharded model on several ranks: as many on each, and one that fails takes all with it.

In FSDP2 a forward pass gathers parameters from all ranks, layer by layer. A rank that has fewer batches, or raises in
the middle, would leave the others waiting. So ranks agree before every pass, and before every gathering in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

from .shards import reshard

logger = logging.get_logger(__name__)


class OtherRankError(RuntimeError):
    """A pass was left because another rank has failed in it."""


def run_together(model: nn.Module, passes: Iterable[Callable[[], Any]]) -> int:
    """Call each of the passes on all ranks, until one of them has no more.

    Args:
        model: sharded by `fully_shard`; each pass runs it once or more, alike on all ranks.
        passes: this rank's.

    Returns:
        The number of passes that were run, the same on all ranks.

    Raises:
        Exception: what this rank's pass, or the making of it, raises.
        OtherRankError: if another rank failed.
    """
    flag = _flag(model)
    todo, count = iter(passes), 0
    while True:
        problem: Exception | None = None
        following: Callable[[], Any] | None = None
        try:
            following = next(todo, None)
        except Exception as error:
            problem = error
        _agree(flag, problem)
        if _most(flag, following is None):
            if following is not None:
                logger.info(f"another rank has {count} calibration passes only, so those after them are left out here")
            return count
        assert following is not None
        told: list[OtherRankError] = []
        try:
            with _agreeing(model, flag, told):
                following()
        except Exception as error:
            problem = error
        try:
            if told:  # whatever the code in between has made of it; the others ask no more
                raise told[0] from problem
            _agree(flag, problem)
        except Exception:
            _restore(model)
            raise
        count += 1


@contextmanager
def _agreeing(model: nn.Module, flag: Tensor, told: list[OtherRankError]) -> Iterator[None]:
    """Let the model's forward ask, before each gathering, whether another rank has failed, and add it to `told`."""

    def ask(*_: Any) -> None:
        try:
            _agree(flag, None)
        except OtherRankError as error:
            told.append(error)
            raise

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    handles = [module.register_forward_pre_hook(ask, prepend=True) for module in modules]  # before FSDP's own
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _agree(flag: Tensor, problem: Exception | None) -> None:
    failed = _most(flag, problem is not None)
    if problem is not None:
        raise problem
    if failed:
        raise OtherRankError("another rank failed on its calibration data")


def _most(flag: Tensor, value: bool) -> bool:
    """Whether the value is true on any rank."""
    flag.fill_(value)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _flag(model: nn.Module) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=next(model.parameters()).device)


def _restore(model: nn.Module) -> None:
    """Free what a pass that did not end has gathered, so that the next one can start."""
    root = next(module for module in model.modules() if isinstance(module, FSDPModule))
    root.reset_iter_state()
    reshard(model)
