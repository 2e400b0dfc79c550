"""Run one job of a suite in a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import new_file

RECORD = "record.json"
LOG = "log.txt"


def work(folder: Path, job: Mapping[str, Any], needed: Mapping[str, Any], threads: int, gpu: int | None) -> None:
    """Run a job and write `record.json`, complete or not at all. All output goes to `log.txt`.

    Args:
        folder: of the run.
        job: as `as_record` writes it.
        needed: records of earlier runs; see `run_job`.
        threads: of torch, >= 1.
        gpu: index of the only GPU that the run is to see; None for all there are.
    """
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):  # of the process, not only Python's: kernels and libraries print too
        os.dup2(log, stream)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    import torch

    from .methods import run_job
    from .suite import from_record

    torch.set_num_threads(threads)
    record = run_job(from_record(job), folder, needed)
    with new_file(folder / RECORD) as partial:
        partial.write_text(json.dumps(record))
