"""The registry of tasks: a name in a config becomes data, metrics and the model's sizes."""

import difflib
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from datasets import Dataset
from transformers import EvalPrediction


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that training on one task needs besides the model and the optimizer.

    Each split is a `datasets.Dataset` that yields torch tensors under the names that the models' `forward`
    takes. In classification tasks these are `input_values`, float32 of shape (L, channels), or `input_ids`, int64 of
    shape (L,), and `labels`, an int64 scalar in [0, num_labels).

    Attributes:
        name: the registered name.
        train: the split to train on.
        validation: the split to choose checkpoints by; disjoint from `train`.
        test: the split to report on.
        model_kwargs: config fields that the data decides, for example `num_channels`, `num_labels`,
            `id2label`.
        compute_metrics: what `Trainer` takes under this name; returns Python floats.
        metric_for_best_model: a key that `compute_metrics` returns.
        greater_is_better: whether a larger value of that metric is better.
        preprocess_logits_for_metrics: what `Trainer` takes under this name, to keep less than all logits; or None.
        problem: which kind of head the model needs.
        hub_dataset: the data set's name on the hub; None where the data are from elsewhere.
        tokenizer: what made the tokens, to be saved with the model; None where there is none.
        feature_extractor: what made `input_values`, to be saved with the model; None where there is none.
        collator: makes a batch of items; None where `Trainer`'s default does.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    model_kwargs: dict[str, Any]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    metric_for_best_model: str
    problem: Literal[
        "sequence_classification", "sequence_pair_classification", "token_classification", "forecasting", "causal_lm"
    ]
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    greater_is_better: bool = True
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None
    tokenizer: Any = None
    feature_extractor: Any = None
    hub_dataset: str | None = None


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """Return the config fields of a classifier into classes of these names."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


TaskBuilder = Callable[..., Task]
_BUILDERS: dict[str, TaskBuilder] = {}


def register_task(name: str) -> Callable[[TaskBuilder], TaskBuilder]:
    """Decorator: make a function that returns a `Task` known to `load_task` under `name`.

    The function takes keyword arguments only. It names `data_dir` if it can read local files, `seed` if it
    draws its data at random, and whatever options it has beyond these, each with a default.

    Raises:
        ValueError: if the name is taken.
    """

    def register(builder: TaskBuilder) -> TaskBuilder:
        if name in _BUILDERS:
            raise ValueError(f"task {name!r} is already registered, by {_BUILDERS[name].__qualname__}")
        _BUILDERS[name] = builder
        return builder

    return register


def task_names() -> list[str]:
    """Return the names that `load_task` knows, sorted."""
    return sorted(_BUILDERS)


def describe_task(name: str) -> str:
    """Return what a registered task's docstring says, and each of its options with type and default.

    Raises:
        ValueError: if there is no such task.
    """
    _check_known(name)
    builder = _BUILDERS[name]
    about, _, described = (inspect.getdoc(builder) or "").partition("\nArgs:\n")
    texts = _descriptions(described.partition("\n\n")[0])
    options = {name: _described(parameter, texts) for name, parameter in inspect.signature(builder).parameters.items()}
    own = {name: text for name, text in options.items() if name not in OUTSIDE}
    lines = [f"task {name}: {about.partition('Raises:')[0].strip()}", ""]
    lines += [f"In a run file or on the command line:\n{options['data_dir']}"] if "data_dir" in options else []
    lines += ["Under task_options in a run file:", *own.values()] if own else []
    return "\n".join(lines).rstrip()


OUTSIDE = ("data_dir", "seed")
"""Arguments of a task that the run gives: they are fields of the run file itself."""


def _described(parameter: inspect.Parameter, texts: Mapping[str, str]) -> str:
    """An option with its type, default and description."""
    kind = "" if parameter.annotation is parameter.empty else inspect.formatannotation(parameter.annotation).strip("'")
    head = f"  {parameter.name}: {kind}, default {parameter.default!r}".replace(": ,", ",")
    text = textwrap.wrap(texts.get(parameter.name, ""), 112, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([head, *text])


def _descriptions(text: str) -> dict[str, str]:
    """Name -> text of the entries of a docstring's section; an entry may have several names, between commas."""
    entries = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}


def list_tasks() -> str:
    """Return a line for each registered task: its name, and the first line of its docstring."""
    width = max(map(len, _BUILDERS))
    first = {name: (inspect.getdoc(builder) or "").partition("\n")[0] for name, builder in _BUILDERS.items()}
    return "\n".join(f"{name:<{width}}  {first[name]}".rstrip() for name in task_names())


def takes_data_dir(name: str) -> bool:
    """Whether a registered task can read local files."""
    return name in _BUILDERS and "data_dir" in inspect.signature(_BUILDERS[name]).parameters


def load_task(name: str, *, data_dir: str | os.PathLike[str] | None = None, seed: int = 0, **options: Any) -> Task:
    """Load a registered task.

    Args:
        name: one of `task_names()`.
        data_dir: a local folder to read in place of the hub, for the tasks that come from there.
        seed: for tasks that generate their data. Tasks over a fixed data set have fixed splits, whatever the
            seed.
        options: further arguments of the task.

    Raises:
        ValueError: as `check_task`, and if the data do not fit the options or the task returns something else.
    """
    check_task(name, data_dir, options)
    arguments = dict(options) if data_dir is None else {**options, "data_dir": data_dir}
    if "seed" in inspect.signature(_BUILDERS[name]).parameters:
        arguments["seed"] = seed
    task = _BUILDERS[name](**arguments)
    if not isinstance(task, Task):
        raise ValueError(f"task {name!r} must return a Task; it returned a {type(task).__name__}")
    return task


def check_task(name: str, data_dir: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> None:
    """Check a task's name and the types of its options, without loading any data.

    Args:
        name: as of `load_task`.
        data_dir: as of `load_task`.
        options: option -> value.

    Raises:
        ValueError: if there is no such task, it does not take `data_dir` or one of the options, or an option is not of
            its type or not finite.
    """
    _check_known(name)
    accepted = inspect.signature(_BUILDERS[name]).parameters
    given = [*options, *([] if data_dir is None else ["data_dir"])]
    refused = [argument for argument in given if argument not in accepted]
    if refused:
        raise ValueError(
            f"task {name!r} does not take {', '.join(refused)}; it takes: {', '.join(accepted) or 'nothing'}"
        )
    for option, value in options.items():
        kinds = _plain_types(_BUILDERS[name], accepted[option])
        if kinds and type(value) not in {*kinds, *([int] if float in kinds else [])}:
            wanted = " or ".join("nothing" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"option {option} of task {name!r} must be of type {wanted}; got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"option {option} of task {name!r} must be a finite number; got {value}")


def _plain_types(builder: TaskBuilder, option: inspect.Parameter) -> tuple[type, ...]:
    """What an option may be, by its annotation or else its default; empty if that is more than plain values."""
    try:
        hint = get_type_hints(builder).get(option.name, type(option.default))
    except NameError:  # an annotation for type checkers alone
        hint = type(option.default)
    kinds = get_args(hint) or (hint,)
    return kinds if set(kinds) <= {bool, int, float, str, NoneType} and set(kinds) != {NoneType} else ()


def _check_known(name: str) -> None:
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"unknown task {name!r}{suggestion} there are: {', '.join(task_names())}")
