"""Measure how well the ranking of states early in training predicts the ranking at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..reduction import energy_orders
from ..report.text_tables import markdown_table, mean_and_deviation
from ..surgery import find_mixers, measure_mixers, needs_calibration, state_sizes
from ..surgery.processes import processes
from ..training.calibration import Batches, calibration_batches
from ..training.distributed import TrainingTeam
from ..training.run_state import PerRun
from ..training.trainer_log import running_trainer
from .rankings import MOVES, Ranking, agreement, kept_agreement, match, mean, mean_of, next_step, rankings

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class RankRecorder(TrainerCallback):
    """Ranks the states of every mixer at given shares of a run at full size, and compares with the ranking at its end.

    ```python
    recorder = RankRecorder()
    Trainer(model=model, args=args, train_dataset=..., callbacks=[recorder]).train()
    print(stability_table(recorder.as_records()))
    ```

    It measures right after the first optimizer step that completes a share, and again after the next step, which tells
    how far singular values move in a step. It measures selective layers on the same few batches of training data each
    time, which it draws separately. It does not change the weights that training ends with.

    Args:
        shares: when to measure, as shares of the run's optimizer steps, each in [0, 1]; 0 is the model as it was
            initialised. The end is always measured.
        tau: one number of states to look at is what a cut with this tolerance keeps at the end, in (0, 1).
        depths: others, as shares of a layer's states, each in (0, 1].
        calibration_batches: batches for selective layers, >= 1.
        seed: of the draw of these.

    Raises:
        ValueError: arguments out of range; when training starts: a model without compressible layers, or a run that
            is resumed; during training: a layer that has lost states.
        ReductionError: during training, if a layer cannot be measured.
    """

    def __init__(
        self,
        shares: Sequence[float] = SHARES,
        tau: float = 0.1,
        depths: Sequence[float] = (0.25,),
        calibration_batches: int = 2,
        seed: int = 0,
    ):
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"shares of training must lie in [0, 1]; got {tuple(shares)}")
        if not all(0 < depth <= 1 for depth in depths):
            raise ValueError(f"depths, shares of the states, must lie in (0, 1]; got {tuple(depths)}")
        if not 0 < tau < 1:
            raise ValueError(f"tau must lie strictly between 0 and 1; got {tau}")
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches must be >= 1; got {calibration_batches}")
        self.shares, self.tau, self.depths = sorted({*shares, 1.0}), tau, tuple(depths)
        self.count, self.seed = calibration_batches, seed
        self._runs: PerRun[_Study] = PerRun()
        self._latest: _Study | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            raise ValueError(
                f"a study of rank stability needs the whole run, but this one is resumed at step {state.global_step}; "
                "train from the beginning"
            )
        model = kwargs["model"]
        # Rounded, since 0.07 * 100 is a little more than 7.
        steps = {share: math.ceil(round(share * state.max_steps, 6)) for share in self.shares}
        study = self._latest = self._runs.begin(state, _Study(steps, state_sizes(model)))
        if needs_calibration(model):
            loader, rank = kwargs.get("train_dataloader"), args.process_index
            study.batches = calibration_batches(loader, self.count, self.seed, rank, processes())
        if 0 in steps.values():
            self._measure(study, model, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        study = self._runs.of(state)
        if study is not None and {state.global_step, state.global_step - 1} & set(study.steps.values()):
            self._measure(study, kwargs["model"], state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._runs.end(state)

    def _measure(self, study: _Study, model: nn.Module, state: TrainerState) -> None:
        if (sizes := state_sizes(model)) != study.sizes:
            raise ValueError(
                f"layers went from {study.sizes} to {sizes} states while their ranking was recorded, and rankings can "
                "only be compared at full size; train without CompreSSMCallback (--no_compress)"
            )
        measured = measure_mixers(
            model, TrainingTeam(running_trainer()).gather(model, study.batches, None, fast_ops=True)
        )
        adapters = {site.name: site.adapter for site in find_mixers(model)}
        step, found = state.global_step, {name: rankings(adapters[name], m) for name, m in measured.items()}
        if (before := study.measured.get(step - 1)) is not None:
            study.moves[step - 1] = {
                name: mean_of(next_step(*pair) for pair in zip(before[name], after, strict=True))
                for name, after in found.items()
            }
        if step in study.steps.values():
            study.measured[step] = found
        if step == state.max_steps:
            spectra = {name: m.spectrum() for name, m in measured.items()}
            study.orders = {name: self._kept(spectrum) for name, spectrum in spectra.items()}

    def _kept(self, spectrum: Any) -> dict[str, int]:
        orders = {f"{depth:g} N": math.ceil(depth * len(spectrum)) for depth in self.depths}
        return orders | {f"tau {self.tau:g}": energy_orders([spectrum], self.tau)[0]}

    def as_records(self) -> list[dict[str, Any]]:
        """Return what was found in the training that began last, one JSON-ready entry per share.

        Returns:
            `share`, `step`, `layers`: values by mixer name, means over its groups of channels; and `mean`: those of
            the layers. Values: what `rankings.agreement` and `rankings.next_step` return, `states` (N), and in `kept`,
            by number of states looked at ("0.25 N", "tau 0.1"), what `rankings.kept_agreement` does. A value that
            is not defined is None: correlations of fewer than three states, and the step after the last.

        Raises:
            RuntimeError: if training has not come to its end.
        """
        study = self._latest
        if study is None or study.steps[1.0] not in study.measured:
            raise RuntimeError("rankings are compared with those after the last step, which training has not reached")
        return [study.record(share) for share in study.steps]


@dataclass
class _Study:
    """What is found in one training.

    Attributes:
        steps: share of training -> optimizer step at which it is measured.
        sizes: states per layer.
        batches: what selective layers are measured on.
        measured: step -> mixer name -> its rankings. moves: the same, of what `next_step` returns.
        orders: mixer name -> numbers of states to look at, by how they were chosen.
    """

    steps: dict[float, int]
    sizes: list[int]
    batches: Batches | None = None
    measured: dict[int, dict[str, list[Ranking]]] = field(default_factory=dict)
    moves: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    orders: dict[str, dict[str, int]] = field(default_factory=dict)

    def record(self, share: float) -> dict[str, Any]:
        """A share's entry in `RankRecorder.as_records`."""
        step, end = self.steps[share], self.measured[self.steps[1.0]]
        now, moves, layers = self.measured[step], self.moves.get(step), {}
        for name, orders in self.orders.items():
            compared = mean_of(_compare(*pair, orders) for pair in zip(now[name], end[name], strict=True))
            layers[name] = compared | (dict.fromkeys(MOVES) if moves is None else moves[name])
        return {"share": share, "step": step, "mean": mean_of(layers.values()), "layers": layers}


def _compare(now: Ranking, end: Ranking, orders: Mapping[str, int]) -> dict[str, Any]:
    partner = match(now, end)
    kept = {name: kept_agreement(now, end, partner, order) for name, order in orders.items()}
    return {"states": len(now.P), **agreement(now, end, partner), "kept": kept}


def stability_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row per share of training: means over layers and seeds, and deviations over seeds.

    Columns: Spearman's correlation with the ranking at the end over the states that matter; per number of states kept
    the overlap of what an early cut would keep with what one at the end does, the stability of the top ranks, and the
    energy held at the end by what an early cut would keep (in brackets what random choices give); the largest move of
    a singular value in the next step over Weyl's bound, and the share of neighbours that this bound keeps from
    crossing. See `rankings` for definitions.

    Args:
        records: what `RankRecorder.as_records` returned, of one run or several.

    Raises:
        ValueError: if there are none.
    """
    if not records:
        raise ValueError("there are no records; train with a RankRecorder and pass what its as_records() returns")
    kept = list(records[0]["mean"]["kept"])
    parts = [part for name in kept for part in (f"overlap, {name}", f"top-r stability, {name}", f"held, {name}")]
    columns = ["share of training", "Spearman", *parts, "move / bound", "cannot cross"]
    rows = []
    for share in sorted({record["share"] for record in records}):
        means = [record["mean"] for record in records if record["share"] == share]
        cells = [f"{share:g}", _cell([m["spearman"] for m in means])]
        for name in kept:
            at = [m["kept"][name] for m in means]
            cells += [_cell([v["overlap"] for v in at]) + _by_chance([v["chance"] for v in at])]
            cells += [_cell([v["stability"] for v in at])]
            cells += [_cell([v["held"] for v in at]) + _by_chance([v["held_by_chance"] for v in at])]
        rows.append([*cells, *(_cell([m[key] for m in means]) for key in ("move_over_bound", "clear_gaps"))])
    return markdown_table(columns, rows)


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return mean_and_deviation(known, 2) if known else "-"


def _by_chance(values: Sequence[float | None]) -> str:
    found = mean(values)
    return "" if found is None else f" ({found:.2f})"
