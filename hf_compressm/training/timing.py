"""Time optimizer steps between cuts, and the parts of a cut."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass
class SpeedSegment:
    """Steps between two changes of size.

    Attributes:
        first_step: optimizer step at which the segment began.
        mean_state_size: mean number of states per layer.
        steps: number of optimizer steps, of which the first is to warm up; `record_keys.is_timed` says whether they
            are enough to speak of a speed.
        steps_per_second: 1 / median time of the others, without data loading, evaluation and saving.
    """

    first_step: int
    mean_state_size: float
    steps: int
    steps_per_second: float


@dataclass
class Stopwatch:
    """Adds up seconds by name: `with watch("surgery"): ...`."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@dataclass
class StepTimer:
    """Times optimizer steps, split into segments at every change of size.

    Attributes:
        segments: finished segments, oldest first.
        durations: seconds of each step of the running segment.
        first_step: optimizer step at which it began.
    """

    segments: list[SpeedSegment] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    first_step: int = 0
    _began: float | None = None

    def begin_step(self) -> None:
        """Call right before an optimizer step's first forward pass."""
        self._began = time.perf_counter()

    def end_step(self) -> None:
        """Call right after the optimizer step."""
        if self._began is not None:
            self.durations.append(time.perf_counter() - self._began)
            self._began = None

    def close_segment(self, step: int, mean_state_size: float) -> None:
        """End the running segment, of the given size, at the given step. The first step of each is warm-up."""
        timed = self.durations[1:] if len(self.durations) > 1 else self.durations
        if timed:
            speed = 1 / median(timed)
            self.segments.append(SpeedSegment(self.first_step, mean_state_size, len(self.durations), speed))
        self.durations, self.first_step, self._began = [], step, None

    def as_records(self) -> list[dict[str, Any]]:
        """JSON-ready segments, oldest first."""
        return [asdict(segment) for segment in self.segments]
