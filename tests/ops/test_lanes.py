"""What `ops/lanes.py` uses of Numba and llvmlite beyond their public interface is still there, by name."""

import ast
import pydoc
from pathlib import Path

import numba
import pytest

from hf_compressm.ops import lanes

IMPORTED = {
    f"{node.module}.{alias.name}"
    for node in ast.walk(ast.parse(Path(lanes.__file__).read_text()))
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("numba", "llvmlite"))
    for alias in node.names
}
CALLED = {
    "numba.core.base.BaseContext": ["cast", "get_dummy_value"],
    "numba.core.cgutils": ["for_range"],
    "numba.core.types": ["Float", "Type", "float32", "int64", "void"],
    "numba.core.typing.templates": ["AbstractTemplate", "infer_global", "signature"],
    "numba.extending": ["intrinsic", "lower_builtin", "register_model"],
    "numba.extending.models": ["PrimitiveModel"],
    "llvmlite.ir": ["Constant", "DoubleType", "FloatType", "IntType", "Type", "Undefined", "VectorType"],
    "llvmlite.ir.IRBuilder": [
        *("add", "bitcast", "extract_element", "fadd", "fcmp_ordered", "fdiv", "fmul", "fsub", "icmp_signed"),
        *("insert_element", "inttoptr", "load", "mul", "select", "shl", "shuffle_vector", "store", "sub"),
    ],
}
NAMES = sorted(IMPORTED | {f"{owner}.{name}" for owner, names in CALLED.items() for name in names})


@pytest.mark.parametrize("name", NAMES)
def test_what_the_vectors_use_of_numba_is_there(name):
    owner, _, last = name.rpartition(".")
    try:
        found = pydoc.locate(owner)
    except pydoc.ErrorDuringImport:
        found = None
    assert hasattr(found, last), (
        f"numba {numba.__version__} has no {name}, which hf_compressm/ops/lanes.py uses: adapt that file, then raise "
        "the upper bound of numba in pyproject.toml"
    )
