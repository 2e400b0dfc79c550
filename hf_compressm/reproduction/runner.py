"""Run the jobs of a suite, several at a time, each in a process of its own. Finished jobs are not run again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..files import new_file
from .suite import REFERENCES, Job, as_record
from .worker import LOG, RECORD, work

logger = logging.get_logger(__name__)

JOB = "fingerprint.txt"
LAST_LINES = 15

Key = tuple[str, str, int]


class RunFailed(RuntimeError):
    """A run ended with an error; its log says why."""


def key_of(record: dict[str, Any]) -> Key:
    """Return the names of task and method, and the seed."""
    return record["task"], record["method"], record["seed"]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file. A last line that a kill has cut short is left out.

    Raises:
        ValueError: if any other line is not a record.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key_of(record)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            if number == len(lines):
                logger.warning(f"{path}: the last line was cut short; that run is done again")
                break
            raise ValueError(f"{path}, line {number}, is not a record of a run: {error!r}; remove it") from error
        records.append(record)
    return records


def current(records: Iterable[dict[str, Any]], jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Return the records whose fingerprint is that of their job now, in the order of the jobs."""
    found = {key_of(record): record for record in records}
    return [found[j.key] for j in jobs if found.get(j.key, {}).get("fingerprint") == j.fingerprint()]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file. It is on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass
class Runner:
    """Runs jobs and keeps their records in `output/results.jsonl`.

    A record counts as done while its fingerprint is that of its job: after a change of the suite or of a run file only
    what it touches is run again. Folders of runs hold the model, `log.txt` and, if the run file saves any, checkpoints,
    from which an interrupted run goes on.

    Attributes:
        output: folder for the results and all runs.
        workers: runs at a time, >= 1. With GPUs they take turns on them.
        threads: of torch in each run; None shares the machine's cores.
        done: records of finished runs.
        failed: runs that ended with an error, and what was said last.
    """

    output: Path
    workers: int = 1
    threads: int | None = None
    done: dict[Key, dict[str, Any]] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)
    _processes: set[BaseProcess] = field(default_factory=set)

    def __post_init__(self) -> None:
        # A fork of a process that has imported everything starts at once, but cannot use a GPU that it has touched.
        self._context: Any = get_context("spawn" if torch.cuda.is_available() else "forkserver")
        if self._context.get_start_method() == "forkserver":
            self._context.set_forkserver_preload(["hf_compressm.reproduction.methods"])

    @property
    def results(self) -> Path:
        """The JSON-lines file."""
        return self.output / "results.jsonl"

    def run(self, jobs: Iterable[Job]) -> None:
        """Run the jobs that are not done yet. Jobs that need a failed one are not run, and are named in `failed`.

        Raises:
            ValueError: if the results file is damaged.
        """
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1; got {self.workers}")
        jobs = list(jobs)
        self.output.mkdir(parents=True, exist_ok=True)
        waiting = self._remaining(jobs)
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.workers):
            slots.put(slot)
        running: dict[Future[dict[str, Any]], Job] = {}
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc=self.output.name, unit="run")
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                while waiting or running:
                    for job in self._ready(waiting, self.workers - len(running)):
                        waiting.remove(job)
                        running[pool.submit(self.start, job, slots)] = job
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._finish(running.pop(future), future)
                        bar.update()
                        bar.set_postfix_str(f"{len(self.failed)} failed" if self.failed else "")
            finally:
                self._stop()
                bar.close()

    def _remaining(self, jobs: list[Job]) -> list[Job]:
        records = {key_of(record): record for record in read_records(self.results)}
        wanted = {job.key for job in jobs}
        self.done = {key_of(record): record for record in current(records.values(), jobs)}
        kept = [record for key, record in records.items() if key not in wanted or key in self.done]
        with new_file(self.results) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        return [job for job in jobs if job.key not in self.done]

    def _ready(self, waiting: list[Job], free: int) -> list[Job]:
        for job in list(waiting):
            lost = next((key for key in job.needs if key in self.failed), None)
            if lost is not None:
                self.failed[job.key] = f"needs {_label(lost)}, which failed"
                waiting.remove(job)
        ready = [job for job in waiting if all(key in self.done for key in job.needs)]
        return ready[:free]

    def _finish(self, job: Job, future: Future[dict[str, Any]]) -> None:
        try:
            record = future.result()
        except RunFailed as error:
            self.failed[job.key] = str(error)
            logger.warning(f"{_label(job.key)} failed: {error}")
            return
        self.done[job.key] = record
        append_record(self.results, record)

    def start(self, job: Job, slots: SimpleQueue[int]) -> dict[str, Any]:
        """Run a job in a process of its own, as soon as a slot is free, and return its record.

        Raises:
            RunFailed: if the process ends with an error.
        """
        folder = self.folder(job)
        needed = {}
        for name in REFERENCES:
            if name in job.method.arguments:
                earlier = Job(job.task, job.task.methods[job.method.arguments[name]], job.seed)
                needed[name] = self.done[earlier.key] | {"folder": str(self.folder(earlier))}
        self._prepare(folder, job)
        slot, gpus = slots.get(), torch.cuda.device_count()
        try:
            process = self._context.Process(
                target=work, args=(folder, as_record(job), needed, self._threads(), slot % gpus if gpus > 1 else None)
            )
            process.start()
            self._processes.add(process)
            process.join()
            self._processes.discard(process)
        finally:
            slots.put(slot)
        if process.exitcode:
            last = "\n".join((folder / LOG).read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise RunFailed(f"exit code {process.exitcode}; {folder / LOG} ends with\n{last}")
        return json.loads((folder / RECORD).read_text())

    def folder(self, job: Job) -> Path:
        """Return the folder of a run."""
        return self.output / _as_name(job.task.name) / _as_name(job.method.name) / f"seed_{job.seed}"

    def _prepare(self, folder: Path, job: Job) -> None:
        """Keep what an interrupted run of the same job has left, and nothing else."""
        note = folder / JOB
        if folder.exists() and not (note.exists() and note.read_text() == job.fingerprint()):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(job.fingerprint())

    def _threads(self) -> int:
        return self.threads or max((os.cpu_count() or 1) // self.workers, 1)

    def _stop(self) -> None:
        for process in list(self._processes):
            process.terminate()


def _as_name(text: str) -> str:
    """A file name that tells apart what the text tells apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._")
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _label(key: Key) -> str:
    return f"{key[0]}, {key[1]}, seed {key[2]}"
