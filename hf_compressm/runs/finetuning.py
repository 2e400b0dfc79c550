"""Cut a trained model and heal it with LoRA: what `scripts/finetune.py` and the healing benchmark call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from ..data import Task
from ..files import check_apart, check_run_folder, no_empty_folder, write_json
from ..models.automatic import switch_on
from ..models.saved import copy_feature_extractor, load_model, load_tokenizer
from ..moved import old_names
from ..reduction import SizeConstraints
from ..report import describe_environment, keep_card
from ..report.text_tables import aligned_table
from ..surgery import (
    CutSettings,
    Policy,
    apply_plan,
    check_parameters,
    history,
    make_plan,
    save_base_model,
    state_sizes,
    with_details,
)
from ..surgery.policies import choose_policy
from ..surgery.processes import processes
from ..surgery.refit import STEPS
from ..training import whole_model
from ..training.distributed import TrainingTeam
from .arguments import DataSource
from .data_source import draw_calibration, evaluate, load_data
from .description import describe_base, public, saved_records, task_facts
from .early_checks import check_lora, check_saved_model, check_source
from .healing import heal, loaded_by_each_rank, unshard
from .pretraining import REPORTED
from .run_file import parse_options

__getattr__ = old_names(__name__)


@dataclass
class FinetuneArguments:
    """What to cut and heal on what; everything about the training itself is in `TrainingArguments`."""

    model: str | None = field(default=None, metadata={"help": "Folder of a trained model, or its name on the hub."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "A registered task, or a text file, parquet file or folder, read with the model's tokenizer."
        },
    )
    data_dir: str | None = field(default=None, metadata={"help": "Local folder with the task's data, not the hub."})
    task_options: str | None = field(
        default=None, metadata={"help": "Options of the task as JSON, or a mapping in the file."}
    )
    length: int | None = field(
        default=None, metadata={"help": "Tokens in a sequence. Default: what the task says, or 512 for files."}
    )
    target_state_size: float | None = field(default=None, metadata={"help": "Mean state size per layer to cut to."})
    tau: float | None = field(default=None, metadata={"help": "Share of the sum of singular values that may go."})
    keep_fraction: float | None = field(default=None, metadata={"help": "Share of every layer's states to keep."})
    min_state_size: int = field(default=1, metadata={"help": "Smallest number of states that a layer may keep."})
    refit_steps: int = field(
        default=STEPS, metadata={"help": "Steps in which each cut layer is refitted to the full one before healing."}
    )
    calibration_batches: int = field(default=8, metadata={"help": "Number of batches to rank the states on."})
    lora: str | None = field(
        default=None,
        metadata={
            "help": "Fields of peft.LoraConfig as JSON, or a mapping in the file. Default: r 16, lora_alpha 32, around "
            "the projections of the mixers."
        },
    )
    merge: bool = field(
        default=True, metadata={"help": "Save one plain model; --no_merge saves the adapter, and the base beside it."}
    )
    fast_ops: bool = field(default=True, metadata={"help": "Run stock selective mixers by this package's ops."})


@dataclass
class FinetuneRun:
    """A parsed run."""

    arguments: FinetuneArguments
    training: TrainingArguments
    lora: dict[str, Any]
    task_options: dict[str, Any]

    def source(self) -> DataSource:
        """Return where the data come from."""
        return DataSource(
            name=self.arguments.data or "",
            options=self.task_options,
            data_dir=self.arguments.data_dir,
            batches=self.arguments.calibration_batches,
            batch_size=self.training.per_device_train_batch_size,
            length=self.arguments.length,
            seed=self.training.seed,
        )

    def policy(self) -> Policy | None:
        """Return how much to cut; None if the model is to stay at its size.

        Raises:
            ValueError: if more than one amount is given, or one is out of its range.
        """
        given = self.arguments
        return choose_policy(given.tau, given.target_state_size, given.keep_fraction)


@dataclass
class FinetuneResult:
    """What a run did.

    Attributes:
        sizes_before, sizes_after: state sizes per layer.
        scores: loss and metrics on the test part, by moment: "before", "cut", "healed"; without a cut no "cut".
        trainable: number of parameters that were trained.
        metrics: Trainer's training metrics.
    """

    sizes_before: list[int]
    sizes_after: list[int]
    scores: dict[str, dict[str, float]]
    trainable: int
    metrics: dict[str, float]


def parse_finetune(argv: Sequence[str]) -> FinetuneRun:
    """Parse `CONFIG.yaml [--option value ...]`; options on the command line override those in the file.

    The file is flat: fields of `FinetuneArguments` and `TrainingArguments`, with `lora` and `task_options` mappings.

    Raises:
        ValueError: on an unknown key, no model or data, more than one amount to cut, or bad JSON.
        OSError: if the file cannot be read.
    """
    groups = (FinetuneArguments, TrainingArguments)
    (arguments, training), mappings = parse_options(groups, argv, ("lora", "task_options"))
    for name in ("model", "data"):
        if getattr(arguments, name) is None:
            raise ValueError(f"no {name} given; set `{name}` in the file or pass --{name}")
    run = FinetuneRun(arguments, training, **mappings)
    run.policy()
    return run


def run_finetuning(run: FinetuneRun) -> FinetuneResult:
    """Load, cut, heal, merge and save, with scores in between; writes the model and `finetuning.json`.

    With several processes, each ranks states on its own part of the calibration batches, and rank 0 decides.

    Raises:
        ValueError: on data that do not fit the model, and as `compress` does.
        OSError: if the model or data cannot be found, or the output folder cannot be written.
    """
    _check(run)
    with no_empty_folder(Path(str(run.training.output_dir))):
        return _run(run)


def _run(run: FinetuneRun) -> FinetuneResult:
    name, training = run.arguments.model or "", run.training
    with loaded_by_each_rank():
        model = load_model(name, str(training.device))
    switch_on(model, run.arguments.fast_ops)
    tokenizer = load_tokenizer(name)
    task = load_data(run.source(), model, tokenizer)
    scores = {"before": _scores(model, task, training)}
    sizes_before = state_sizes(model)
    if (policy := run.policy()) is not None:
        _cut(model, task, run, policy)
        scores["cut"] = _scores(model, task, training)
    trainer, metrics = heal(model, task, run)
    unshard(trainer)
    adapted: Any = trainer.model
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    scores["healed"] = _scores(adapted.eval(), task, training)
    result = FinetuneResult(sizes_before, state_sizes(adapted), scores, trainable, metrics)
    keep_card(trainer)
    _save(trainer, run, result, tokenizer, _describe(run, task))
    return result


def _check(run: FinetuneRun) -> None:
    """Find out before the work what cannot be."""
    name, output = run.arguments.model or "", Path(str(run.training.output_dir))
    check_source(run.source())
    check_lora(run.lora)
    check_saved_model(name, run.policy(), run.arguments.min_state_size)
    check_apart(output, name)
    check_run_folder(output)


def _cut(model: nn.Module, task: Task, run: FinetuneRun, policy: Policy) -> None:
    check_parameters(model)
    settings = CutSettings(
        policy,
        SizeConstraints(minimum=run.arguments.min_state_size),
        refit_steps=run.arguments.refit_steps,
        fast_ops=run.arguments.fast_ops,
    )
    batches = draw_calibration(model, run.source(), task, run.training.process_index, processes())
    plan = make_plan(model, settings=settings, calibration=batches, team=TrainingTeam())
    apply_plan(model, None, plan)


def _describe(run: FinetuneRun, task: Task) -> dict[str, Any]:
    """What `run.json` holds."""
    arguments, training = run.arguments, run.training
    return {
        "base": describe_base(arguments.model or ""),
        "task": task_facts(task, run.task_options, arguments.data_dir),
        "training": {key: getattr(training, key) for key in REPORTED} | {"lora": run.lora or None},
        **describe_environment(training.world_size),
    }


def _save(trainer: Trainer, run: FinetuneRun, result: FinetuneResult, tokenizer: Any, facts: dict[str, Any]) -> None:
    adapted: Any = trainer.model
    output = Path(str(run.training.output_dir))
    if run.arguments.merge:
        trainer.model = adapted.merge_and_unload()
    elif trainer.is_world_process_zero():
        save_base_model(adapted, output / "base")
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        records = with_details(history(adapted), saved_records(run.arguments.model or ""))
        settings = public(dataclasses.asdict(run.arguments) | {"lora": run.lora})
        content = dataclasses.asdict(result) | {"settings": settings, "history": records}
        write_json(output / "finetuning.json", content)
        write_json(output / "run.json", facts)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
        copy_feature_extractor(run.arguments.model or "", output)
    with whole_model(trainer):
        if run.training.push_to_hub:
            trainer.push_to_hub()  # saves first
        else:
            trainer.save_model()
            trainer.create_model_card()


def summary(result: FinetuneResult) -> str:
    """Return a table for a terminal: sizes, and every score before the cut, after it, and after healing."""
    moments = list(result.scores)
    lines = [f"states per layer: {result.sizes_before} -> {result.sizes_after}"]
    names = result.scores["before"]
    rows = [[name, *(f"{result.scores[moment][name]:.4f}" for moment in moments)] for name in names]
    lines.append(aligned_table(["test", *moments], rows))
    lines.append(f"trained parameters: {result.trainable}, in {result.metrics['train_runtime']:.1f} s")
    return "\n".join(lines)


def _scores(model: nn.Module, task: Task, training: TrainingArguments) -> dict[str, float]:
    batch_size = training.per_device_eval_batch_size
    return evaluate(model, task, batch_size, rank=training.process_index, processes=processes())
