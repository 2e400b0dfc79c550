"""Shorten a suite to two steps a run, on stand-in files, to see whether everything builds, loads and trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..data import takes_data_dir
from ..data.random_files import write_stand_in
from .suite import Job, Method, Suite, TaskSuite, make_job_run

SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
}
CUT = [1]
"""Steps of the cuts."""


def dry_suite(suite: Suite, folder: Path) -> Suite:
    """Shorten every method of a suite to two steps of two items, at full model size and sequence length.

    Args:
        suite: any suite.
        folder: where stand-in files are written for tasks that read files and are given none.
    """
    return dataclasses.replace(suite, tasks=[_dry_task(task, folder) for task in suite.tasks])


def _dry_task(task: TaskSuite, folder: Path) -> TaskSuite:
    run = make_job_run(Job(task, next(iter(task.methods.values())), 0), folder)
    name, options = str(run.arguments.task), task.options | SMALL
    if takes_data_dir(name) and run.arguments.data_dir is None:
        options["data_dir"] = str(write_stand_in(name, folder / name))
    return dataclasses.replace(
        task, options=options, methods={key: _dry_method(method) for key, method in task.methods.items()}
    )


def _dry_method(method: Method) -> Method:
    options: dict[str, Any] = {key: value for key, value in method.options.items() if key not in SMALL}
    arguments = dict(method.arguments)
    if method.kind == "compressed" and options.get("trigger") == "stability":
        options |= {"window_end": 1.0, "stability_interval": 0.5}
    elif method.kind == "compressed":
        options["cut_steps"] = CUT
    elif method.kind == "score":
        arguments["cut_steps"] = CUT
    return dataclasses.replace(method, options=options, arguments=arguments, seeds=1)
