"""Public docstrings: everything public has one, tensors have shapes, errors are named, mathematics has a source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_compressm"
MATHS = re.compile(
    r"reduction/|ops/\w+/(op|naive|step)\.py|surgery/adapters/(?!base|refusals|__init__)"
    r"|baselines/(hankel_norm|selection|distillation)"
)
"""Modules that name the source of what they compute."""
SOURCE = re.compile(r"Source:|arXiv|et al\.|\b(19|20)\d\d\b")
SHAPE = re.compile(r"\([^()]*\b[A-Z]\w?\b[^()]*\)|shape|scalar|one value|entries|any size|as in|as for|as of|see ")
"""A tuple of size letters, or words that refer to one."""


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "remote" not in path.parts)


def public(tree: ast.Module):
    """(qualified name, node, enclosing class or None) of all public functions, classes and methods of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not is_kernel(node):
            yield node.name, node, None
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner, node


def is_kernel(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return node.name.endswith("_kernel") and bool(node.decorator_list)


def overrides(node: ast.FunctionDef, owner: ast.ClassDef | None) -> bool:
    """Whether a method only fills in what a base class describes, so that its docstring may stand there."""
    return owner is not None and bool(owner.bases)


def raised(node: ast.FunctionDef) -> set[str]:
    """Names of the errors that a function's own body raises and does not catch by its own name."""
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call) and isinstance(inner.exc.func, ast.Name):
            names.add(inner.exc.func.id)
    return names - {"AssertionError", "NotImplementedError", "AttributeError", "StopIteration"}


def takes_or_returns_tensors(node: ast.FunctionDef) -> bool:
    annotations = [argument.annotation for argument in [*node.args.args, *node.args.kwonlyargs]] + [node.returns]
    return any("Tensor" in ast.unparse(annotation) for annotation in annotations if annotation is not None)


def faults(path: Path) -> list[str]:
    """What is missing in a module's public docstrings."""
    tree = ast.parse(path.read_text())
    module = ast.get_docstring(tree) or ""
    found = [] if module or path.stat().st_size < 2 else ["the module has no docstring"]
    for name, node, owner in public(tree):
        text = ast.get_docstring(node) or ""
        around = (ast.get_docstring(owner) or "") if owner is not None else ""
        if not text and not (isinstance(node, ast.FunctionDef) and overrides(node, owner)):
            found.append(f"{name} has no docstring")
        if not isinstance(node, ast.FunctionDef) or not text:
            continue
        if takes_or_returns_tensors(node) and not SHAPE.search(text + around + module):
            found.append(f"{name} takes or returns tensors, and no shape is given")
        if (errors := raised(node)) and "Raises:" not in text:
            found.append(f"{name} raises {', '.join(sorted(errors))} without a Raises: section")
    relative = path.relative_to(PACKAGE).as_posix()
    functions = any(isinstance(node, ast.FunctionDef) for _, node, _ in public(tree))
    if MATHS.match(relative) and functions and not SOURCE.search(path.read_text()):
        found.append("mathematics without a source")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_docstrings_say_what_a_caller_needs(path):
    assert not faults(path), "\n".join(faults(path))


def test_the_test_can_fail(tmp_path, monkeypatch):
    broken = tmp_path / "reduction" / "module.py"
    broken.parent.mkdir()
    broken.write_text(
        '"""Words."""\ndef f(x: Tensor):\n    """Words."""\n    raise ValueError("no")\ndef g(): ...\nclass C: ...\n'
    )
    monkeypatch.setitem(faults.__globals__, "PACKAGE", tmp_path)
    found = faults(broken)
    assert [fault.split()[0] for fault in found] == ["f", "f", "g", "C", "mathematics"]
