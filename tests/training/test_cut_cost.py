"""The benchmark of what a cut costs runs, and finds every part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.multi_process
def test_every_part_of_a_cut_is_timed(tmp_path):
    command = [
        *(sys.executable, "scripts/benchmarks/cut_cost.py", "--config", "configs/runs/digits_narrow.yaml"),
        *(
            "--processes",
            "2",
            "--cuts",
            "2",
            "--spacing",
            "3",
            "--target",
            "40",
            "--output",
            str(tmp_path / "cost.json"),
        ),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cost.json").read_text())["processes"]["2"]
    seconds = found["seconds"]
    assert found["step"] > 0 and all(seconds[part] > 0 for part in ("decision", "broadcast", "rebuild", "verification"))
    assert "| verification |" in done.stdout and len(found["sizes"]) == 2
