"""What the programs share: data options, JSON options, unknown options, and errors of a user as one line.

This module loads neither torch nor transformers, so that `hf-compressm --help` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from typing import Any, NoReturn

TRACEBACK = "--traceback"
TRACEBACK_HELP = f"{TRACEBACK} shows where an error was raised, before the line that says what it is."
EXIT_CODES = "Exit code 2: something given is wrong; standard error says what. Exit code 1: a bug, with a traceback."
GRACE = 3.0
"""Seconds that the other processes wait before they print an error; if process 0 failed, the launcher ends them."""

POSITIVE = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("ssm_learning_rate", "save_total_limit", "min_state_size", "calibration_batches"),
    *("logging_steps", "eval_steps", "save_steps", "adam_epsilon"),
}
NOT_NEGATIVE = {
    *("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "seed", "dataloader_num_workers"),
    *("refit_steps", "data_seed", "neftune_noise_alpha"),
}
BELOW_ONE = {"adam_beta1", "adam_beta2", "label_smoothing_factor"}
READERS = "datasets.packaged_modules."
"""Where `datasets` reads files, of a stream while it trains."""
WHILE_TRAINING = {"create_optimizer", "create_scheduler", "_determine_best_metric"}
"""Methods of the Trainer that first use, while it trains, what the user gave for them."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where the data to calibrate and evaluate on comes from.

    Attributes:
        name: a registered task, or else the path of a text file, a parquet file or a folder; see `text_task`.
        options: of the task; see its docstring.
        data_dir: local folder with the task's data, instead of the hub.
        batches: batches to calibrate on, >= 1; fewer if the data ends before.
        batch_size: sequences of a batch, >= 1.
        length: tokens of a sequence, >= 2. None: as the task has it, or 512 for files.
        seed: of a task's data and of the order in which they are drawn.

    Raises:
        ValueError: if a number is out of its range.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    data_dir: str | None = None
    batches: int = 8
    batch_size: int = 8
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("the name of the data is empty; give a task, a file or a folder")
        if self.batches < 1 or self.batch_size < 1:
            raise ValueError(f"batches and batch_size must be at least 1; got {self.batches} and {self.batch_size}")
        if self.length is not None and self.length < 2:
            raise ValueError(f"length must be at least 2; got {self.length}")


@contextmanager
def errors_as_lines(argv: Sequence[str]) -> Iterator[list[str]]:
    """Print an error of the user as one line, `error: ...`, on standard error, and exit with code 2.

    Gives the arguments without `--traceback`, which shows where the error was raised. Errors of a user are ValueError,
    OSError, RuntimeError, and an ImportError that says what to install. While a Trainer trains, only a ValueError that
    this package raises counts, and what the Trainer raises when it makes its optimizer or looks for its metric, and
    what `datasets` raises when it reads a stream's files; any other error keeps its traceback and exit code 1. Of
    several processes all exit; the line comes from the first that fails. (`accelerate launch` without `--quiet` adds
    lines of its own.)

    Raises:
        SystemExit: with code 2, after an error of the user.
    """
    words = [word for word in argv if word != TRACEBACK]
    try:
        yield words
    except Exception as error:
        if not _is_of_the_user(error):
            raise
        if len(words) < len(argv):
            traceback.print_exception(error)
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(GRACE)
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        print(f"error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_of_the_user(error: Exception) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in frames]
    if ("transformers.trainer", "train") in places:
        if any(module == "transformers.trainer" and name in WHILE_TRAINING for module, name in places):
            return isinstance(error, (ValueError, TypeError, KeyError, ImportError))
        if any(module.startswith(READERS) for module, _ in places):
            return True
        return isinstance(error, ValueError) and places[-1][0].startswith("hf_compressm.")
    if isinstance(error, ImportError):
        # Python itself gives the name of what it could not import.
        return error.name is None or isinstance(error, PackageNotFoundError)
    return isinstance(error, (ValueError, OSError, RuntimeError))


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises on wrong usage, and suggests the option that an unknown one is nearest to."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below many lines of usage.

        Raises:
            ValueError: always.
        """
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse; nothing is left over.

        Raises:
            ValueError: on an unknown option or a value too many.
        """
        found, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            name = word.partition("=")[0]
            if word.startswith("-"):
                raise ValueError(f"unknown option {name}{did_you_mean(name, self._option_string_actions)}")
            raise ValueError(f"{word!r} belongs to no option; --help lists the options")
        return found, unknown


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that names the known name nearest to a given one; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0] if near[0].startswith('-') else repr(near[0])}?" if near else ""


def as_mapping(source: str, value: Any) -> dict[str, Any]:
    """Return a mapping, or the JSON object that a string holds; an empty one for None.

    Args:
        source: name of the option, for the message.
        value: mapping, string or None.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(value, str):
        if not isinstance(value or {}, dict):
            raise ValueError(f"{source} must map names to values; got {value!r}")
        return value or {}
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        found = error
    if not isinstance(found, dict):
        reason = f": {found}" if isinstance(found, Exception) else ""
        raise ValueError(f'{source} takes a JSON object such as {{"name": 1}}; got {value!r}{reason}')
    return found


def check_arguments(*groups: Any) -> None:
    """Check dataclasses of options before anything is built.

    Raises:
        ValueError: on a hub token, and on numbers that would fail, or be nonsense, only when training has begun.
    """
    if any(getattr(group, "output_dir", None) == "" for group in groups):
        raise ValueError("output_dir is empty; name a folder")
    if any(getattr(group, "hub_token", None) is not None for group in groups):
        raise ValueError(
            "hub_token would be saved and pushed with the training arguments; log in with `hf auth login`, or set "
            "HF_TOKEN"
        )
    for group in groups:
        for name, value in vars(group).items():
            if not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number; got {value}")
            if name in POSITIVE and value <= 0:
                raise ValueError(f"{name} must be greater than 0; got {value}")
            if name in NOT_NEGATIVE | BELOW_ONE and value < 0:
                raise ValueError(f"{name} must be at least 0; got {value}")
            if name in BELOW_ONE and value >= 1:
                raise ValueError(f"{name} must be below 1; got {value}")
            if name == "max_steps" and value < 1 and value != -1:
                raise ValueError(f"max_steps must be at least 1, or -1 for as many as there are epochs; got {value}")
