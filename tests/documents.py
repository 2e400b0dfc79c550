"""What the pages of the documentation hold: blocks of code, and the commands in blocks and in running text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

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


INLINE = re.compile(r"`((?:\w+=\w+ )*(?:python|torchrun|accelerate launch|hf-compressm|scripts/\w+\.py) [^`]+)`")


def commands_of(page: Path) -> list[list[str]]:
    """Every command of a page, in blocks of shell and in running text, without those that only show the form."""
    shell = [content for language, content in blocks(page) if language in ("bash", "sh", "shell", "console")]
    running = INLINE.findall(BLOCK.sub("", page.read_text()))
    return [words for text in [*shell, *running] for words in commands(text) if "[" not in "".join(words[1:3])]
