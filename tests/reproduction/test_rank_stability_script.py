"""scripts/benchmarks/rank_stability.py, on few steps of the smallest config."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/runs/digits_narrow.yaml")


@pytest.mark.slow
def test_the_script_prints_a_table_and_trains_no_seed_twice(tmp_path, monkeypatch, capsys):
    def run(seeds):
        options = ["--seeds", str(seeds), "--threads", str(torch.get_num_threads()), "--json", str(output)]
        monkeypatch.setattr(sys, "argv", ["rank_stability.py", CONFIG, *options, "--", "--max_steps", "8"])
        runpy.run_path(str(ROOT / "scripts/benchmarks/rank_stability.py"), run_name="__main__")
        return capsys.readouterr().out

    output = tmp_path / "stability.jsonl"
    monkeypatch.syspath_prepend(str(ROOT / "scripts/benchmarks"))
    assert "1 seed(s)" in run(1)
    first = output.read_text()
    printed = run(2)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert output.read_text().startswith(first) and [line["seed"] for line in lines] == [0, 1]
    assert lines[0]["overrides"] == ["--max_steps", "8"] and lines[0]["machine"]["torch"] == torch.__version__
    assert [record["share"] for record in lines[0]["records"]] == [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    rows = [row for row in printed.splitlines() if row.startswith("| ")]
    assert len(rows) == 10 and rows[-1].startswith("| 1 | 1.00 ± 0.00 | 1.00 ± 0.00 (0.25) |")
