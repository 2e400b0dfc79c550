"""Log and print an attempt to cut, and an undone cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerState

from ..surgery import CompressionPlan, LayerPlan
from ..surgery import record_keys as keys
from .timing import Stopwatch
from .trainer_log import log_to_trackers


def report_attempt(
    trainer: Any,
    state: TrainerState,
    plan: CompressionPlan,
    watch: Stopwatch,
    measured: Mapping[str, float],
    min_change: float,
) -> None:
    """Log sizes, singular values, bounds and seconds of an attempt, and print a line.

    Args:
        trainer: to whose trackers the numbers go; None for none.
        state: of the training.
        plan: what was cut, or that nothing was.
        watch: seconds by part of the work.
        measured: further values by name, such as the losses around the cut.
        min_change: share of its states that a layer must lose at least, for the line that says why nothing was cut.
    """
    old, new = [layer.old_size for layer in plan.layers], [layer.new_size for layer in plan.layers]
    seconds = sum(watch.seconds.values())
    logs: dict[str, Any] = {keys.MEAN_STATE_SIZE: mean_size(new), keys.SECONDS: seconds}
    logs |= {keys.seconds_of(part): spent for part, spent in watch.seconds.items()} | dict(measured)
    for index, layer in enumerate(plan.layers):
        logs |= {keys.of_layer(index, name): number for name, number in _numbers(layer).items()}
    if plan.cuts:
        bounds = [
            layer.reduction.bound for layer in plan.layers if layer.reduction and layer.reduction.bound is not None
        ]
        bound = f", error bound <= {max(bounds):.3g} per layer" if bounds else ""
        line = f"Step {state.global_step}: states {_sizes(old)} -> {_sizes(new)}{bound}, {seconds:.2f} s"
    else:
        line = (
            f"Step {state.global_step}: nothing to cut at {_sizes(old)} states: no layer would lose "
            f"{min_change:.0%} of them, {seconds:.2f} s"
        )
    log_to_trackers(trainer, logs, event=line if plan.cuts else None)
    _say(state, line)


def _numbers(layer: LayerPlan) -> dict[str, Any]:
    """Numbers about one layer for the log, by name."""
    values, reduction = layer.singular_values, layer.reduction
    found = {
        "state_size_before": layer.old_size,
        "state_size": layer.new_size,
        "singular_value_sum": float(values.sum()),
        "singular_value_largest": float(values[0]),
        "singular_value_smallest_kept": float(values[layer.new_size - 1]),
    }
    if reduction is not None:
        more = {"error_bound": reduction.bound, "residual": reduction.residual}
        found |= {"singular_value_largest_removed": float(values[layer.new_size])}
        found |= {name: number for name, number in more.items() if number is not None}
    return found


def report_undo(trainer: Any, state: TrainerState, record: Mapping[str, Any]) -> None:
    """Log and print that a cut was undone; `record` is its entry in the compression history."""
    old, new = ([layer[key] for layer in record["layers"]] for key in ("old_size", "new_size"))
    line = (
        f"Step {state.global_step}: undid the cut of step {record['cut_step']}: {record['metric']} "
        f"went from {record['before_cut']:.4g} to {record['after_cut']:.4g}. States {_sizes(old)} -> "
        f"{_sizes(new)}; no further cuts."
    )
    log_to_trackers(trainer, {keys.MEAN_STATE_SIZE: mean_size(new), keys.UNDONE: 1}, event=line)
    _say(state, line)


def mean_size(sizes: Sequence[int]) -> float:
    """Mean number of states per layer."""
    return sum(sizes) / len(sizes)


def _sizes(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{list(sizes)} (mean {mean_size(sizes):.1f})"


def _say(state: TrainerState, line: str) -> None:
    """One line on the screen that does not break the progress bar."""
    if state.is_world_process_zero:
        tqdm.write(f"[CompreSSM] {line}")
