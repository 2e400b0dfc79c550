"""One training run of a suite, by any of the methods, in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, TrainerCallback, default_data_collator

from ..baselines import DistillationCallback, HankelNormCallback, RivalCutCallback, rival_cut
from ..data import Task, load_task
from ..hub import describe_environment
from ..models.fast_ops import has_stock_mixers, use_fast_ops
from ..models.heads import HEADS
from ..pretraining import CACHES, build_trainer, execute
from ..run_file import Run
from ..surgery import compress, state_sizes
from ..surgery.refit import STEPS
from ..training.calibration import Batches, calibration_batches
from .stability import RankRecorder
from .suite import Job, make_job_run

Needed = Mapping[str, Mapping[str, Any]]
"""Records of the runs that a run needs, by the argument that names them."""

CALIBRATION_SEED = 1
CUT_LOSSES = ("compression/loss_before", "compression/loss_after")


class StepClock(TrainerCallback):
    """Times every optimizer step, without data loading, evaluation and saving."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)

    def steps_per_second(self) -> float:
        """1 / median time of a step in the second half of training."""
        return 1 / median(self.seconds[len(self.seconds) // 2 :])


def run_job(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    """Train, or cut, and test.

    Args:
        job: the run.
        folder: for its model and logs; a run that was interrupted goes on from the last checkpoint there.
        needed: records of earlier runs, each with its `folder`, under the names of `Method.arguments` that refer to
            them.

    Returns:
        JSON-ready: names of task and method, `seed`, `fingerprint`; `score`, the task's own test metric under the name
        `metric`, and `loss`; `sizes`, states per layer; `seconds` of training, and `seconds_needed` with those of the
        teacher or the model that was cut; `resumed`, where these leave out what an interrupted run had done before;
        `steps_per_second` at the end of training; `cuts`, the training loss right
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
) -> tuple[nn.Module, dict[str, Any]]:
    run = make_job_run(job, folder, model)
    clock = StepClock()
    result = execute(run, [*callbacks, clock])
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    cuts = [
        {"step": entry["step"]} | {key.split("/")[1]: entry[key] for key in CUT_LOSSES}
        for entry in log
        if all(key in entry for key in CUT_LOSSES)
    ]
    record = {"seconds": result.metrics["train_runtime"], "cuts": cuts, "sizes": state_sizes(result.model)}
    record["resumed"] = json.loads((folder / "run.json").read_text())["resumed"]
    if clock.seconds:
        record["steps_per_second"] = clock.steps_per_second()
    return result.model, record | _scores(_task(run), result.metrics)


def _task(run: Run) -> Task:
    return load_task(
        run.arguments.task or "", data_dir=run.arguments.data_dir, seed=run.training.seed, **run.task_options
    )


def _scores(task: Task, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "metric": task.metric_for_best_model,
        "greater_is_better": task.greater_is_better,
        "score": metrics[f"test_{task.metric_for_best_model}"],
        "loss": metrics["test_loss"],
    }


def _evaluate(job: Job, folder: Path, model: nn.Module) -> dict[str, Any]:
    """Scores of a model as it is."""
    run = make_job_run(job, folder)
    task = _task(run)
    trainer, _ = build_trainer(run, task, model)
    return _scores(task, trainer.evaluate(task.test, ignore_keys=CACHES, metric_key_prefix="test"))


def _load(job: Job, folder: str) -> nn.Module:
    run = make_job_run(job, folder)
    model = HEADS[_task(run).problem].from_pretrained(folder)
    if run.arguments.fast_ops and has_stock_mixers(model):
        use_fast_ops(model)
    return model


def _calibration(job: Job, folder: Path) -> Batches:
    run = make_job_run(job, folder)
    task = _task(run)
    loader = DataLoader(
        task.train,
        batch_size=run.training.per_device_train_batch_size,
        collate_fn=task.collator or default_data_collator,
    )
    return calibration_batches(loader, run.compression.calibration_batches, CALIBRATION_SEED, 0, 1)


def _cut(job: Job, folder: Path, model: nn.Module, sizes: list[int]) -> float:
    """Cut a trained model to the mean of the given sizes; returns the seconds that it takes."""
    score = job.method.arguments.get("score", "hankel")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    found = _calibration(job, folder)
    batches: Batches = [{key: value.to(device) for key, value in batch.items()} for batch in found]
    began = time.perf_counter()
    if score == "hankel":
        steps = job.method.arguments.get("refit_steps", STEPS)
        compress(model, batches, target=fmean(sizes), refit_steps=steps)
    else:
        generator = torch.Generator().manual_seed(job.seed)
        rival_cut(model, score, round(fmean(sizes)), batches, generator=generator)
    return time.perf_counter() - began


def _full(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    return _train(job, folder)[1]


def _scratch(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    return _train(job, folder, _sizes(job, needed))[1]


def _sizes(job: Job, needed: Needed) -> dict[str, Any]:
    """Fields of the model's config for the sizes of another run."""
    sizes = list(needed["sizes_of"]["sizes"])
    kind = make_job_run(job, "outputs").arguments.model_type
    own = hasattr(AutoConfig.for_model(kind), "state_sizes")
    return {"state_sizes": sizes} if own else {"state_size": sizes[0]}  # a stock model has one size for all layers


def _distillation(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    settings = {key: job.method.arguments[key] for key in ("alpha", "temperature") if key in job.method.arguments}
    teacher = DistillationCallback(_load(job, needed["teacher"]["folder"]), **settings)
    return _train(job, folder, _sizes(job, needed), [teacher])[1]


def _hankel_norm(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    model, record = _train(job, folder, callbacks=[HankelNormCallback(job.method.arguments["weight"])])
    if "sizes_of" not in needed:
        return record
    record["before_cut"] = {key: record[key] for key in ("score", "loss", "sizes")}
    record["seconds"] += _cut(job, folder, model, needed["sizes_of"]["sizes"])
    return record | _evaluate(job, folder, model) | {"sizes": state_sizes(model)}


def _score(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    arguments, size = job.method.arguments, fmean(needed["sizes_of"]["sizes"])
    cut = RivalCutCallback(arguments["score"], round(size), cut_steps=arguments.get("cut_steps"))
    return _train(job, folder, callbacks=[cut])[1]


def _after_training(job: Job, folder: Path, needed: Needed) -> dict[str, Any]:
    model = _load(job, needed["of"]["folder"])
    seconds = _cut(job, folder, model, needed["sizes_of"]["sizes"])
    return {"seconds": seconds, "sizes": state_sizes(model), "cuts": [], **_evaluate(job, folder, model)}


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
