"""Scores of a saved model on a task: what `scripts/evaluate_model.py` calls."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.utils import cached_file

from ..models.automatic import switch_on
from ..models.saved import load_model, load_tokenizer
from ..report import describe_environment
from ..surgery import state_sizes
from .data_source import DataSource, evaluate, load_data

ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class EvaluationArguments:
    """What to score on what."""

    model: str = field(metadata={"help": "Folder of a saved model or of a PEFT adapter, or its name on the hub."})
    data: str = field(
        metadata={"help": "A registered task, or a text file, parquet file or folder, read with the model's tokenizer."}
    )
    split: str = field(default="test", metadata={"help": "Of the task.", "choices": ["train", "validation", "test"]})
    task_options: str | None = field(default=None, metadata={"help": "Options of the task as a JSON object."})
    data_dir: str | None = field(default=None, metadata={"help": "Local folder with the task's data, not the hub."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of a batch, on each process."})
    length: int | None = field(
        default=None, metadata={"help": "Tokens of a sequence. Default: the task's own, or 512."}
    )
    seed: int = field(default=0, metadata={"help": "Of a task's data."})
    cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})
    fast_ops: bool = field(default=True, metadata={"help": "Run stock selective mixers by this package's ops."})
    output: str | None = field(default=None, metadata={"help": "File for the result, as JSON; it is printed anyway."})


def parse_evaluation(argv: Sequence[str]) -> EvaluationArguments:
    """Parse `MODEL --data TASK [--option value ...]`.

    Raises:
        SystemExit: on unknown or missing options, with the usage.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--model")
    parsed = HfArgumentParser([EvaluationArguments]).parse_args_into_dataclasses(argv)  # type: ignore[list-item]
    return parsed[0]


def execute(arguments: EvaluationArguments) -> dict[str, Any]:
    """Score the model, on all processes together; JSON-ready, the same on every process.

    Raises:
        ValueError: if the data do not fit the model.
        OSError: if the model or data cannot be found.
    """
    state = PartialState(cpu=arguments.cpu)
    model = load_adapted(arguments.model, str(state.device), arguments.fast_ops)
    task = load_data(_source(arguments), model, load_tokenizer(arguments.model))
    began = time.perf_counter()
    metrics = evaluate(
        model, task, arguments.batch_size, arguments.split, rank=state.process_index, processes=state.num_processes
    )
    result = {
        "model": arguments.model,
        "task": task.name,
        "split": arguments.split,
        "metrics": metrics,
        "examples": len(getattr(task, arguments.split)),
        "state_sizes": state_sizes(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - began, 3),
        "device": state.device.type,
        **describe_environment(state.num_processes),
    }
    if arguments.output is not None and state.is_main_process:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
    return result


def load_adapted(name: str, device: str, fast_ops: bool = True) -> Any:
    """A saved model, or a saved PEFT adapter with the base that its config names; in evaluation mode.

    Stock selective mixers run by this package's ops unless `fast_ops` is False.

    Raises:
        ImportError: for an adapter, without peft.
    """
    try:
        adapter = json.loads(Path(str(cached_file(name, ADAPTER_CONFIG))).read_text())
    except OSError:
        adapter = None
    model = load_model(name if adapter is None else adapter["base_model_name_or_path"], device)
    switch_on(model, fast_ops)
    if adapter is None:
        return model
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"{name} is an adapter, which needs peft: pip install 'hf-compressm[peft]'") from error
    return PeftModel.from_pretrained(model, name).eval()


def _source(arguments: EvaluationArguments) -> DataSource:
    return DataSource(
        name=arguments.data,
        options=json.loads(arguments.task_options or "{}"),
        data_dir=arguments.data_dir,
        batch_size=arguments.batch_size,
        length=arguments.length,
        seed=arguments.seed,
    )
