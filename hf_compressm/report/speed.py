"""Tell the speed of a run only where enough steps were timed, and of the sizes that it is told of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..surgery import record_keys as keys

Segments = Sequence[Mapping[str, Any]]
"""Segments of training between two changes of size, oldest first, as `training.timing.SpeedSegment` has them."""


def timed(segments: Segments) -> list[Mapping[str, Any]]:
    """Return the segments whose steps, one to warm up aside, are enough to tell a speed."""
    return [segment for segment in segments if keys.is_timed(segment.get("steps", 0))]


def speed_change(
    segments: Segments, sizes_before: Sequence[int], sizes_after: Sequence[int]
) -> tuple[float, float] | None:
    """Return the optimizer steps per second at the size that training began with and after the last cut.

    Args:
        segments: of the run.
        sizes_before, sizes_after: states of each layer before the first cut and after the last.

    Returns:
        None if either was not timed: the segments of a resumed run, for example, may begin after a cut.
    """
    if len(segments) < 2 or len(timed(ends := [segments[0], segments[-1]])) < 2:
        return None
    sizes = [sum(sizes) / max(len(sizes), 1) for sizes in (sizes_before, sizes_after)]
    if sizes[0] == sizes[1] or [segment["mean_state_size"] for segment in ends] != sizes:
        return None
    return ends[0]["steps_per_second"], ends[1]["steps_per_second"]
