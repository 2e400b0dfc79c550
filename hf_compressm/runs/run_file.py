"""Read a training run from a YAML file and options, and refuse what it cannot hold."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..data import describe_task, list_tasks, task_names
from ..training import CompressionConfig
from .arguments import (
    EXIT_CODES,
    TRACEBACK_HELP,
    OneLineParser,
    as_mapping,
    check_arguments,
    did_you_mean,
)
from .user_code import import_user_module


@dataclass
class RunArguments:
    """What to train on what; everything about the training itself is in `TrainingArguments`."""

    task: str | None = field(
        default=None,
        metadata={
            "help": f"One of: {', '.join(task_names())}. --list-tasks says what they are, and --help TASK what "
            "options one takes."
        },
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Local folder with the task's data, instead of the hub."}
    )
    task_options: str | None = field(
        default=None,
        metadata={"help": "Options of the task as JSON, or a mapping in the file; --help TASK lists them."},
    )
    model_type: str = field(default="mimo_ssm", metadata={"help": "Architecture, as known to AutoConfig."})
    model: str | None = field(
        default=None,
        metadata={"help": "Fields of the model's config as JSON; they override those of the file."},
    )
    time_steps: list[float] | None = field(
        default=None,
        metadata={
            "help": "Smallest and largest initial time step of recurrent layers with a dt_bias, such as 0.001 0.1, for "
            "stock classes whose config has none. Default: as the class begins."
        },
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
    imports: list[str] | None = field(
        default=None,
        metadata={
            "aliases": ["--import"],
            "action": "extend",
            "help": "Modules, or paths of .py files, that register tasks, models and adapters of your own. Their code "
            "is run.",
        },
    )
    report: bool = field(
        default=True,
        metadata={"help": "Write report.html and a model card at the end of training; --no_report leaves them out."},
    )


@dataclass
class Run:
    """A parsed run: arguments, compression settings, fields of the model's config and options of the task."""

    arguments: RunArguments
    training: TrainingArguments
    compression: CompressionConfig
    model: dict[str, Any]
    task_options: dict[str, Any]


GROUPS: Any = (RunArguments, TrainingArguments, CompressionConfig)
MAPPINGS = ("model", "task_options")
LIST_TASKS = ("--list-tasks", "--list_tasks")


def parse_run(argv: Sequence[str]) -> Run:
    """Parse `CONFIG.yaml [--option value ...]`; options on the command line override those in the file.

    `--list-tasks` and `--help TASK` print and exit, as `--help` does; they know the tasks of modules that are imported.

    The file is flat: fields of `RunArguments`, `TrainingArguments` and `CompressionConfig`, and mappings `model` with
    fields of the model's config and `task_options`.

    Raises:
        ValueError: on a file that is not a mapping, an unknown key (with the nearest known one), a value of the wrong
            type or out of its range, a missing task, or a token; the message names the file or the key.
        OSError: if the file cannot be read.
    """
    if (shown := _about_tasks(list(argv))) is not None:
        print(shown)
        raise SystemExit(0)
    return _make_run(*parse_options(GROUPS, argv, MAPPINGS))


def _about_tasks(words: list[str]) -> str | None:
    """What `--list-tasks` or `--help TASK` asks for; None if neither is given."""
    for place, word in enumerate(words):
        if word in LIST_TASKS:
            _import_modules([*words[:place], *words[place + 1 :]])
            return list_tasks()
        if word in ("--help", "-h") and (name := "".join(words[place + 1 : place + 2])) and not name.startswith("-"):
            _import_modules([*words[:place], *words[place + 2 :]])
            return describe_task(name)
    return None


def _import_modules(words: list[str]) -> None:
    """Import the modules that these options name."""
    (arguments, *_), _ = parse_options(GROUPS, words, MAPPINGS)
    for name in arguments.imports or ():
        import_user_module(name)


def make_run(content: Mapping[str, Any], source: str) -> Run:
    """Make the run that a file of this content describes.

    Args:
        content: option -> value.
        source: name of the file, for the messages.

    Raises:
        ValueError: as `parse_run`.
    """
    return _make_run(*_parse(GROUPS, [], MAPPINGS, check_options(content, source, GROUPS, MAPPINGS)))


def _make_run(groups: tuple[Any, ...], mappings: dict[str, dict[str, Any]]) -> Run:
    for name in groups[0].imports or ():
        import_user_module(name)
    if groups[0].task is None:
        raise ValueError(f"no task given; set `task` in the file or pass --task, one of: {', '.join(task_names())}")
    arguments, training, compression = groups
    return Run(arguments, training, compression, **mappings)


class OptionParser(OneLineParser, HfArgumentParser):
    """A parser whose options are the fields of dataclasses."""

    def __init__(self, groups: Sequence[Any], **options: Any) -> None:
        super().__init__(groups, **options)
        for action in self._actions:
            if action.dest == "fsdp":  # a switch that transformers still types as text, for values of old
                action.type = _as_switch


def _as_switch(word: str) -> bool | str | None:
    """True or None for a word that switches on or off, and the word itself if it is neither."""
    return {"true": True, "false": None}.get(word.lower(), word)


def parse_options(
    groups: Sequence[Any], argv: Sequence[str], mappings: Sequence[str] = ()
) -> tuple[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Parse `[CONFIG.yaml] [--option value ...]`; options on the command line override those in the file.

    Args:
        groups: dataclasses whose fields the options are.
        argv: arguments without the program's name.
        mappings: fields that the command line takes as JSON objects, and the file as mappings. Their keys are joined.

    Returns:
        An instance of each group, and the mappings by name.

    Raises:
        ValueError: on an unknown option (with the nearest known one), a value of the wrong type or out of its range,
            or a token; the message names the file or the option.
        OSError: if the file cannot be read.
    """
    words, from_file = list(argv), {}
    if words and not words[0].startswith("-"):
        from_file = read_options(Path(words.pop(0)), groups, mappings)
    return _parse(groups, words, mappings, from_file)


def _parse(
    groups: Sequence[Any], words: list[str], mappings: Sequence[str], from_file: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, dict[str, Any]]]:
    found = {name: from_file.pop(name, {}) for name in mappings}
    parser = OptionParser(list(groups), epilog=f"{TRACEBACK_HELP} {EXIT_CODES}")
    parser.set_defaults(**from_file)
    parsed = parser.parse_args_into_dataclasses(args=words)
    for name in mappings:
        given = next(getattr(group, name) for group in parsed if hasattr(group, name))
        found[name] = found[name] | as_mapping(f"--{name}", given)
    check_arguments(*parsed)
    return parsed, found


@lru_cache
def _option_parser(groups: tuple[Any, ...]) -> OptionParser:
    return OptionParser(list(groups))  # takes 60 ms, and a suite needs one for each run


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML file, in which no key may be given twice.

    Raises:
        ValueError: on a file that is not such a mapping.
        OSError: if the file cannot be read.
    """
    try:
        content = yaml.load(path.read_bytes(), _StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of options in YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options to values; got {type(content).__name__}")
    return content


def read_options(path: Path, groups: Sequence[Any], mappings: Sequence[str] = ()) -> dict[str, Any]:
    """Read the options in a YAML file, and give each the type of its field.

    Args:
        path: the file.
        groups: dataclasses whose fields the options are.
        mappings: fields that the command line takes as JSON objects, and the file as mappings.

    Raises:
        ValueError: on a file that is not a mapping, an unknown key (with the nearest known one), or a value of the
            wrong type.
        OSError: if the file cannot be read.
    """
    return check_options(load_yaml(path), str(path), groups, mappings)


def check_options(
    content: Mapping[Any, Any], source: str, groups: Sequence[Any], mappings: Sequence[str] = ()
) -> dict[str, Any]:
    """Give options the types of their fields, as `read_options` does.

    Args:
        content: option -> value.
        source: name of the file, for the messages.
        groups: dataclasses whose fields the options are.
        mappings: fields whose values are mappings.

    Raises:
        ValueError: on an unknown key (with the nearest known one), or a value of the wrong type.
    """
    known = {field.name: field for group in groups for field in dataclasses.fields(group) if field.init}
    for key in content:
        if key not in known:
            raise ValueError(f"{source}: unknown option {key!r}{did_you_mean(str(key), known)}")
    parser = _option_parser(tuple(groups))
    return {
        name: as_mapping(f"{source}: {name}", value)
        if name in mappings
        else _as_field(parser, source, known[name], value)
        for name, value in content.items()
    }


def _as_field(parser: OptionParser, source: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """A value from a file as the command line would read it, so that both take and refuse the same."""
    name = field.name
    if value is None:
        if parser.get_default(name) is None:
            return None
        raise ValueError(f"{source}: {name} has no value; give one, or leave the line out")
    if isinstance(value, list):
        if "list[str]" in str(field.type) and all(isinstance(item, str) for item in value):
            return value  # some of these fields take one word on the command line
        options = [f"--{name}", *map(str, value)]
    else:
        options = [f"--{name}={json.dumps(value, default=str) if isinstance(value, dict) else value}"]
    try:
        return getattr(parser.parse_args(options), name)
    except ValueError as error:
        raise ValueError(f"{source}: {name} cannot be {value!r}: {error}") from error
