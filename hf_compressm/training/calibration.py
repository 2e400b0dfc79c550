"""Calibration batches from a run's own training data, drawn apart from the training's own batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler

Batches = list[Mapping[str, Any]]


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
        ValueError: if there is no training data to draw from.
    """
    dataset = getattr(dataloader, "dataset", None)
    if dataset is None:
        raise ValueError(
            "the states of selective layers are ranked on training data, but the Trainer has no training data loader"
        )
    total = getattr(dataloader, "total_batch_size", None) or processes * (dataloader.batch_size or 1)
    generator = torch.Generator().manual_seed(seed)
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed % 2**32)
        try:
            size, part = max(total // processes, 1), (rank, count * processes, processes)
            if isinstance(dataset, IterableDataset):
                read: Any = DataLoader(dataset, size, collate_fn=dataloader.collate_fn, generator=generator)
                return list(islice(read, *part))
            sampler = RandomSampler(dataset, generator=generator)
            chosen = _Part(BatchSampler(sampler, size, drop_last=False), part)  # other ranks' items are not even read
            return list(
                DataLoader(dataset, batch_sampler=chosen, collate_fn=dataloader.collate_fn, generator=generator)
            )
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Part(Sampler[list[int]]):
    """Some of the batches of indices that a sampler gives: first, end and step among them."""

    def __init__(self, batches: BatchSampler, part: tuple[int, int, int]):
        self.batches, self.part = batches, part

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self.batches, *self.part)
