"""Runs Triton kernels on the CPU in Triton's interpreter, which a process must choose before it defines a kernel.

A file `test_<op>_triton.py` holds both kinds of tests. `test_interpreter.py` runs those of the interpreter, of all
files in one process; by hand, `TRITON_INTERPRET=1 pytest -n 0 tests/ops/test_<op>_triton.py` does.

    pytest.importorskip("triton")

    @interpreter.interpreted
    def test_kernels_equal_the_reference(): ...        # calls the op with backend="triton" on CPU tensors

    @interpreter.compiled
    def test_kernels_compile_without_spills(): ...     # see `aot`

The interpreter is slow: what a test costs is in proportion to programs, time steps and states.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="does not run in the interpreter")


def run_in_interpreter(*arguments: str | Path, timeout: float = 900.0) -> None:
    """Runs tests in one new process with TRITON_INTERPRET=1; fails with their output if one fails.

    Args:
        arguments: of pytest: test files, and options such as "-k", "name".
        timeout: seconds.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *map(str, arguments)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-12000:] + done.stderr[-4000:]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory from `torch.empty` and its kin is NaN (integers: the largest) within, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _scan_slices(self, inputs):  # type: ignore[no-untyped-def]
    """`tl.associative_scan` in whole slices: the interpreter's own calls the combine function once per element."""
    import numpy as np

    arrays = [np.moveaxis(given.handle.data, self.axis, 0) for given in inputs]
    outputs = [np.empty_like(array) for array in arrays]
    last = None
    for place in range(len(arrays[0])):
        row = tuple(self.to_tensor(a[place], given.dtype) for a, given in zip(arrays, inputs, strict=True))
        last = row if last is None else self.combine_fn.fn(*last, *row)
        last = last if isinstance(last, tuple) else (last,)
        for output, value in zip(outputs, last, strict=True):
            output[place] = value.handle.data
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(output, 0, self.axis)), given.dtype)
        for output, given in zip(outputs, inputs, strict=True)
    ]


def _dot(self, a, b, *more):  # type: ignore[no-untyped-def]
    """`tl.dot` of bfloat16 numbers: the interpreter's own multiplies their bits, taken as whole numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    wide = lambda x: TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)  # noqa: E731
    return _create_dot(self, *(wide(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *more)


if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder, ScanOps

    ScanOps.generic_scan = _scan_slices
    _create_dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = _dot
