"""The process of one run: reads a job as JSON from standard input, writes its record to the folder given."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

RECORD = "record.json"


def main(folder: Path) -> None:
    """Run the job and write `record.json`, complete or not at all."""
    import torch

    from .methods import run_job
    from .suite import from_record

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    request = json.load(sys.stdin)
    record = run_job(from_record(request["job"]), folder, request["needed"])
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(record))
    partial.replace(folder / RECORD)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
