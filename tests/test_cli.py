"""The console script."""

import importlib
import inspect as introspection
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from helpers import small_model
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_compressm import cli, runs, state_sizes
from hf_compressm.hub import push
from hf_compressm.runs.compression import CompressionJob

runner = CliRunner()


@pytest.fixture
def folder(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_inspect_lists_layers_and_tolerances(folder):
    result = runner.invoke(cli.app, ["inspect", folder, "--tau", "0.2", "--tau", "0.5"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "tau 0.2" in lines[0] and len(lines) == 3
    kept = [list(map(int, line.split()[-2:])) for line in lines[1:]]
    assert all(0 < few < more < 12 for more, few in kept)


def test_inspect_for_programs_and_as_a_plot(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    command = ["inspect", folder, "--tau", "0.2", "--tau", "0.5", "--json", "--plot", str(tmp_path / "plot.svg")]
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["architecture"] == "MimoSSMForSequenceClassification" and found["tau"] == [0.2, 0.5]
    for layer in found["layers"]:
        assert layer["states"] == len(layer["singular_values"]) == 12 and layer["rank"] <= 12
        assert layer["singular_values"] == sorted(layer["singular_values"], reverse=True)
        assert 0 < layer["kept"]["0.5"] < layer["kept"]["0.2"] < 12
    root = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
    charts = [child for child in root if child.tag.endswith("svg")]
    assert len(charts) == 2 and all(chart.get("role") == "img" for chart in charts)
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before


@pytest.mark.parametrize(("option", "sizes"), [(["--fraction", "0.5"], 12), (["--target", "4"], 8)])
def test_compress_saves_a_smaller_model(folder, tmp_path, option, sizes):
    result = runner.invoke(cli.app, ["compress", folder, "--output", str(tmp_path / "small"), *option])
    assert result.exit_code == 0, result.output
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert sum(state_sizes(loaded)) == sizes


def test_the_arguments_are_those_of_the_process(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hf-compressm", "inspect", folder, "--tau", "2"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == "error: tau must lie strictly between 0 and 1; got 2.0\n"


def test_defaults_in_help_texts_are_the_librarys():
    commands = typer.main.get_command(cli.app).commands
    told = {
        ("compress", "refit_steps"): CompressionJob.refit_steps,
        ("push", "timeout"): introspection.signature(push).parameters["timeout"].default,
    }
    for (command, name), default in told.items():
        option = next(option for option in commands[command].params if option.name == name)
        assert option.default is None and option.help.endswith(f"Default: {default:g}.")


def test_help_loads_neither_torch_nor_transformers(tmp_path):
    program = "import sys; sys.argv = ['hf-compressm', {!r}, '--help']\nfrom hf_compressm.cli import main\n"
    program += "try: main()\nexcept SystemExit as end: assert not end.code\n"
    program += "assert not {{'torch', 'transformers', 'datasets', 'numpy'}} & set(sys.modules)"
    for command in ("inspect", "push"):
        done = subprocess.run([sys.executable, "-c", program.format(command)], capture_output=True, text=True)
        assert done.returncode == 0 and "Usage: hf-compressm" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "module, old, new",
    [
        ("pretraining", "execute", "run_pretraining"),
        ("finetuning", "execute", "run_finetuning"),
        ("evaluation", "execute", "run_evaluation"),
        ("compression", "run", "compress_saved_model"),
        ("data_source", "calibration", "draw_calibration"),
    ],
)
def test_old_names_of_runs_warn(module, old, new):
    home = importlib.import_module(f"hf_compressm.runs.{module}")
    with pytest.warns(DeprecationWarning, match=f"is now hf_compressm.runs.{module}.{new}"):
        assert getattr(home, old) is getattr(home, new)
    assert new == "draw_calibration" or getattr(runs, new) is getattr(home, new)
