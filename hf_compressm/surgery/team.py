"""The processes that make one plan together: a single process here, and what several of them replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from .refit import Recording
from .statistics import Batches, gather_statistics

Value = TypeVar("Value")


class Team:
    """One process that plans alone.

    A subclass for several processes runs in each of them: `make_plan` calls the same methods in the same order in all.
    """

    def gather(
        self, model: nn.Module, batches: Batches | None, recordings: dict[str, Recording] | None, fast_ops: bool
    ) -> dict[str, Any]:
        """Statistics by mixer name over the calibration batches of all processes; see `gather_statistics`."""
        return gather_statistics(model, batches, recordings, fast_ops=fast_ops)

    def check(self, measurements: Mapping[str, Any]) -> None:
        """Look at the measurements, by mixer name, before a plan is made. An error raised here ends the planning."""

    def decide(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the process that decides, in every process; or the error that it raises there."""
        return work()
