"""Imports within `surgery` go one way, as its docstring draws them."""

import ast
import re
from pathlib import Path

import hf_compressm.surgery as surgery

FOLDER = Path(surgery.__file__).parent
LINES = [re.findall(r"`(\w+)/?`", line) for line in surgery.__doc__.splitlines() if line.startswith("- ")]
LEVEL = {name: level for level, names in enumerate(LINES) for name in names}


def imported(path: Path) -> set[str]:
    """Parts of `surgery` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            depth = len(path.relative_to(FOLDER).parts) - node.level
            if depth == 0:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found |= {name.split(".")[0] for name in names}
    return found


def test_every_module_stands_in_one_line():
    parts = {path.stem for path in FOLDER.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == LEVEL.keys() and sum(map(len, LINES)) == len(LEVEL)


def test_modules_import_from_lines_above_only():
    wrong = [
        f"{part} imports {other}"
        for part in LEVEL
        for path in ([FOLDER / f"{part}.py"] if (FOLDER / f"{part}.py").exists() else (FOLDER / part).glob("*.py"))
        for other in imported(path)
        if LEVEL[other] >= LEVEL[part]
    ]
    assert not wrong
