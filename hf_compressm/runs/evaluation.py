"""Score a saved model on a task: what `scripts/evaluate_model.py` calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..files import check_file, write_json
from ..models.automatic import switch_on
from ..models.saved import load_model, load_tokenizer
from ..moved import old_names
from ..report import describe_environment
from ..surgery import state_sizes
from .arguments import DataSource, as_mapping
from .data_source import evaluate, load_data
from .early_checks import check_saved_model, check_source, import_peft, read_adapter
from .run_file import parse_options

__getattr__ = old_names(__name__)


@dataclass
class EvaluationArguments:
    """What to score on what."""

    model: str = field(metadata={"help": "Folder of a saved model or of a PEFT adapter, or its name on the hub."})
    data: str = field(
        metadata={"help": "A registered task, or a text file, parquet file or folder, read with the model's tokenizer."}
    )
    split: str = field(
        default="test", metadata={"help": "Part of the task.", "choices": ["train", "validation", "test"]}
    )
    task_options: str | None = field(default=None, metadata={"help": "Options of the task as a JSON object."})
    data_dir: str | None = field(default=None, metadata={"help": "Local folder with the task's data, not the hub."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a batch, on each process."})
    length: int | None = field(
        default=None, metadata={"help": "Tokens in a sequence. Default: what the task says, or 512 for files."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the task's data."})
    cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})
    fast_ops: bool = field(default=True, metadata={"help": "Run stock selective mixers by this package's ops."})
    output: str | None = field(default=None, metadata={"help": "File for the result, as JSON; it is printed anyway."})


def parse_evaluation(argv: Sequence[str]) -> EvaluationArguments:
    """Parse `MODEL --data TASK [--option value ...]`.

    Raises:
        ValueError: on unknown or missing options.
    """
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    (arguments,), _ = parse_options([EvaluationArguments], words)
    return arguments


def run_evaluation(arguments: EvaluationArguments) -> dict[str, Any]:
    """Score the model, on all processes together.

    Returns:
        The scores, and what was scored how and on what, ready for JSON; the same on every process.

    Raises:
        ValueError: if the data do not fit the model.
        OSError: if the model or data cannot be found, or the output cannot be written.
    """
    source = _source(arguments)
    check_source(source)
    check_saved_model(arguments.model)
    if arguments.output is not None:
        check_file(Path(arguments.output))
    state = PartialState(cpu=arguments.cpu)
    model = load_adapted(arguments.model, str(state.device), arguments.fast_ops)
    task = load_data(source, model, load_tokenizer(arguments.model))
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
        write_json(Path(arguments.output), result)
    return result


def load_adapted(name: str, device: str, fast_ops: bool = True) -> Any:
    """Load a saved model, or a saved PEFT adapter with the base that its config names, in evaluation mode.

    Args:
        name: folder or name on the hub.
        device: as torch names it.
        fast_ops: let stock selective mixers run by this package's ops.

    Raises:
        ImportError: for an adapter, without peft.
    """
    adapter = read_adapter(name)
    model = load_model(name if adapter is None else adapter["base_model_name_or_path"], device)
    switch_on(model, fast_ops)
    if adapter is None:
        return model
    return import_peft().PeftModel.from_pretrained(model, name).eval()


def _source(arguments: EvaluationArguments) -> DataSource:
    return DataSource(
        name=arguments.data,
        options=as_mapping("--task_options", arguments.task_options),
        data_dir=arguments.data_dir,
        batch_size=arguments.batch_size,
        length=arguments.length,
        seed=arguments.seed,
    )
