"""Do one training run of a suite, by any of the methods, in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..baselines import DistillationCallback, HankelNormCallback, RivalCutCallback, rival_cut
from ..data import Task, load_task
from ..models.automatic import switch_on
from ..models.heads import HEADS
from ..report import describe_environment
from ..runs.early_checks import make_config
from ..runs.pretraining import CACHES, RunResult, build_trainer, run_pretraining
from ..runs.run_file import Run
from ..surgery import compress, state_sizes
from ..surgery import record_keys as keys
from ..surgery.adapters.base import config_adapter
from ..surgery.refit import STEPS
from ..training.calibration import Batches, calibration_batches
from ..training.run_state import PerRun
from ..training.timing import StepTimer
from .ranking_stability import RankRecorder
from .suite import Job, make_job_run

Needed = Mapping[str, Mapping[str, Any]]
"""Records of the runs that a run needs, by the argument that names them."""

CALIBRATION_SEED = 1
CUT_LOSSES = (keys.LOSS_BEFORE, keys.LOSS_AFTER)


class StepClock(TrainerCallback):
    """Times every optimizer step, without data loading, evaluation and saving.

    Attributes:
        timer: of the training that began last.
    """

    def __init__(self) -> None:
        self.timer = StepTimer()
        self._runs: PerRun[StepTimer] = PerRun()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timer = self._runs.begin(state, StepTimer())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (timer := self._runs.of(state)) is not None:
            timer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (timer := self._runs.of(state)) is not None:
            timer.end_step()

    def steps_per_second(self) -> float | None:
        """Return 1 / median time of a step in the second half of training; None if those are too few to tell."""
        timed = self.timer.durations[len(self.timer.durations) // 2 :]
        return 1 / median(timed) if len(timed) >= keys.LEAST_TIMED_STEPS else None


def run_job(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    """Train or cut a model, and test it.

    Args:
        job: the run.
        folder: for its model and logs; a run that was interrupted goes on from the last checkpoint there.
        needed: records of earlier runs, each with its `folder`, under the names of `Method.arguments` that refer to
            them.

    Returns:
        JSON-ready: names of task and method, `seed`, `fingerprint`; `score`, the task's own test metric under the name
        `metric`, and `loss`; `sizes`, states per layer; `seconds` of training, and `seconds_needed` with those of the
        teacher or the model that was cut; `resumed`, where these leave out what an interrupted run had done before;
        `steps_per_second` at the end of training, where enough steps were timed; `cuts`, the training loss right
        before and after each; `environment`.
    """
    found = _METHODS[job.method.kind](job, folder, needed)
    earlier = sum(needed[key]["seconds_needed"] for key in ("teacher", "of") if key in needed)
    return {
        "task": job.task.name,
        "method": job.method.name,
        "kind": job.method.kind,
        "seed": job.seed,
        "fingerprint": job.fingerprint(),
        **found,
        "seconds_needed": found["seconds"] + earlier,
        "environment": describe_environment(1),
    }


def _train(
    job: Job,
    folder: Path,
    model: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[RunResult, dict[str, Any]]:
    clock = StepClock()
    result = run_pretraining(make_job_run(job, folder, model), [*callbacks, clock])
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    cuts = [
        {"step": entry["step"]} | {key.split("/")[1]: entry[key] for key in CUT_LOSSES}
        for entry in log
        if all(key in entry for key in CUT_LOSSES)
    ]
    record = {"seconds": result.metrics["train_runtime"], "cuts": cuts, "sizes": state_sizes(result.model)}
    record["resumed"] = json.loads((folder / "run.json").read_text())["resumed"]
    if (speed := clock.steps_per_second()) is not None:
        record["steps_per_second"] = speed
    return result, record | _scores(result.task, result.metrics)


def _task(run: Run) -> Task:
    name, data_dir = run.arguments.task or "", run.arguments.data_dir
    return load_task(name, data_dir=data_dir, seed=run.training.seed, **run.task_options)


def _scores(task: Task, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "metric": task.metric_for_best_model,
        "greater_is_better": task.greater_is_better,
        "score": metrics[f"test_{task.metric_for_best_model}"],
        "loss": metrics["test_loss"],
    }


def _load(run: Run, task: Task, folder: str) -> nn.Module:
    model = HEADS[task.problem].from_pretrained(folder)
    switch_on(model, run.compression.fast_ops)
    return model


def _cut_and_test(job: Job, run: Run, task: Task, model: nn.Module, sizes: list[int]) -> dict[str, Any]:
    """Cut a trained model to the mean of the given sizes: its scores, sizes and the seconds that the cut took."""
    trainer, _ = build_trainer(run, task, model)  # also brings the model to the device
    loader, score = trainer.get_train_dataloader(), job.method.arguments.get("score", "hankel")
    found = calibration_batches(loader, run.compression.calibration_batches, CALIBRATION_SEED)
    batches: Batches = [{key: value.to(run.training.device) for key, value in batch.items()} for batch in found]
    model.eval()
    began = time.perf_counter()
    if score == "hankel":
        steps = job.method.arguments.get("refit_steps", STEPS)
        constraints = run.compression.constraints()
        compress(model, batches, target=fmean(sizes), constraints=constraints, refit_steps=steps)
    else:
        rival_cut(model, score, round(fmean(sizes)), batches, generator=torch.Generator().manual_seed(job.seed))
    seconds = time.perf_counter() - began
    tested = trainer.evaluate(task.test, ignore_keys=CACHES, metric_key_prefix="test")
    return {"seconds": seconds, "sizes": state_sizes(model), **_scores(task, tested)}


def _full(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    return _train(job, folder)[1]


def _scratch(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    return _train(job, folder, _sizes(job, needed))[1]


def _sizes(job: Job, needed: Needed) -> dict[str, Any]:
    """Field of the model's config for the sizes of another run; a stock class has one size for all layers."""
    run = make_job_run(job, "outputs")
    config = make_config(run.arguments.model_type, run.model)
    adapter = config_adapter(config)
    if adapter is None:
        raise ValueError(f"the config of {run.arguments.model_type} names no state sizes that could be set")
    adapter.write_config(config, needed["sizes_of"]["sizes"])
    return {adapter.size_field: getattr(config, adapter.size_field)}


def _distillation(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    settings = {key: job.method.arguments[key] for key in ("alpha", "temperature") if key in job.method.arguments}
    run = make_job_run(job, folder)
    teacher = _load(run, _task(run), needed["teacher"]["folder"])
    return _train(job, folder, _sizes(job, needed), [DistillationCallback(teacher, **settings)])[1]


def _hankel_norm(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    result, record = _train(job, folder, callbacks=[HankelNormCallback(job.method.arguments["weight"])])
    if "sizes_of" not in needed:
        return record
    sizes = needed["sizes_of"]["sizes"]
    cut = _cut_and_test(job, make_job_run(job, folder), result.task, result.model, sizes)
    before = {key: record[key] for key in ("score", "loss", "sizes")}
    return record | cut | {"seconds": record["seconds"] + cut["seconds"], "before_cut": before}


def _score(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    arguments, size = job.method.arguments, fmean(needed["sizes_of"]["sizes"])
    settings = make_job_run(job, folder).compression
    window = settings.window_start, settings.window_end
    cut = RivalCutCallback(arguments["score"], round(size), cut_steps=arguments.get("cut_steps"), window=window)
    return _train(job, folder, callbacks=[cut])[1]


def _after_training(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    run = make_job_run(job, folder)
    task = _task(run)
    model = _load(run, task, needed["of"]["folder"])
    return {"cuts": []} | _cut_and_test(job, run, task, model, needed["sizes_of"]["sizes"])


def _rank_stability(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    recorder = RankRecorder()
    record = _train(job, folder, callbacks=[recorder])[1]
    return record | {"stability": recorder.as_records()}


_METHODS: dict[str, Callable[[Job, Path, Needed], dict[str, Any]]] = {
    "full": _full,
    "compressed": _full,
    "scratch": _scratch,
    "distillation": _distillation,
    "hankel_norm": _hankel_norm,
    "score": _score,
    "after_training": _after_training,
    "rank_stability": _rank_stability,
}
