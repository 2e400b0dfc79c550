"""Every op has the layout that CONTRIBUTING.md's page on ops describes."""

import ast
import importlib
from pathlib import Path

import pytest

from hf_compressm import ops

FOLDERS = sorted(path.parent for path in Path(ops.__file__).parent.glob("*/__init__.py"))
pytestmark = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def names(path):
    """Functions that a file defines or imports."""
    body = ast.parse(path.read_text()).body
    imported = [alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [*imported, *(node.name for node in body if isinstance(node, ast.FunctionDef))]


def exported(folder):
    return importlib.import_module(f"hf_compressm.ops.{folder.name}").__all__


def test_ops_have_one_layout(folder):
    assert folder.name in names(folder / "op.py") and f"naive_{folder.name}" in names(folder / "naive.py")
    assert {folder.name, f"naive_{folder.name}"} <= set(exported(folder))
    body = ast.parse((folder / "__init__.py").read_text()).body
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)


def test_backends_and_kernels_have_one_scheme_of_names(folder):
    differentiable = "register_gradient(" in (folder / "op.py").read_text()
    for backend in filter(Path.exists, (folder / "cpu.py", folder / "triton.py")):
        assert {"forward", *(["backward"] if differentiable else [])} <= set(names(backend)), backend
    kernels = [name for path in folder.glob("*.py") for name in names(path) if name.endswith("_kernel")]
    # diag_system runs the kernels of diag_scan.
    owners = tuple(f"{name}_" for name in [*exported(folder), "diag_scan"])
    assert all(name.startswith(owners) for name in kernels), kernels
