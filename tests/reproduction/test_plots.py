"""Plots of a suite: what lies far from the comparison does not squeeze it."""

from pathlib import Path

import pytest

from hf_compressm.reproduction.plots import write_plots
from hf_compressm.reproduction.runner import read_records
from hf_compressm.reproduction.suite import load_suite

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("task", "panels"), [("digits", 4), ("stdlib_bytes", 4), ("listops", 2)])
def test_an_axis_is_broken_where_controls_lie_far_from_the_rest(task, panels, tmp_path):
    pytest.importorskip("matplotlib")
    records = read_records(ROOT / "docs/evidence/cpu/results.jsonl")
    suite = load_suite(ROOT / "configs/suites/cpu.yaml")
    paths = write_plots(suite, [record for record in records if record["task"] == task], tmp_path)
    text = paths[0].read_text()
    assert [path.name for path in paths] == [f"{task}.svg"] and text.count('<g id="axes_') == panels
    assert text.count('id="legend_') == 1
