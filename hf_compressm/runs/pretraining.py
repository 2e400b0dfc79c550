"""Train a model from a YAML file: what `scripts/pretrain.py` and the benchmarks call."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..compatibility import CACHE_KEYWORDS
from ..data import Task, load_task
from ..files import check_run_folder, no_empty_folder, write_json
from ..models.automatic import switch_on
from ..models.heads import new_model
from ..models.initial_values import check_time_steps, set_time_steps
from ..moved import old_names
from ..report import describe_environment, keep_card, write_report
from ..report.speed import speed_change, timed
from ..report.text_tables import aligned_table
from ..surgery import history, original_sizes, state_sizes
from ..surgery.processes import decided_by_rank_0
from ..training import (
    CompreSSMCallback,
    DurableCheckpoints,
    newest_checkpoint,
    verify_sealed,
    whole_model,
)
from ..training.groups import create_optimizer, optimizer_settings
from .description import task_facts
from .early_checks import check_new_model, check_policy, check_task_options, make_config
from .run_file import Run, parse_run

__all__ = ["Run", "RunResult", "build_model", "build_trainer", "check_run", "parse_run", "run_pretraining", "summary"]

__getattr__ = old_names(__name__)

logger = logging.get_logger(__name__)

CACHES = list(CACHE_KEYWORDS)
"""Outputs of models that are not predictions; stock state-space models do not say so themselves."""

REPORTED = (
    "seed",
    "learning_rate",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
)
"""Training arguments that a report and a card name."""


@dataclass
class RunResult:
    """What a run produced.

    Attributes:
        task: what it was trained and tested on.
        model: the trained model.
        metrics: Trainer's training metrics, and test metrics with the prefix `test_`.
        sizes_before, sizes_after: state sizes per layer.
        speed: segments of training between cuts, with their steps per second; see `SpeedSegment`.
    """

    task: Task
    model: nn.Module
    metrics: dict[str, float]
    sizes_before: list[int]
    sizes_after: list[int]
    speed: list[dict[str, Any]]


def build_model(run: Run, task: Task) -> PreTrainedModel:
    """Build a freshly initialised model for the task, seeded by the run.

    Raises:
        ValueError: on an unknown architecture or config field, or `time_steps` that no layer has.
    """
    kind = run.arguments.model_type
    check_new_model(kind, run.model)
    if decided := run.model.keys() & task.model_kwargs:
        raise ValueError(f"the data decide {', '.join(sorted(decided))}; leave that out of `model`")
    config = make_config(kind, run.model, **task.model_kwargs)
    set_seed(run.training.seed)
    try:
        model = new_model(task.problem, config)
    except Exception as error:  # each architecture has ways of its own to fail on values that it does not check
        raise ValueError(f"no {kind} can be built with model = {run.model}: {error}") from error
    if run.arguments.time_steps is not None:
        set_time_steps(model, run.arguments.time_steps)
    switch_on(model, run.compression.fast_ops)
    return model


def build_trainer(
    run: Run, task: Task, model: nn.Module, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[Trainer, CompreSSMCallback | None]:
    """Build a plain Trainer for the run.

    Args:
        run: the parsed run.
        task: what to train on.
        model: for the task.
        callbacks: further callbacks, which come after the compression callback.

    Returns:
        The Trainer, and its compression callback if the run compresses.
    """
    optimizer = settings = None
    if (rate := run.arguments.ssm_learning_rate) is not None:
        # Made now, so that resuming at another size finds it; under FSDP the Trainer makes it itself before it resumes.
        if run.training.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            settings = optimizer_settings(model, run.training, rate)
        else:
            optimizer = create_optimizer(model, run.training, rate)
    callback = CompreSSMCallback(run.compression) if run.arguments.compress else None
    trainer = Trainer(
        model=model,
        args=run.training,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=task.collator or default_data_collator,  # never the one that pads by the tokenizer
        processing_class=task.tokenizer or task.feature_extractor,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        callbacks=[*([callback] if callback else []), *callbacks, DurableCheckpoints()],
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=settings,
    )
    return trainer, callback


def check_run(run: Run) -> None:
    """Find out before the data and the model are built what cannot be.

    Raises:
        ValueError: on an unknown task, architecture, option or field, and a target that is not below the model's size,
            and streamed data without `max_steps`.
        OSError: if a folder that is given does not exist, or the output folder cannot be written.
    """
    arguments = run.arguments
    check_time_steps(arguments.time_steps)
    check_task_options(arguments.task or "", arguments.data_dir, run.task_options)
    if run.task_options.get("streaming") and run.training.max_steps < 1:
        raise ValueError("streamed data have no length, so the run needs max_steps")
    config = check_new_model(arguments.model_type, run.model)
    if arguments.compress:
        check_policy(config, run.compression.order_policy(), run.compression.min_state_size)
    check_run_folder(Path(str(run.training.output_dir)))


def run_pretraining(run: Run, callbacks: Sequence[TrainerCallback] = ()) -> RunResult:
    """Train, test and save.

    Writes the model, `train_results.json`, `test_results.json`, `run.json`, `compression.json` and, unless told not to,
    `report.html` and a model card.

    Args:
        run: the parsed run.
        callbacks: further callbacks of the Trainer.

    Raises:
        ValueError: as `check_run`, and on a checkpoint to resume from whose tensors disagree with its config.
        OSError: as `check_run`, and if the data cannot be read.
        SystemExit: with code 143, after SIGTERM has ended training with a checkpoint.
    """
    check_run(run)
    with no_empty_folder(Path(str(run.training.output_dir))):
        return _run(run, callbacks, _checkpoint_to_resume(run))


def _run(run: Run, callbacks: Sequence[TrainerCallback], checkpoint: str | None) -> RunResult:
    arguments = run.arguments
    task = load_task(arguments.task or "", data_dir=arguments.data_dir, seed=run.training.seed, **run.task_options)
    model = build_model(run, task)
    trainer, callback = build_trainer(run, task, model, callbacks)
    if arguments.report:
        keep_card(trainer)
    parameters = model.num_parameters()
    metrics = _train_and_test(trainer, task, checkpoint)
    result = RunResult(
        task=task,
        model=model,
        metrics=metrics,
        sizes_before=original_sizes(model),
        sizes_after=state_sizes(model),
        speed=[] if callback is None else callback.timer.as_records(),
    )
    if trainer.is_world_process_zero():
        description = _describe(run, task, checkpoint, parameters, model.num_parameters())
        _write_records(run, result, description)
        if arguments.report:
            write_report(str(run.training.output_dir))
            trainer.create_model_card()
    return result


def _train_and_test(trainer: Trainer, task: Task, checkpoint: str | None) -> dict[str, float]:
    trained = trainer.train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=CACHES)
    durable = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, DurableCheckpoints))
    if durable.stopped_at is not None:
        logger.warning(f"stopped by SIGTERM at step {durable.stopped_at}; go on with --resume auto")
        raise SystemExit(128 + signal.SIGTERM)
    with whole_model(trainer):
        trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", trained.metrics)
    tested = trainer.evaluate(task.test, ignore_keys=CACHES, metric_key_prefix="test")
    trainer.save_metrics("test", tested)
    return trained.metrics | tested


def _write_records(run: Run, result: RunResult, description: dict[str, Any]) -> None:
    output = Path(str(run.training.output_dir))
    write_json(output / "run.json", description)
    if run.arguments.compress:
        record = {
            "settings": dataclasses.asdict(run.compression),
            "sizes_before": result.sizes_before,
            "sizes_after": result.sizes_after,
            "history": history(result.model),
            "speed": result.speed,
        }
        write_json(output / "compression.json", record)


def _describe(
    run: Run, task: Task, checkpoint: str | None, parameters_before: int, parameters_after: int
) -> dict[str, Any]:
    """What was run on what; see `report.RunRecord`. No path or name of this machine, which would end up in a card."""
    training = run.training
    return {
        "task": task_facts(task, run.task_options, run.arguments.data_dir),
        "model_type": run.arguments.model_type,
        "resumed": checkpoint is not None,
        "parameters_before": parameters_before,
        "parameters_after": parameters_after,
        "training": {
            **{key: getattr(training, key) for key in REPORTED},
            "ssm_learning_rate": run.arguments.ssm_learning_rate,
            "time_steps": run.arguments.time_steps,
            "optimizer": str(getattr(training.optim, "value", training.optim)),
            "scheduler": str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)),
        },
        **describe_environment(training.world_size),
    }


def _checkpoint_to_resume(run: Run) -> str | None:
    training = run.training
    if run.arguments.resume is not None and training.resume_from_checkpoint is not None:
        raise ValueError("give --resume or --resume_from_checkpoint, not both")
    if run.arguments.resume == "auto":
        found = decided_by_rank_0(lambda: newest_checkpoint(str(training.output_dir)))
        logger.warning(f"going on from {found}" if found else "no checkpoint to go on from; starting afresh")
        return None if found is None else str(found)
    wanted = run.arguments.resume or training.resume_from_checkpoint
    if wanted in (None, "", False, "false", "False"):
        return None
    if wanted in (True, "true", "True"):
        folder = Path(str(training.output_dir))
        wanted = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if wanted is None:
            raise ValueError(f"{training.output_dir} holds no checkpoint to resume from")
    decided_by_rank_0(lambda: verify_sealed(wanted))  # once, not as often as there are ranks
    return wanted


def summary(result: RunResult) -> str:
    """Return a table for a terminal: states per layer before and after, test metrics, and speed."""
    rows = [(f"layer {i}", b, a) for i, (b, a) in enumerate(zip(result.sizes_before, result.sizes_after, strict=True))]
    rows.append(("total", sum(result.sizes_before), sum(result.sizes_after)))
    cells = [[name, before, after, f"{after / before:.1%}"] for name, before, after in rows]
    lines = [aligned_table(["", "states before", "after", "kept"], cells)]
    for name, value in result.metrics.items():
        if name.startswith("test_") and not name.endswith(("_runtime", "_per_second", "_preparation_time")):
            lines.append(f"{name.replace('_', ' ')}: {value:.4f}")
    if change := speed_change(result.speed, result.sizes_before, result.sizes_after):
        first, last = change
        between = timed(result.speed[-2:-1])
        before = f", {between[0]['steps_per_second']:.1f} before the last cut" if between else ""
        lines.append(
            f"steps per second: {first:.1f} at full size{before}, {last:.1f} after the last cut "
            f"({last / first:.2f} x full size)"
        )
    lines.append(f"training time: {result.metrics['train_runtime']:.1f} s")
    return "\n".join(lines)
