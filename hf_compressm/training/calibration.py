"""Draw calibration batches from a run's own training data, without taking any from the training."""

from __future__ import annotations

import copy
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderAdapter, DataLoaderDispatcher, DataLoaderShard, SkipDataLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler

from ..surgery import ReductionError, find_mixers, gather_statistics, needs_calibration
from ..surgery.batches import model_inputs
from ..surgery.processes import ProcessTeam
from .trainer_log import metrics_apart

Batches = list[Mapping[str, Any]]

_PLAIN = {cls.__iter__ for cls in (DataLoader, DataLoaderShard, DataLoaderDispatcher, SkipDataLoader)}
"""Ways to iterate over a loader that give the batches of its data set as they are collated."""


def calibration_batches(dataloader: Any, count: int, seed: int, rank: int = 0, processes: int = 1) -> Batches:
    """Collate `count` batches of the training data in an order of their own.

    The training's sampler and workers are not touched, and the random state of Python, NumPy and torch, which a
    data set's transform or a collator may use, is afterwards as it was. A data set that can only be iterated over is
    read from its start.

    Args:
        dataloader: the training's DataLoader, or Accelerate's wrapper of it: its data set, batch size and collator
            are used.
        count: number of batches, >= 1; fewer come if the data ends before.
        seed: of the order.
        rank, processes: with several processes each takes its own part of every batch, so that all together see what
            one process would.

    Raises:
        ValueError: if there is no training data to draw from, or drawing would take what the training is to read.
    """
    dataset = getattr(dataloader, "dataset", None)
    if dataset is None:
        raise ValueError(
            "the states of selective layers are ranked on training data, but the Trainer has no training data loader"
        )
    generator = torch.Generator().manual_seed(seed)
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed % 2**32)
        try:
            options = {"collate_fn": dataloader.collate_fn, "generator": generator}
            return list(_drawn(dataloader, (rank, count * processes, processes), options))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _drawn(dataloader: Any, part: tuple[int, int, int], options: dict[str, Any]) -> Any:
    dataset, processes = dataloader.dataset, part[2]
    size = _rows(dataloader, processes)
    if not _by_index(dataset):
        if iter(dataset) is iter(dataset):
            raise ValueError(
                f"the training data ({type(dataset).__name__}) gives the same iterator each time, so reading a few "
                "batches from it would take them from the training. Let iter() begin anew, or give it __getitem__."
            )
        return islice(DataLoader(dataset, size, **options), *part)
    sampler: Any = RandomSampler(dataset, generator=options["generator"])
    by_lists = isinstance(dataloader.sampler, BatchSampler)  # whose lists of indices the data set itself takes
    if dataloader.batch_sampler is None and not by_lists:  # each item is a batch
        return DataLoader(dataset, None, sampler=_Part(sampler, part), **options)
    if size is None:
        raise ValueError(
            f"the training data loader's batch sampler ({type(dataloader.batch_sampler).__name__}) does not tell the "
            "size of its batches; give it an attribute batch_size"
        )
    chosen = _Part(BatchSampler(sampler, size, drop_last=False), part)  # other ranks' items are not even read
    if by_lists:
        return DataLoader(dataset, None, sampler=chosen, **options)
    return DataLoader(dataset, batch_sampler=chosen, **options)


def _by_index(dataset: Any) -> bool:
    named = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return named and not isinstance(dataset, IterableDataset) and len(dataset) > 0


def _rows(dataloader: Any, processes: int) -> int | None:
    """Rows of a process's batch, however the loader tells; None if it does not, or its items are batches."""
    by_lists = isinstance(dataloader.sampler, BatchSampler)
    sampler = dataloader.sampler if by_lists else dataloader.batch_sampler
    told = getattr(sampler, "batch_size", None) or getattr(dataloader, "batch_size", None)
    if not isinstance(told, int):
        return None
    return max(told // processes, 1) if getattr(sampler, "split_batches", False) else told


class _Part(Sampler[Any]):
    """Some of what a sampler gives: first, end and step among them."""

    def __init__(self, given: Sampler[Any], part: tuple[int, int, int]):
        self.given, self.part = given, part

    def __iter__(self) -> Iterator[Any]:
        return islice(self.given, *self.part)


class TrainingData:
    """Batches of one run's training data to measure on; none is taken from what the training will read.

    Where the data can be read by index, batches are drawn by `calibration_batches`. For all else (streams, loaders and
    batch samplers of one's own) the last batches that were trained on are kept; call `follow` before training.

    Args:
        dataloader: what the Trainer iterates over.
        count: number of batches, >= 1.
        rank, processes: as for `calibration_batches`.
    """

    def __init__(self, dataloader: Any, count: int, rank: int = 0, processes: int = 1):
        self.dataloader, self.count = dataloader, count
        self._part = (rank, processes)
        self._trained: deque[Any] = deque(maxlen=count)
        self._detach: Callable[[], None] = lambda: None

    @property
    def drawn(self) -> bool:
        """Whether batches are drawn apart from the training's."""
        loader = self.dataloader
        inner = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
        if not isinstance(inner, DataLoader) or not {type(loader).__iter__, type(inner).__iter__} <= _PLAIN:
            return False
        whole = inner.batch_sampler is None and not isinstance(inner.sampler, BatchSampler)
        return _by_index(loader.dataset) and (whole or _rows(loader, self._part[1]) is not None)

    def follow(self, trainer: Any, model: nn.Module, seed: int) -> None:
        """Check, before the first step, that the model can be measured on what the Trainer trains it on.

        Args:
            trainer: the Trainer; None outside of one.
            model: the model.
            seed: of the first measurement.

        Raises:
            ValueError, TypeError: batches that cannot be read, or too short to rank the states on; now, or in the first
                `Trainer.training_step` where that sees the first batch.
        """
        if self.dataloader is None:
            return
        if self.drawn:
            if needs_calibration(model):
                batches = self.batches(seed)
                check_batch(trainer, model, batches[0])
                _check_tokens(model, batches)
        elif trainer is not None:
            self._keep_trained(trainer, model)

    def batches(self, seed: int) -> Batches:
        """Up to `count` batches, on this process.

        Raises:
            ValueError: if there is no training data.
        """
        if self.drawn or not self._trained:
            return calibration_batches(self.dataloader, self.count, seed, *self._part)
        return list(self._trained)

    def leave(self) -> None:
        """Stop following the Trainer, and drop the batches."""
        self._detach()
        self._detach = lambda: None
        self._trained.clear()

    def _keep_trained(self, trainer: Any, model: nn.Module) -> None:
        before = vars(trainer).get("training_step")
        training_step, reference = trainer.training_step, weakref.ref(self)

        def kept(module: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if (data := reference()) is not None:  # an error may have ended the training that it belonged to
                batch = copy.copy(inputs)
                if not data._trained and needs_calibration(model):
                    check_batch(trainer, model, batch)
                data._trained.append(batch)
            return training_step(module, inputs, *args, **kwargs)

        def detach() -> None:
            if vars(trainer).get("training_step") is kept:
                del trainer.training_step
                if before is not None:
                    trainer.training_step = before

        trainer.training_step, self._detach = kept, detach


def check_batch(trainer: Any, model: nn.Module, batch: Any) -> None:
    """Raise the error that a measurement of the model on a batch like this one would raise; states may still be NaN."""
    team = ProcessTeam(lambda model: as_the_trainer_does(model, trainer))
    with suppress(ReductionError):  # a cut that meets this is passed over, and training goes on
        gather_statistics(model, [batch], run=team.run_batches, complete=False, fast_ops=False)


def _check_tokens(model: nn.Module, batches: Batches) -> None:
    try:
        passes = [inputs for batch in batches for inputs in model_inputs(model, batch)]
    except (TypeError, ValueError):
        return  # the Trainer's loss knows what to do with them
    tokens, states = sum(map(_tokens, passes)), max(site.state_size for site in find_mixers(model))
    if tokens < states:
        raise ValueError(
            f"the calibration data is too short: {len(batches)} training batches hold {tokens} real tokens, which "
            f"cannot rank {states} states. Raise calibration_batches."
        )


def _tokens(inputs: Mapping[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor):
        return int((mask != 0).sum())
    return max(value.shape[:2].numel() for value in inputs.values() if isinstance(value, Tensor))


def as_the_trainer_does(model: nn.Module, trainer: Any) -> Callable[[Any], Any] | None:
    """A function that runs the model on a batch through the Trainer's loss; None without a Trainer."""
    return None if trainer is None else lambda batch: trainer_loss(trainer, model, batch)


def trainer_loss(trainer: Any, model: nn.Module, batch: Any) -> Any:
    """The Trainer's loss of a batch, a scalar tensor (); other metrics of the Trainer are not changed."""
    with metrics_apart(trainer), trainer.compute_loss_context_manager():
        return trainer.compute_loss(model, trainer._prepare_inputs(copy.copy(batch)))
