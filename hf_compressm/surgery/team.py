"""The processes that make one plan together: a single process here, and what several of them replace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import nn

from .adapters.base import MixerSite
from .refit import Recording
from .statistics import Batches, call_all, gather_statistics

Value = TypeVar("Value")
Look = Callable[[MixerSite], MixerSite]
"""Gives the site of a mixer with a mixer whose parameters are whole."""


class Team:
    """One process that plans alone.

    A subclass for several processes runs in each of them: `make_plan` and `apply_plan` call the same methods in the
    same order in all.
    """

    def gather(
        self,
        model: nn.Module,
        batches: Batches | None,
        recordings: dict[str, Recording] | None,
        fast_ops: bool,
        sites: Any = None,
    ) -> dict[str, Any]:
        """Statistics by mixer name over the calibration batches of all processes; see `gather_statistics`."""
        return gather_statistics(model, batches, recordings, fast_ops=fast_ops, sites=sites)

    def run(self, model: nn.Module, passes: Iterable[Callable[[], Any]]) -> int:
        """Call each of the passes through a model, in all processes alike, and return their number."""
        return call_all(passes)

    def check(self, measurements: Mapping[str, Any]) -> None:
        """Look at the measurements, by mixer name, before a plan is made. An error raised here ends the planning."""

    def decide(self, model: nn.Module, work: Callable[[Look], Value]) -> Value:
        """What `work` returns in the process that decides, in every process; or the error that it raises there.

        It is given a function through which it looks at the parameters of the model's mixers, one mixer at a time.
        """
        return work(lambda site: site)

    def opened(self, model: nn.Module, site: MixerSite, optimizer: Any = None) -> AbstractContextManager[None]:
        """A block in which a mixer's parameters that a cut replaces, and their moments, are whole in every process.

        `optimizer` is unwrapped, or None.
        """
        return nullcontext()
