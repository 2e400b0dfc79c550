"""The console script."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers import small_model
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_compressm import cli, state_sizes

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


def test_errors_are_one_line_with_an_exit_code(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hf-compressm", "inspect", folder, "--tau", "2"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == "error: tau must lie strictly between 0 and 1; got 2.0\n"


def test_contradicting_options_are_refused(folder, tmp_path):
    result = runner.invoke(
        cli.app, ["compress", folder, "--output", str(tmp_path), "--tau", "0.1", "--fraction", "0.5"]
    )
    assert result.exit_code == 2 and "not several" in result.output
