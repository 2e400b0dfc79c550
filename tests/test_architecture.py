"""The layout: import arrows point one way, scripts stay thin, nothing names a machine."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_compressm"
ALLOWED = {
    "compatibility": set(),
    "moved": set(),
    "progress": set(),
    "files": set(),
    "reduction": set(),
    "ops": set(),
    "layers": {"ops"},
    "models": {"layers", "ops"},
    "surgery": {"reduction", "models", "layers", "ops"},
    "training": {"models", "surgery", "reduction"},
    "data": {"models"},
    "deploy": {"models", "surgery"},
    "report": {"models", "surgery"},
    "hub": {"models", "report", "surgery"},
    "runs": {"data", "models", "reduction", "report", "surgery", "training"},
    "baselines": {"layers", "surgery", "reduction", "training"},
    "reproduction": {"baselines", "data", "models", "reduction", "report", "runs", "surgery", "training"},
    "api": {"models", "reduction", "surgery", "training"},
    "cli": {"deploy", "hub", "reduction", "report", "runs", "surgery"},
}
EVERYWHERE = {"compatibility", "files", "moved", "progress"}
FOREIGN = {
    "reduction": {"torch", "scipy"},
    "ops": {"torch", "triton", "numba", "llvmlite", "mamba_ssm", "causal_conv1d", "fla", "numpy"},
    "layers": {"torch"},
}


def package_imports(path: Path):
    """(first part within the package, top-level module) of every import in a file; one of the two is None."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level] + tuple((node.module or "").split("."))
            names = [base] if node.module else [(*base[:-1], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [tuple((node.module or "").split("."))]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "hf_compressm":
                yield (name[1] if len(name) > 1 and name[1] else None), None
            else:
                yield None, name[0]


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_import_arrows_point_one_way(part):
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else sorted((PACKAGE / part).rglob("*.py"))
    assert files
    for path in files:
        for own, foreign in package_imports(path):
            if own is not None and own != part:
                assert own in ALLOWED[part] | EVERYWHERE, f"{path.name} imports hf_compressm.{own}"
            if foreign is not None and part in FOREIGN:
                standard = foreign in {"__future__"} or foreign in __import__("sys").stdlib_module_names
                assert standard or foreign in FOREIGN[part], f"{path.name} imports {foreign}"


def test_every_part_of_the_package_has_a_rule():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == set(ALLOWED)


def test_the_table_of_contributing_is_the_one_that_is_tested():
    rows = re.findall(r"^\| `([a-z_]+)(?:\.py|/)` \| [^|]* \| ([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert {part: set(re.findall(r"`(\w+)`", used)) for part, used in rows} == ALLOWED


def test_scripts_are_thin():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150, path.name


LONGEST, MOST_ARGUMENTS = 45, 8
MORE_ARGUMENTS = {
    "cli.compress": "a command of the shell, whose groups of options are arguments",
    "data.listops.listops": "a task, whose options users name in run files",
    "data.mqar.mqar": "a task, whose options users name in run files",
    "data.series.series": "a task, whose options users name in run files",
    "data.text.text": "a task, whose options users name in run files",
    "models.mimo_ssm.configuration_mimo_ssm.MimoSSMConfig.__init__": "the fields of a config",
    "models.mimo_ssm.modeling_mimo_ssm.MimoSSMModel.forward": "the signature is that of transformers' models",
    "models.mimo_ssm.modeling_mimo_ssm.MimoSSMForCausalLM.forward": "the signature is that of transformers' models",
    "models.feature_extractor.MimoSSMFeatureExtractor.__init__": "each is a field of preprocessor_config.json",
    "models.forecasting.Forecasting.forward": "the signature is that of transformers' models",
    "models.selective.SelectiveModel.forward": "the signature is that of transformers' models",
    "surgery.plan.compress": "public, for hand-written loops",
}
"""Functions outside of `ops` with more arguments than others may have, and why."""


def functions(node: ast.AST, name: str):
    """(dotted name, node) of all functions in a module or class, nested ones with their own."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef):
            own = f"{name}.{inner.name}"
            if isinstance(inner, ast.FunctionDef):
                yield own, inner
            yield from functions(inner, own)


def test_functions_are_short_and_take_few_arguments():
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for name, node in functions(ast.parse(path.read_text()), module):
            kernel = node.name.endswith("_kernel")
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert lines <= LONGEST or kernel, f"{name} has {lines} lines"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
            if count > MOST_ARGUMENTS and not module.startswith("ops."):
                found.add(name)
    assert found == set(MORE_ARGUMENTS)
