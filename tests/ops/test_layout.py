"""Every op has the layout that CONTRIBUTING.md's page on ops describes."""

import ast
import importlib
from pathlib import Path

import pytest

from hf_compressm import ops

FOLDERS = sorted(path.parent for path in Path(ops.__file__).parent.glob("*/__init__.py"))
FILES = {f"{name}.py" for name in ("__init__", "op", "naive", "step", "cpu", "cpu_kernels", "triton", "triton_kernels")}


def functions(path):
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_ops_have_one_layout(folder):
    files = {path.name for path in folder.glob("*.py")}
    assert files <= FILES and {"__init__.py", "op.py", "naive.py"} <= files
    exported = importlib.import_module(f"hf_compressm.ops.{folder.name}").__all__
    assert {folder.name, f"naive_{folder.name}"} <= set(exported)
    body = ast.parse((folder / "__init__.py").read_text()).body
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)
    assert [f.name for f in functions(folder / "op.py") if f.name == folder.name]
    assert [f.name for f in functions(folder / "naive.py") if f.name == f"naive_{folder.name}"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_backends_and_kernels_have_one_scheme_of_names(folder):
    differentiable = "register_gradient(" in (folder / "op.py").read_text()
    for name in ("cpu", "triton"):
        if (folder / f"{name}.py").exists():
            names = {function.name for function in functions(folder / f"{name}.py")}
            assert {"forward", *(["backward"] if differentiable else [])} <= names, (name, names)
    kernels = [
        function.name
        for path in folder.glob("*.py")
        for function in functions(path)
        if function.name.endswith("_kernel")
    ]
    assert all(name.startswith(f"{folder.name}_") for name in kernels), kernels
