"""Runs the tests of Triton kernels in Triton's interpreter, all in one process, since importing takes longest."""

from pathlib import Path

import interpreter
import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = [*sorted(HERE.glob("test_*_triton.py")), HERE / "test_large_offsets.py"]


@interpreter.compiled
@pytest.mark.slow
def test_in_the_interpreter():
    interpreter.run_in_interpreter(*FILES)
