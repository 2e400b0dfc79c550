"""A whole training run from a YAML file: what `scripts/pretrain.py` and the benchmarks call."""

from __future__ import annotations

import dataclasses
import difflib
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .data import Task, load_task, task_names
from .models.fast_ops import has_stock_mixers, use_fast_ops
from .surgery import history, original_sizes, state_sizes
from .training import (
    CompressionConfig,
    CompreSSMCallback,
    DurableCheckpoints,
    create_optimizer,
    newest_checkpoint,
    verify_checkpoint,
)

logger = logging.get_logger(__name__)

HEADS = {"sequence_classification": AutoModelForSequenceClassification, "causal_lm": AutoModelForCausalLM}

CACHES = ["cache_params", "past_key_values"]
"""Outputs of models that are not predictions; stock state-space models do not say so themselves."""


@dataclass
class RunArguments:
    """What to train on what; everything about the training itself is in `TrainingArguments`."""

    task: str | None = field(default=None, metadata={"help": f"One of: {', '.join(task_names())}."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Local folder with the task's data, instead of the hub."}
    )
    task_options: str | None = field(
        default=None, metadata={"help": "Options of the task as JSON, or a mapping in the file; see its docstring."}
    )
    model_type: str = field(default="mimo_ssm", metadata={"help": "Architecture, as known to AutoConfig."})
    model: str | None = field(
        default=None,
        metadata={"help": "Fields of the model's config as JSON; they override those of the file."},
    )
    ssm_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of state-space parameters, without weight decay. Default: no own group."},
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "auto: go on from the newest checkpoint in output_dir that verifies, or start afresh if there is "
            "none. A folder: go on from that checkpoint."
        },
    )
    compress: bool = field(
        default=True, metadata={"help": "Cut states during training; --no_compress trains at full size."}
    )
    fast_ops: bool = field(
        default=True,
        metadata={"help": "Run stock selective mixers by this package's ops; --no_fast_ops keeps transformers' own."},
    )


@dataclass
class Run:
    """A parsed run: arguments, compression settings, fields of the model's config and options of the task."""

    arguments: RunArguments
    training: TrainingArguments
    compression: CompressionConfig
    model: dict[str, Any]
    task_options: dict[str, Any]


@dataclass
class RunResult:
    """What a run produced.

    Attributes:
        model: the trained model.
        metrics: Trainer's training metrics, and test metrics with the prefix `test_`.
        sizes_before, sizes_after: state sizes per layer.
        speed: segments of training between cuts, with their steps per second; see `SpeedSegment`.
    """

    model: nn.Module
    metrics: dict[str, float]
    sizes_before: list[int]
    sizes_after: list[int]
    speed: list[dict[str, Any]]


def parse_run(argv: Sequence[str]) -> Run:
    """Parse `CONFIG.yaml [--option value ...]`; options on the command line override those in the file.

    The file is flat: fields of `RunArguments`, `TrainingArguments` and `CompressionConfig`, and a mapping `model` with
    fields of the model's config.

    Raises:
        ValueError: on a file that is not a mapping, an unknown key (with the nearest known one), a missing task, or a
            token.
        FileNotFoundError: if the file does not exist.
    """
    parser = HfArgumentParser([RunArguments, TrainingArguments, CompressionConfig])  # type: ignore[list-item]
    argv, from_file = list(argv), {}
    if argv and not argv[0].startswith("-"):
        from_file = _read_yaml(Path(argv.pop(0)))
    model = from_file.pop("model", None) or {}
    task_options = from_file.pop("task_options", None) or {}
    parser.set_defaults(**from_file)
    arguments, training, compression = parser.parse_args_into_dataclasses(args=argv)
    if arguments.task is None:
        raise ValueError(f"no task given; set `task` in the file or pass --task, one of: {', '.join(task_names())}")
    if training.hub_token is not None:
        raise ValueError(
            "hub_token would be saved and pushed with the training arguments; log in with `hf auth login`, or set "
            "HF_TOKEN"
        )
    if arguments.model is not None:
        model = model | json.loads(arguments.model)
    if arguments.task_options is not None:
        task_options = task_options | json.loads(arguments.task_options)
    return Run(arguments, training, compression, model, task_options)


def _read_yaml(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options to values; got {type(content).__name__}")
    known = {
        f.name
        for cls in (RunArguments, TrainingArguments, CompressionConfig)
        for f in dataclasses.fields(cls)
        if f.init
    }
    for key in content.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"{path}: unknown option {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    return content


def build_model(run: Run, task: Task) -> nn.Module:
    """A freshly initialised model for the task, seeded by the run.

    Raises:
        ValueError: on an unknown architecture or config field.
    """
    config = AutoConfig.for_model(run.arguments.model_type)
    if unknown := [key for key in run.model if not hasattr(config, key)]:
        raise ValueError(
            f"{type(config).__name__} has no field {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(sorted(key for key in config.to_dict() if not key.startswith('_')))}"
        )
    config = AutoConfig.for_model(run.arguments.model_type, **task.model_kwargs, **run.model)
    config.validate()  # now, not at the first save
    set_seed(run.training.seed)
    model = HEADS[task.problem].from_config(config)
    if run.arguments.fast_ops and has_stock_mixers(model):
        use_fast_ops(model)
    return model


def build_trainer(run: Run, task: Task, model: nn.Module) -> tuple[Trainer, CompreSSMCallback | None]:
    """A plain Trainer for the run, and its compression callback if the run compresses."""
    optimizer = None
    if run.arguments.ssm_learning_rate is not None:
        optimizer = create_optimizer(model, run.training, run.arguments.ssm_learning_rate)
    callback = CompreSSMCallback(run.compression) if run.arguments.compress else None
    trainer = Trainer(
        model=model,
        args=run.training,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=task.collator or default_data_collator,  # never the one that pads by the tokenizer
        processing_class=task.tokenizer,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        callbacks=[*([callback] if callback else []), DurableCheckpoints()],
        optimizers=(optimizer, None),
    )
    return trainer, callback


def execute(run: Run) -> RunResult:
    """Train, test and save; writes the model, `train_results.json`, `test_results.json` and `compression.json`.

    Raises:
        ValueError: on a checkpoint to resume from whose tensors disagree with its config, and as `build_model` does.
        SystemExit: with code 143, after SIGTERM has ended training with a checkpoint.
    """
    task = load_task(
        run.arguments.task or "", data_dir=run.arguments.data_dir, seed=run.training.seed, **run.task_options
    )
    model = build_model(run, task)
    trainer, callback = build_trainer(run, task, model)
    trained = trainer.train(resume_from_checkpoint=_checkpoint_to_resume(run), ignore_keys_for_eval=CACHES)
    durable = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, DurableCheckpoints))
    if durable.stopped_at is not None:
        logger.warning(f"stopped by SIGTERM at step {durable.stopped_at}; go on with --resume auto")
        raise SystemExit(128 + signal.SIGTERM)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", trained.metrics)
    tested = trainer.evaluate(task.test, ignore_keys=CACHES, metric_key_prefix="test")
    trainer.save_metrics("test", tested)
    result = RunResult(
        model=model,
        metrics=trained.metrics | tested,
        sizes_before=original_sizes(model),
        sizes_after=state_sizes(model),
        speed=[] if callback is None else callback.timer.as_records(),
    )
    if trainer.is_world_process_zero() and callback is not None:
        record = {
            "settings": dataclasses.asdict(run.compression),
            "sizes_before": result.sizes_before,
            "sizes_after": result.sizes_after,
            "history": history(model),
            "speed": result.speed,
        }
        output = Path(str(run.training.output_dir)) / "compression.json"
        output.write_text(json.dumps(record, indent=2) + "\n")
    return result


def _checkpoint_to_resume(run: Run) -> str | None:
    training = run.training
    if run.arguments.resume is not None and training.resume_from_checkpoint is not None:
        raise ValueError("give --resume or --resume_from_checkpoint, not both")
    if run.arguments.resume == "auto":
        found = newest_checkpoint(str(training.output_dir))
        logger.warning(f"going on from {found}" if found else "no checkpoint to go on from; starting afresh")
        return None if found is None else str(found)
    wanted = run.arguments.resume or training.resume_from_checkpoint
    if wanted in (None, "", False, "false", "False"):
        return None
    if wanted in (True, "true", "True"):
        wanted = get_last_checkpoint(training.output_dir)
        if wanted is None:
            raise ValueError(f"{training.output_dir} holds no checkpoint to resume from")
    verify_checkpoint(wanted)
    return wanted


def summary(result: RunResult) -> str:
    """The table that a run ends with: states per layer before and after, test metrics, and speed."""
    width = max(len(f"layer {len(result.sizes_before)}"), 5)
    lines = [f"{'':{width}}  {'states before':>13}  {'after':>6}  {'kept':>6}"]
    rows = [(f"layer {i}", b, a) for i, (b, a) in enumerate(zip(result.sizes_before, result.sizes_after, strict=True))]
    rows.append(("total", sum(result.sizes_before), sum(result.sizes_after)))
    lines += [f"{name:{width}}  {before:>13}  {after:>6}  {after / before:>6.1%}" for name, before, after in rows]
    for name, value in result.metrics.items():
        if name.startswith("test_") and not name.endswith(("_runtime", "_per_second", "_preparation_time")):
            lines.append(f"{name.replace('_', ' ')}: {value:.4f}")
    if len(result.speed) > 1:
        first, before, after = (result.speed[i]["steps_per_second"] for i in (0, -2, -1))
        lines.append(
            f"steps per second: {first:.1f} at full size, {before:.1f} before the last cut, {after:.1f} after it "
            f"({after / first:.2f} x full size)"
        )
    lines.append(f"training time: {result.metrics['train_runtime']:.1f} s")
    return "\n".join(lines)
