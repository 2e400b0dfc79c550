"""Plots of a suite: what lies far from the comparison does not squeeze it."""

from pathlib import Path

import pytest

from hf_compressm.reproduction.plots import APART, MARKERS, SLOW, axis_parts, main_part, points_by_kind, write_plots
from hf_compressm.reproduction.runner import read_records
from hf_compressm.reproduction.suite import load_suite

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("task", "panels"), [("digits", 6), ("digits_narrow", 6), ("stdlib_bytes", 6), ("listops", 3)])
def test_axes_are_broken_where_controls_or_slow_methods_lie_far_from_the_rest(task, panels, tmp_path):
    pytest.importorskip("matplotlib")
    records = read_records(ROOT / "docs/evidence/cpu/results.jsonl")
    suite = load_suite(ROOT / "configs/suites/cpu.yaml")
    paths = write_plots(suite, [record for record in records if record["task"] == task], tmp_path)
    text = paths[0].read_text()
    assert [path.name for path in paths] == [f"{task}.svg"] and text.count('<g id="axes_') == panels
    assert text.count('id="legend_') == 1


@pytest.mark.parametrize(("name", "column"), [("digits_narrow", 2), ("digits_narrow", 1), ("digits", 2), ("digits", 1)])
def test_the_comparison_fills_the_main_part(name, column):
    records = [r for r in read_records(ROOT / "docs/evidence/cpu/results.jsonl") if r["task"] == name]
    task = next(task for task in load_suite(ROOT / "configs/suites/cpu.yaml").tasks if task.name == name)
    found = points_by_kind(task, [record for record in records if record["kind"] in MARKERS])
    apart = APART if column == 2 else SLOW
    values = [(kind in apart, point[column], 0.0) for kind, points in found.items() for point in points]
    parts = axis_parts(values)
    low, high, _ = parts[main_part(parts)]
    compared = [value for far, value, _ in values if not far]
    assert len(parts) == 2 and low < min(compared) and max(compared) < high
    assert max(compared) - min(compared) > 0.6 * (high - low)
    assert parts[0][1] <= parts[1][0]
    assert all(any(start <= value <= end for start, end, _ in parts) for _, value, _ in values)


def test_an_axis_without_far_values_is_whole():
    assert len(axis_parts([(False, 1.0, 0.1), (False, 9.0, 0.1), (True, 8.0, 0.1)])) == 1
    assert len(axis_parts([(True, 1.0, 0.0)])) == 1
    assert [length for *_, length in axis_parts([(True, 0.0, 0.0), (False, 50.0, 0.0), (True, 99.0, 0.0)])] == [
        1,
        4,
        1,
    ]
