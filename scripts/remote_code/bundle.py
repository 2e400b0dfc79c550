"""Write several modules of the package as one self-contained file, for `make.py`.

The file has the definitions of one module, and those of others that they need.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "hf_compressm"

WIDTH = 120
"""Longest line of imports."""

Reference = tuple[str, str]
"""A module, as dotted path, and a name in it."""


@dataclass
class Source:
    """A parsed module of this package.

    Attributes:
        path: dotted path.
        text: its source.
    """

    path: str
    text: str

    @classmethod
    def of(cls, path: str) -> Source:
        """Read a module of this checkout, by dotted path."""
        place = ROOT.joinpath(*path.split("."))
        if place.is_dir():
            return cls(f"{path}.__init__", (place / "__init__.py").read_text("utf-8"))
        return cls(path, place.with_suffix(".py").read_text("utf-8"))

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        """The statements that define each name, in order; the docstring behind a constant belongs to it."""
        found: dict[str, list[ast.stmt]] = {}
        last: str | None = None
        for node in self.tree.body:
            name = _defined_name(node)
            if name is not None and name != "__all__":
                found[name] = [node]
            elif last is not None and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                found[last].append(node)
            last = name if isinstance(node, ast.Assign | ast.AnnAssign) and name != "__all__" else None
        return found

    @cached_property
    def imports(self) -> dict[str, Reference]:
        """Where each imported name comes from; the second part is empty if the name is a module's own."""
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.asname or alias.name.partition(".")[0]
                    found[bound] = (alias.name if alias.asname else bound, "")
            elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
                for alias in node.names:
                    found[alias.asname or alias.name] = (self._absolute(node), alias.name)
        return found

    def _absolute(self, node: ast.ImportFrom) -> str:
        base = self.path.split(".")[: -node.level] if node.level else []
        return ".".join([*base, *([node.module] if node.module else [])])

    def code(self, name: str) -> str:
        """Return the text of a definition, with decorators and the comments above it."""
        first, last = self.definitions[name][0], self.definitions[name][-1]
        lines = self.text.splitlines()
        start = min([first.lineno, *(node.lineno for node in getattr(first, "decorator_list", []))]) - 1
        while start and lines[start - 1].startswith("#"):
            start -= 1
        return "\n".join(lines[start : last.end_lineno])

    def needs(self, name: str) -> list[str]:
        """List the names of this module that a definition reads, without its own.

        Raises:
            ValueError: if it imports from this package inside a function, which the bundle could not provide.
        """
        names = set()
        for statement in self.definitions[name]:
            for node in ast.walk(statement):
                if isinstance(node, ast.ImportFrom) and node.level:
                    raise ValueError(f"{name} of {self.path} imports from this package in line {node.lineno}")
                if isinstance(node, ast.Name) and (node.id in self.definitions or node.id in self.imports):
                    names.add(node.id)
        return sorted(names - {name})


def _defined_name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else None


@dataclass
class Bundle:
    """One file made of a module and what it needs.

    Args:
        replacements: what is taken in place of something else, both as (module, name).
        siblings: modules of this package that become files beside this one, by dotted path.
    """

    replacements: Mapping[Reference, Reference] = field(default_factory=dict)
    siblings: frozenset[str] = frozenset()
    _sources: dict[str, Source] = field(default_factory=dict)
    _edges: dict[str, dict[str, None]] = field(default_factory=dict)
    _chosen: dict[str, set[str]] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)
    _foreign: dict[str, Reference] = field(default_factory=dict)

    def write(self, module: str, title: str) -> str:
        """Return the file's text: a docstring, imports, and definitions, each after those that it needs.

        Args:
            module: dotted path of the module all of whose definitions are wanted.
            title: the docstring.

        Raises:
            ValueError: if two modules give the same name to different things.
        """
        entry = self._source(module)
        for name in entry.definitions:
            self._choose(entry, name)
        parts = []
        for path in self._ordered(module, []):
            source = self._sources[path]
            parts += [source.code(name) for name in source.definitions if name in self._chosen[path]]
        head = f'"""{title}"""\n\nfrom __future__ import annotations\n\n{self._imports()}\n\n'
        blank = "\n" if parts[0].startswith(("class ", "def ", "@", "#")) else ""
        return head + blank + "\n\n\n".join(parts) + "\n"

    def _source(self, path: str) -> Source:
        if path not in self._sources:
            self._sources[path] = Source.of(path)
        return self._sources[path]

    def _choose(self, source: Source, name: str) -> None:
        path = source.path.removesuffix(".__init__")
        if name in self._chosen.setdefault(path, set()):
            return
        self._claim(name, path)
        self._chosen[path].add(name)
        for needed in source.needs(name):
            if needed in source.definitions:
                self._choose(source, needed)
            else:
                self._bring(path, needed, source.imports[needed])

    def _bring(self, importer: str, bound: str, target: Reference) -> None:
        """Provide a name that a module imports, from another module of this package or from outside."""
        target = self.replacements.get(target, target)
        path, name = target
        if path.partition(".")[0] != PACKAGE or path in self.siblings:
            reference = (f".{path.rpartition('.')[2]}", name) if path in self.siblings else target
            full = ".".join(filter(None, reference))
            self._claim(bound, f"import of {full}")
            self._foreign[bound] = reference
            return
        source = self._source(path)
        if name in source.imports:
            self._bring(importer, bound, source.imports[name])
            return
        if bound != name:
            raise ValueError(f"{name} of {path} is imported as {bound}; give it one name")
        self._edges.setdefault(importer, {})[path] = None
        self._choose(source, name)

    def _ordered(self, module: str, before: list[str]) -> list[str]:
        """List modules such that each comes after those that it imports from."""
        for other in self._edges.get(module, ()):
            if other not in before:
                self._ordered(other, before)
        before.append(module)
        return before

    def _claim(self, name: str, owner: str) -> None:
        if self._owners.setdefault(name, owner) != owner:
            raise ValueError(f"{name} means {self._owners[name]} and {owner}; rename one of them")

    def _imports(self) -> str:
        """Write the import statements: the standard library's, then others, then those of files beside this one."""
        named: dict[str, list[str]] = {}
        groups: list[list[str]] = [[], [], []]
        for bound, (path, name) in sorted(self._foreign.items()):
            if name == bound:
                named.setdefault(path, []).append(name)
            elif name:
                groups[_group(path)].append(f"from {path} import {name} as {bound}")
            else:
                groups[_group(path)].append(f"import {path}" if path == bound else f"import {path} as {bound}")
        for path, names in sorted(named.items()):
            names.sort(key=lambda name: (not name.isupper(), not name[0].isupper(), name))  # as ruff orders them
            line = f"from {path} import {', '.join(names)}"
            if len(line) > WIDTH:
                line = f"from {path} import (\n    " + ",\n    ".join(names) + ",\n)"
            groups[_group(path)].append(line)
        ordered = (
            sorted(group, key=lambda line: (line.startswith("from"), line.split()[1], " as " in line))
            for group in groups
        )
        return "\n\n".join("\n".join(group) for group in ordered if group)


def _group(path: str) -> int:
    return 2 if path.startswith(".") else int(path.partition(".")[0] not in sys.stdlib_module_names)
