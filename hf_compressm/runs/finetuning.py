"""A trained model cut and healed with LoRA: what `scripts/finetune.py` and the healing benchmark call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed

from ..data import Task
from ..models.automatic import switch_on
from ..models.fast_ops import has_stock_mixers
from ..models.saved import load_model, load_tokenizer
from ..reduction import SizeConstraints
from ..report.text_tables import aligned_table
from ..surgery import (
    Energy,
    Fraction,
    Policy,
    Target,
    apply_plan,
    check_parameters,
    find_mixers,
    history,
    save_base_model,
    state_sizes,
)
from ..surgery.refit import STEPS
from ..training.distributed import plan_together, processes
from .data_source import DataSource, calibration, evaluate, load_data
from .pretraining import CACHES
from .run_file import as_mapping, check_arguments, read_options

TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "sequence_pair_classification": "SEQ_CLS"}
UNCALLED = ("dt_proj", "conv1d")
"""Layers of mixers whose weights transformers uses without calling the layer, so that LoRA around them does nothing."""


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
        default=None, metadata={"help": "Tokens of a sequence. Default: the task's own, or 512."}
    )
    target_state_size: float | None = field(default=None, metadata={"help": "Mean states per layer to cut to."})
    tau: float | None = field(default=None, metadata={"help": "Share of the sum of singular values that may go."})
    keep_fraction: float | None = field(default=None, metadata={"help": "Share of every layer's states to keep."})
    min_state_size: int = field(default=1, metadata={"help": "Fewest states that a layer may be left with."})
    refit_steps: int = field(
        default=STEPS, metadata={"help": "Steps in which each cut layer is refitted to the full one before healing."}
    )
    calibration_batches: int = field(default=8, metadata={"help": "Batches that the states are ranked on."})
    lora: str | None = field(
        default=None,
        metadata={
            "help": "Fields of peft.LoraConfig as JSON, or a mapping in the file; over r 16, lora_alpha 32 and the "
            "projections of the mixers."
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
        """Where the data come from."""
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
        """How much to cut; None if the model is to stay at its size."""
        given = {
            Target: self.arguments.target_state_size,
            Energy: self.arguments.tau,
            Fraction: self.arguments.keep_fraction,
        }
        chosen: list[Policy] = [policy(value) for policy, value in given.items() if value is not None]
        if len(chosen) > 1:
            raise ValueError("give one of target_state_size, tau and keep_fraction, not several")
        return chosen[0] if chosen else None


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
        FileNotFoundError: if the file does not exist.
    """
    parser = HfArgumentParser([FinetuneArguments, TrainingArguments])  # type: ignore[list-item]
    argv, from_file = list(argv), {}
    if argv and not argv[0].startswith("-"):
        groups: Any = (FinetuneArguments, TrainingArguments)
        from_file = read_options(Path(argv.pop(0)), groups, ("lora", "task_options"))
    lora, task_options = (from_file.pop(name, {}) for name in ("lora", "task_options"))
    parser.set_defaults(**from_file)
    arguments, training = parser.parse_args_into_dataclasses(args=argv)
    for name in ("model", "data"):
        if getattr(arguments, name) is None:
            raise ValueError(f"no {name} given; set `{name}` in the file or pass --{name}")
    lora |= as_mapping("--lora", arguments.lora)
    task_options |= as_mapping("--task_options", arguments.task_options)
    check_arguments(arguments, training)
    run = FinetuneRun(arguments, training, lora, task_options)
    run.policy()
    return run


def default_targets(model: nn.Module) -> list[str]:
    """Names of linear layers that LoRA goes around: those of the mixers that PEFT allows, or without any the others."""
    own = type(model).__module__.startswith("hf_compressm.")
    names = {
        name.rpartition(".")[2]
        for site in find_mixers(model)
        for name, module in site.mixer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not names:
        names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        names -= {"score", "lm_head"}
    return sorted(names - set(UNCALLED) - (set() if own else {"out_proj"}))


def add_lora(model: nn.Module, task: Task, settings: Mapping[str, Any]) -> Any:
    """The model with LoRA around it, of rank 16 with alpha 32 unless `settings`, fields of peft.LoraConfig, say so.

    Raises:
        ImportError: without peft.
        ValueError: if a layer is targeted that transformers' own mixers use without calling it: there the saved adapter
            would do nothing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("healing with LoRA needs peft: pip install 'hf-compressm[peft]'") from error
    defaults: dict[str, Any] = {"r": 16, "lora_alpha": 32, "task_type": TASK_TYPES[task.problem]}
    suited = default_targets(model)
    defaults |= {} if "target_modules" in settings else {"target_modules": suited}
    adapted = get_peft_model(model, LoraConfig(**(defaults | dict(settings))))
    for site in find_mixers(adapted):
        for name in UNCALLED if has_stock_mixers(site.mixer) else ():
            if hasattr(getattr(site.mixer, name, None), "lora_A"):
                raise ValueError(
                    f"transformers uses the weight of {name} in {site.name} without calling the layer, so LoRA around "
                    f"it would do nothing there. Take {name} out of target_modules; suited are {', '.join(suited)}."
                )
    return adapted


def heal(model: nn.Module, task: Task, run: FinetuneRun) -> tuple[Trainer, dict[str, float]]:
    """Train LoRA around the model by a plain Trainer; gives the Trainer, whose model has the adapters, and metrics."""
    set_seed(run.training.seed)
    trainer = Trainer(
        model=add_lora(model, task, run.lora),
        args=run.training,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=task.collator or default_data_collator,
        processing_class=task.tokenizer,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
    )
    resumed = run.training.resume_from_checkpoint
    return trainer, trainer.train(resume_from_checkpoint=resumed, ignore_keys_for_eval=CACHES).metrics


def execute(run: FinetuneRun) -> FinetuneResult:
    """Load, cut, heal, merge and save, with scores in between; writes the model and `finetuning.json`.

    With several processes, each ranks states on its own part of the calibration batches, and rank 0 decides.

    Raises:
        ValueError: on data that do not fit the model, and as `compress` does.
        OSError: if the model or data cannot be found.
    """
    arguments, training, policy = run.arguments, run.training, run.policy()
    model = load_model(arguments.model or "", str(training.device))
    switch_on(model, arguments.fast_ops)
    tokenizer = load_tokenizer(arguments.model or "")
    task = load_data(run.source(), model, tokenizer)
    scores = {"before": _scores(model, task, training)}
    sizes_before = state_sizes(model)
    if policy is not None:
        check_parameters(model)
        batches = calibration(model, run.source(), task, training.process_index, processes())
        plan = plan_together(
            model,
            batches,
            arguments.refit_steps,
            policy=policy,
            constraints=SizeConstraints(minimum=arguments.min_state_size),
            fast_ops=arguments.fast_ops,
        )
        apply_plan(model, None, plan)
        scores["cut"] = _scores(model, task, training)
    trainer, metrics = heal(model, task, run)
    adapted: Any = trainer.model
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    scores["healed"] = _scores(adapted.eval(), task, training)
    result = FinetuneResult(sizes_before, state_sizes(adapted), scores, trainable, metrics)
    _save(trainer, run, result, tokenizer)
    return result


def _save(trainer: Trainer, run: FinetuneRun, result: FinetuneResult, tokenizer: Any) -> None:
    adapted: Any = trainer.model
    output = Path(str(run.training.output_dir))
    if run.arguments.merge:
        trainer.model = adapted.merge_and_unload()
    elif trainer.is_world_process_zero():
        save_base_model(adapted, output / "base")
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        content = dataclasses.asdict(result) | {"settings": dataclasses.asdict(run.arguments) | {"lora": run.lora}}
        content["history"] = history(adapted)
        (output / "finetuning.json").write_text(json.dumps(content, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
    if run.training.push_to_hub:
        trainer.push_to_hub()  # saves first
    else:
        trainer.save_model()


def summary(result: FinetuneResult) -> str:
    """The table that a run ends with: sizes, and every score before the cut, after it, and healed."""
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
