"""The documentation is true: its programs run, its commands parse, its links lead somewhere, its messages exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of every block of code, in order."""
    return BLOCK.findall(page.read_text())


def commands(text: str) -> list[list[str]]:
    """The commands of a block of shell, each as its words, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = (re.split(r"\s&&\s", line) for line in lines)
    return [words for line in parts for part in line if (words := shlex.split(part, comments=True))]


def program(page: Path) -> str:
    """The page's Python, and its commands where they stand between, as one program."""
    lines = []
    for language, content in blocks(page):
        if language == "python":
            lines.append(content)
        elif language == "bash":
            for words in commands(content):
                assert words[0] == "hf-compressm", words
                lines.append(f"from hf_compressm.cli import app; app({words[1:]!r}, standalone_mode=False)")
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["tutorial", "adapters"])
def test_every_block_of_the_page_runs_in_order(page, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program(ROOT / "docs" / f"{page}.md")],
        cwd=tmp_path,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if page == "tutorial":
        written = {path.relative_to(tmp_path / "outputs").as_posix() for path in tmp_path.rglob("outputs/**/*")}
        assert {"tutorial/report.html", "spectra.svg", "mamba-shell/config.json", "mamba-own/config.json"} <= written
        assert re.search(r"^\[CompreSSM\] Step 20: states \[64, 64\] .* -> .*, error bound <= .* per layer, .* s$",
                         done.stdout, re.MULTILINE)  # fmt: skip


def messages_in_sources() -> list[str]:
    """Every text of the package that is not a docstring, with a NUL where a value is put in."""
    texts = []
    for path in sorted((ROOT / "hf_compressm").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                texts.append(node.value)
    return texts


def occurs(quoted: str, texts: list[str]) -> bool:
    """Whether a message, with `...` for what varies, begins one of the texts."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("...")), re.DOTALL)
    return any(pattern.match(text) for text in texts)


def test_every_quoted_message_is_one_of_the_package():
    texts = messages_in_sources()
    quoted = [content.strip() for language, content in blocks(ROOT / "docs/troubleshooting.md") if language == "text"]
    assert len(quoted) >= 15 and len(set(quoted)) == len(quoted)
    assert [message for message in quoted if len(message.replace("...", "")) < 12] == []
    assert [message for message in quoted if not occurs(message, texts)] == []
    assert not occurs(quoted[0].replace("compressed", "squeezed"), texts)
