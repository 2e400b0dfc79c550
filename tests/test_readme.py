"""The README's program runs as it stands, but for its length."""

import re
from pathlib import Path

import pytest
from programs import go_offline, run_program

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_first_program_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert "num_train_epochs=20" in program
    program = program.replace("num_train_epochs=20", "max_steps=12").replace(
        "CompreSSMCallback(", "CompreSSMCallback(window_end=0.5, "
    )
    go_offline(monkeypatch, tmp_path / "cache")
    run_program(program, tmp_path, monkeypatch)
    sizes, accuracy = re.search(r"^\[(\d+, \d+, \d+)\] (0\.\d+)$", capsys.readouterr().out, re.MULTILINE).groups()
    assert all(int(size) < 256 for size in sizes.split(", ")) and 0 < float(accuracy) < 1
    assert (tmp_path / "outputs/readme/model.safetensors").exists()
