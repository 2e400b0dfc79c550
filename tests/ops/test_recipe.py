"""CONTRIBUTING.md's page on adding an op: its code, as it stands there, is a working op."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from hf_compressm import ops

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The page's blocks of code as files of a new op, `hf_compressm.ops.decayed_sum`; their names."""
    section = PAGE.read_text().split("## Add an op, or a backend to one")[1].split("\n## ")[0]
    folder = tmp_path / "decayed_sum"
    folder.mkdir()
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", section, re.DOTALL)
    for name, code in blocks:
        (folder / name).write_text(code)
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    yield folder
    for module in [name for name in sys.modules if name.startswith("hf_compressm.ops.decayed_sum")]:
        monkeypatch.delitem(sys.modules, module)


def test_the_recipe_makes_an_op(written):
    names = {path.name for path in written.iterdir()}
    assert names == {"__init__.py", "naive.py", "op.py", "cpu.py", "test_decayed_sum.py"}
    tests = importlib.import_module("hf_compressm.ops.decayed_sum.test_decayed_sum")
    called = [getattr(tests, name)() for name in vars(tests) if name.startswith("test_")]
    assert len(called) == 2
    with pytest.raises(ValueError, match=r"a must be \(\) and x \(B, L\)"):
        tests.decayed_sum(tests.torch.ones(2), tests.torch.ones(3, 4))
