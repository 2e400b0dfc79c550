"""The run files of examples/ run as they stand, but for their length, on the data that their script writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from programs import go_offline, run_script

from hf_compressm.runs.pretraining import parse_run

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUNS = sorted(EXAMPLES.glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A present folder in which the commands of the page work: the examples, with their data made."""
    place = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES, place / "examples", ignore=shutil.ignore_patterns("data"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        run_script(place / "examples/make_data.py", monkeypatch=monkeypatch)
    return place


def test_the_page_names_every_run():
    page = (EXAMPLES / "README.md").read_text()
    assert RUNS and [run.name for run in RUNS if f"`{run.name}`" not in page] == []


def test_the_data_are_the_same_each_time(folder, tmp_path, monkeypatch):
    run_script(folder / "examples/make_data.py", tmp_path, monkeypatch=monkeypatch)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (folder / "examples/data" / file.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_each_runs_without_a_network(folder, run, tmp_path, monkeypatch, capsys):
    go_offline(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(folder)
    fields = parse_run([f"examples/{run.name}"])
    assert fields.training.output_dir.startswith("outputs/")
    short = ["--output_dir", "out", "--max_steps", "6", "--window_end", "0.9", "--eval_strategy", "no"]
    script = EXAMPLES.parent / "scripts/pretrain.py"
    run_script(script, f"examples/{run.name}", *short, "--use_cpu", "true", monkeypatch=monkeypatch)
    assert "training time" in capsys.readouterr().out
    results = json.loads(Path("out/test_results.json").read_text())
    assert all(torch.isfinite(torch.tensor(value)) for value in results.values())
    record = json.loads(Path("out/compression.json").read_text())
    assert sum(record["sizes_after"]) < sum(record["sizes_before"])
