"""Several processes that make one plan: statistics are summed, rank 0 decides; parameters may be sharded (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from .adapters.base import MixerSite, find_mixers
from .lockstep import OtherRankError, run_together
from .refit import Recording
from .sharded import opened, whole_site
from .shards import is_sharded, reshard
from .statistics import Batches, gather_statistics, passes_of
from .team import Look, Team

Value = TypeVar("Value")
Timer = Callable[[str], AbstractContextManager[Any]]


def processes() -> int:
    """Number of processes that train together, >= 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def untimed(part: str) -> AbstractContextManager[Any]:
    """Take no time of a part of a cut."""
    return nullcontext()


def raise_together(problem: Exception | None) -> None:
    """Raise on every rank what any rank has met: that of the lowest rank if several have met something.

    Raises:
        Exception: as said.
    """
    problems: list[Any] = [problem]
    if processes() > 1:
        problems = [None] * processes()
        dist.all_gather_object(problems, problem)
    found = [problem for problem in problems if problem is not None]
    # A rank that stopped because another failed has nothing to say of its own.
    for problem in sorted(found, key=lambda problem: isinstance(problem, OtherRankError)):
        raise problem


def decided_by_rank_0(work: Callable[[], Value], watch: Timer = untimed) -> Value:
    """Run `work` on rank 0 and return its result on every rank.

    Adds to `watch` the time of the decision, and that of its broadcast: on other ranks, of waiting for it.

    Raises:
        Exception: on every rank, what `work` raises on rank 0.
    """
    if processes() == 1:
        with watch("decision"):
            return work()
    return _broadcast(_outcome(work, watch) if dist.get_rank() == 0 else [None, None], watch)


def _outcome(work: Callable[[], Any], watch: Timer) -> list[Any]:
    """The result of the decision, and the error that it ended with: the other ranks wait, and must fail alike."""
    try:
        with watch("decision"):
            return [work(), None]
    except Exception as error:
        return [None, error]


def _broadcast(outcome: list[Any], watch: Timer) -> Any:
    with watch("broadcast"):
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class ProcessTeam(Team):
    """All ranks of a training, or one: each gathers statistics on its own batches, rank 0 decides for all.

    With sharded parameters each rank takes part whenever rank 0 looks at a mixer, and all run as many batches as the
    rank that has fewest.

    Args:
        otherwise: runs the model on a batch that is not what its forward takes, if given.
        watch: takes the times of statistics, decision and broadcast.
        check: called with the measurements, on rank 0, before a plan is made.
    """

    def __init__(
        self,
        otherwise: Callable[[nn.Module], Callable[[Any], Any] | None] | None = None,
        watch: Timer = untimed,
        check: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        self.otherwise, self.watch, self._check = otherwise, watch, check

    def gather(
        self,
        model: nn.Module,
        batches: Batches | None,
        recordings: dict[str, Recording] | None,
        fast_ops: bool,
        sites: Any = None,
    ) -> dict[str, Any]:
        """As the base class; raises on every rank what any rank meets."""
        with self.watch("statistics"):
            problem: Exception | None = None
            statistics: dict[str, Any] = {}
            try:
                statistics = gather_statistics(
                    model,
                    batches,
                    recordings,
                    run=self.run_batches,
                    fast_ops=fast_ops,
                    sites=sites,
                )
            except Exception as error:  # the other ranks must not wait for this one's sums
                problem = error
            raise_together(problem)
            if processes() > 1:
                for name in sorted(statistics):
                    statistics[name].sum_with(dist.all_reduce)
        return statistics

    def run_batches(self, model: nn.Module, batches: Batches) -> int:
        """Run the model on this rank's batches, and return the number of passes; see `passes_of`."""
        otherwise = None if self.otherwise is None else self.otherwise(model)
        return self.run(model, passes_of(model, batches, otherwise))

    def run(self, model: nn.Module, passes: Iterable[Callable[[], Any]]) -> int:
        if processes() == 1 or not is_sharded(model):
            return super().run(model, passes)
        return run_together(model, passes)

    def check(self, measurements: Mapping[str, Any]) -> None:
        if self._check is not None:
            self._check(measurements)

    def decide(self, model: nn.Module, work: Callable[[Look], Value]) -> Value:
        if not is_sharded(model):
            return decided_by_rank_0(lambda: work(lambda site: site), self.watch)
        reshard(model)
        if processes() == 1:
            with self.watch("decision"):
                return work(whole_site)
        outcome: list[Any] = [None, None]
        if dist.get_rank() == 0:
            outcome = _outcome(lambda: work(_look), self.watch)
            dist.broadcast_object_list([None], src=0)
        else:
            with self.watch("decision"):
                _help_to_look(model)
        return _broadcast(outcome, self.watch)

    def opened(self, model: nn.Module, site: MixerSite, optimizer: Any = None) -> AbstractContextManager[None]:
        return opened(model, site, optimizer) if is_sharded(model) else nullcontext()


def _look(site: MixerSite) -> MixerSite:
    """On rank 0: ask all ranks for their shards of a mixer."""
    dist.broadcast_object_list([site.name], src=0)
    return whole_site(site)


def _help_to_look(model: nn.Module) -> None:
    """On the other ranks: give shards of each mixer that rank 0 asks for, until it has decided."""
    sites = {site.name: site for site in find_mixers(model)}
    asked: list[Any] = [None]
    while True:
        dist.broadcast_object_list(asked, src=0)
        if asked[0] is None:
            return
        whole_site(sites[asked[0]])


def team_for(model: nn.Module) -> Team:
    """All ranks where the model's parameters are sharded over them, and this process alone otherwise."""
    return ProcessTeam() if is_sharded(model) else Team()
