"""Run programs of pages and scripts in this process, since importing everything anew takes ten seconds each time."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

import datasets
import huggingface_hub
import torch


def go_offline(monkeypatch, cache: Path) -> None:
    """Let nothing be downloaded, and let the caches of the hub and of data sets be empty folders in `cache`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "datasets"))


def run_program(text: str, folder: Path, monkeypatch, name: str = "program_of_a_page") -> None:
    """Run a program in a folder, as the module `name`; what it prints goes to stdout."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)  # where classes of the program are looked for
    monkeypatch.chdir(folder)
    exec(compile(text, f"<{name}>", "exec"), module.__dict__)


def run_script(path: Path, *arguments: object, monkeypatch) -> None:
    """Run a script as `python path arguments...` would.

    The modules that lie beside it are imported anew, and the number of torch's threads is restored.

    Raises:
        SystemExit: as the script does.
    """
    threads, beside = torch.get_num_threads(), {file.stem for file in path.parent.glob("*.py")}
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        for variable in [name for name in os.environ if name.startswith("HF_COMPRESSM_")]:
            patch.delenv(variable)
        for module in beside:
            patch.delitem(sys.modules, module, raising=False)
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
            for module in beside:
                sys.modules.pop(module, None)
