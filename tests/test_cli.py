"""The console script."""

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
