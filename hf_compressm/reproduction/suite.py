"""Read a suite from YAML: which methods are compared on which tasks."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..runs.run_file import MAPPINGS, Run, as_mapping, load_yaml, make_run

KINDS: dict[str, tuple[set[str], set[str]]] = {
    "full": (set(), set()),
    "compressed": (set(), set()),
    "scratch": ({"sizes_of"}, set()),
    "distillation": ({"sizes_of", "teacher"}, {"alpha", "temperature"}),
    "hankel_norm": ({"weight"}, {"sizes_of"}),
    "score": ({"score", "sizes_of"}, {"cut_steps"}),
    "after_training": ({"of", "sizes_of"}, {"score", "refit_steps"}),
    "rank_stability": (set(), set()),
}
"""Arguments of each kind of method: those that it must have, and those that it may have."""

REFERENCES = ("sizes_of", "teacher", "of")
"""Arguments that name another method of the same task, whose run of the same seed is needed first."""


@dataclass(frozen=True)
class Method:
    """One row of a task's table.

    Attributes:
        name: unique within its task.
        kind: one of `KINDS`.
        arguments: what the kind takes.
        options: options of the run file that this method overrides.
        seeds: number of seeds, >= 1.
    """

    name: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1

    @property
    def needs(self) -> list[str]:
        """Names of the methods whose runs this one needs."""
        return [self.arguments[key] for key in REFERENCES if key in self.arguments]


@dataclass(frozen=True)
class TaskSuite:
    """A run file and the methods to compare on it.

    Attributes:
        name: unique within the suite.
        config: path of the run file.
        options: options of the run file that all methods override.
        methods: by name, each after those that it needs.
    """

    name: str
    config: Path
    options: dict[str, Any]
    methods: dict[str, Method]


@dataclass(frozen=True)
class Suite:
    """A named list of tasks."""

    name: str
    description: str
    tasks: list[TaskSuite]


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        task, method: what to run.
        seed: seed of the run, counted from 0.
    """

    task: TaskSuite
    method: Method
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Names of task and method, and the seed."""
        return self.task.name, self.method.name, self.seed

    @property
    def needs(self) -> list[tuple[str, str, int]]:
        """Keys of the runs that must be finished before."""
        return [(self.task.name, name, self.seed) for name in self.method.needs]

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the run's outcome, including the runs that it needs."""
        parts: list[Any] = [_run_file(self.task.config), self.task.options, self.seed]
        for method in [self.method, *(self.task.methods[name] for name in self.method.needs)]:
            parts.append([method.kind, method.arguments, method.options])
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def jobs(suite: Suite) -> list[Job]:
    """List all runs of a suite, each after those that it needs.

    They go seed by seed, so that the table of an interrupted suite has a value for every method.
    """
    seeds = max((method.seeds for task in suite.tasks for method in task.methods.values()), default=0)
    return [
        Job(task, method, seed)
        for seed in range(seeds)
        for task in suite.tasks
        for method in task.methods.values()
        if seed < method.seeds
    ]


def select(
    suite: Suite,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    data: Mapping[str, str] | None = None,
) -> Suite:
    """Return a part of a suite.

    Args:
        suite: the whole.
        tasks: names to keep; None keeps all.
        methods: names to keep, with those that they need, in every task that has them; None keeps all.
        seeds: at most as many of each method, >= 1; None keeps all.
        data: task name -> local folder with its data.

    Raises:
        ValueError: on a name that the suite does not have, or seeds below 1.
    """
    _refuse_unknown(suite.name, dict.fromkeys([*(tasks or []), *(data or {})]), {task.name for task in suite.tasks})
    _refuse_unknown(suite.name, dict.fromkeys(methods or []), {name for task in suite.tasks for name in task.methods})
    if seeds is not None:
        _seeds("seeds", seeds)
    found = []
    for task in suite.tasks:
        if tasks is not None and task.name not in tasks:
            continue
        kept = set(task.methods) if methods is None else {name for name in methods if name in task.methods}
        for method in reversed(task.methods.values()):
            kept |= set(method.needs) if method.name in kept else set()
        rows = {
            name: dataclasses.replace(method, seeds=min(method.seeds, seeds or method.seeds))
            for name, method in task.methods.items()
            if name in kept
        }
        options = task.options | ({"data_dir": data[task.name]} if data and task.name in data else {})
        if rows:
            found.append(dataclasses.replace(task, methods=rows, options=options))
    return dataclasses.replace(suite, tasks=found)


def load_suite(path: str | Path) -> Suite:
    """Read a suite.

    ```yaml
    description: What the table is about.
    seeds: 3                                # a task or a method may say otherwise
    tasks:
      digits:
        config: ../runs/digits_mimo_ssm.yaml   # relative to this file
        options: {num_train_epochs: 20}        # of the run file, for all methods
        methods:
          full: {method: full}
          tau 0.1: {method: compressed, options: {tau: 0.1}}
          scratch: {method: scratch, sizes_of: tau 0.1}
          distilled: {method: distillation, sizes_of: tau 0.1, teacher: full, alpha: 0.5, temperature: 2.0}
          regularised: {method: hankel_norm, weight: 1.0e-4, sizes_of: tau 0.1}
          LAST: {method: score, score: last, sizes_of: tau 0.1}
          after training: {method: after_training, of: full, sizes_of: tau 0.1}
          stability: {method: rank_stability}
    ```

    `sizes_of`, `teacher` and `of` name a method further up, whose run of the same seed gives the state sizes, the
    teacher, or the model to be cut. An option that is null takes away that of the run file.

    Raises:
        ValueError: on an unknown key, kind or reference, a missing argument, or a run file that does not parse; the
            message names the place.
        OSError: if a file cannot be read.
    """
    path = Path(path)
    content = load_yaml(path)
    _refuse_unknown(f"{path}", content, {"description", "seeds", "tasks"})
    tasks = as_mapping(f"{path}: tasks", content.get("tasks"))
    if not tasks:
        raise ValueError(f"{path} has no tasks")
    seeds = _seeds(f"{path}: seeds", content.get("seeds", 1))
    found = [
        _task(f"{path}: {name}", path.parent, str(name), as_mapping(f"{path}: {name}", spec), seeds)
        for name, spec in tasks.items()
    ]
    return Suite(path.stem, str(content.get("description", "")), found)


def _task(where: str, folder: Path, name: str, spec: dict[str, Any], seeds: int) -> TaskSuite:
    _refuse_unknown(where, spec, {"config", "options", "seeds", "methods"})
    if "config" not in spec:
        raise ValueError(f"{where} needs `config`, a run file")
    config = (folder / str(spec["config"])).resolve()
    options = as_mapping(f"{where}: options", spec.get("options"))
    seeds = _seeds(f"{where}: seeds", spec.get("seeds", seeds))
    methods: dict[str, Method] = {}
    for label, row in as_mapping(f"{where}: methods", spec.get("methods")).items():
        method = _method(f"{where}: {label}", str(label), as_mapping(f"{where}: {label}", row), seeds)
        for needed in method.needs:
            if needed not in methods:
                raise ValueError(f"{where}: {label} needs {needed!r}, which is no method further up")
            if methods[needed].seeds < method.seeds:
                raise ValueError(
                    f"{where}: {label} has {method.seeds} seeds, but {needed!r}, which it needs, has "
                    f"{methods[needed].seeds}"
                )
        methods[method.name] = method
    if not methods:
        raise ValueError(f"{where} has no methods")
    task = TaskSuite(name, config, options, methods)
    for method in methods.values():
        try:
            make_job_run(Job(task, method, 0), "outputs")
        except ValueError as error:
            raise ValueError(f"{where}: {method.name}: {error}") from error
    return task


def _method(where: str, name: str, row: dict[str, Any], seeds: int) -> Method:
    kind = row.pop("method", None)
    if kind not in KINDS:
        raise ValueError(f"{where}: method must be one of {', '.join(KINDS)}; got {kind!r}")
    options = as_mapping(f"{where}: options", row.pop("options", None))
    seeds = _seeds(f"{where}: seeds", row.pop("seeds", seeds))
    required, optional = KINDS[kind]
    _refuse_unknown(where, row, required | optional, also={"method", "options", "seeds"})
    if missing := sorted(required - row.keys()):
        raise ValueError(f"{where}: method {kind} needs {', '.join(missing)}")
    return Method(name, kind, row, options, seeds)


def _seeds(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where} must be an integer >= 1; got {value!r}")
    return value


def _refuse_unknown(where: str, found: Mapping[Any, Any], known: set[str], also: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known | also, n=1)
            raise ValueError(
                f"{where}: unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else ''}; "
                f"allowed are {', '.join(sorted(known | also))}"
            )


def make_job_run(job: Job, output: str | Path, model: Mapping[str, Any] | None = None) -> Run:
    """Make the run of a run file with the options of task and method. An option that is null there removes the file's.

    Args:
        job: what to run.
        output: the run's folder.
        model: fields of the model's config that override the rest, such as state sizes.

    Raises:
        ValueError: as `parse_run`.
    """
    content = _run_file(job.task.config)
    layers = [job.task.options, job.method.options, {"model": dict(model or {})}]
    for options in layers:
        merged = {
            name: {**as_mapping(name, content.get(name)), **as_mapping(name, options[name])}
            for name in MAPPINGS
            if name in options
        }
        content = {**content, **options, **merged}
    content |= {
        "seed": job.seed,
        "output_dir": str(output),
        "compress": job.method.kind == "compressed",
        "report": False,
        "resume": "auto",
        "disable_tqdm": True,
        "report_to": "none",
    }
    given = {name: value for name, value in content.items() if value is not None}
    return make_run(given, f"{job.task.config}, {job.method.name}")


def _run_file(path: Path) -> dict[str, Any]:
    """Return what a run file holds. It is read once while it does not change: a suite asks hundreds of times."""
    stat = path.stat()
    return copy.deepcopy(_read_run_file(path, stat.st_mtime_ns, stat.st_size))


@lru_cache
def _read_run_file(path: Path, changed: int, size: int) -> dict[str, Any]:
    return load_yaml(path)


def as_record(job: Job) -> dict[str, Any]:
    """Describe a job in values ready for JSON, for the process that runs it."""
    return {
        "task": dataclasses.asdict(job.task) | {"config": str(job.task.config)},
        "method": job.method.name,
        "seed": job.seed,
    }


def from_record(record: Mapping[str, Any]) -> Job:
    """Return the job that `as_record` describes."""
    task = record["task"]
    methods = {name: Method(**method) for name, method in task["methods"].items()}
    found = TaskSuite(task["name"], Path(task["config"]), task["options"], methods)
    return Job(found, methods[record["method"]], record["seed"])
