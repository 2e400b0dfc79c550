"""Old import paths: they still work, and warn where the names are now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __package__
MODULES: dict[str, tuple[str, ...]] = {
    "compression": ("runs.compression", "runs.data_source", "runs.inspection", "models.saved", "data.text_files"),
    "compression.folders": ("files",),
    "compression.inspection": ("runs.inspection",),
    "compression.job": ("runs.compression",),
    "compression.loading": ("models.saved",),
    "compression.source": ("runs.data_source",),
    "compression.text_files": ("data.text_files",),
    "data.padding": ("data.collators",),
    "data.stand_ins": ("data.random_files",),
    "evaluation": ("runs.evaluation",),
    "finetuning": ("runs.finetuning",),
    "hub.card": ("report.card",),
    "hub.environment": ("report.environment",),
    "hub.figures": ("report.figures",),
    "hub.record": ("report.record",),
    "hub.report": ("report.page",),
    "hub.spectra": ("report.spectra",),
    "hub.svg": ("report.svg",),
    "hub.tables": ("report.tables",),
    "models.stand_ins": ("models.torch_ops",),
    "ops.diag_scan.cpu_system": ("ops.diag_system.cpu",),
    "ops.diag_scan.scan": ("ops.diag_scan.op",),
    "ops.diag_scan.system": ("ops.diag_system.op",),
    "ops.ssd_scan.scan": ("ops.ssd_scan.op",),
    "ops.state_statistics": ("ops.state_gramian",),
    "ops.state_statistics.cpu": ("ops.state_gramian.cpu",),
    "ops.state_statistics.naive": ("ops.state_gramian.naive",),
    "ops.state_statistics.triton": ("ops.state_gramian.triton",),
    "pretraining": ("runs.pretraining",),
    "reproduction.stability": ("reproduction.ranking_stability",),
    "reproduction.tables": ("reproduction.summary",),
    "run_file": ("runs.run_file",),
    "surgery.base": ("surgery.base_model",),
    "surgery.calibration": ("surgery.statistics",),
    "surgery.lora": ("surgery.peft.lora",),
    "surgery.lru": ("surgery.adapters.lru",),
    "surgery.mamba": ("surgery.adapters.mamba",),
    "surgery.mamba2": ("surgery.adapters.mamba2",),
    "surgery.refusals": ("surgery.adapters.refusals",),
    "surgery.selective": ("surgery.adapters.selective",),
    "surgery.tuners": ("surgery.peft.tuners",),
    "training.checkpoint": ("training.checkpoints.resume", "training.checkpoints.contents"),
    "training.survival": ("training.checkpoints.durable",),
    "training.verification": ("training.checkpoints.verification", "training.checkpoints.contents"),
    "user_code": ("runs.user_code",),
}
"""Modules of this package that are gone, and where their names are looked for, in this order."""

NAMES: dict[str, dict[str, str]] = {
    "files": {"checked_output": "files:check_output"},
    "hub": {
        "Exported": "hub.export:ExportResult",
        "Pushed": "hub.upload:PushResult",
        "RunRecord": "report",
        "describe_environment": "report",
        "keep_card": "report",
        "read_run": "report",
        "render_card": "report",
        "render_report": "report",
        "tolerances_plot": "report",
        "write_card": "report",
        "write_report": "report",
    },
    "hub.export": {"Exported": "hub.export:ExportResult"},
    "hub.upload": {"Pushed": "hub.upload:PushResult"},
    "layers.mamba": {
        "SILU": "layers.mixer",
        "called_convolution": "layers.mixer:call_convolution",
        "convolve": "layers.mixer",
        "is_step": "layers.mixer",
        "real_positions": "layers.mixer:mask_padding",
        "recurrent_state": "layers.mixer",
        "remembered": "layers.mixer:join_cached_inputs",
    },
    "models.selective": {
        "SCHEMES": "models.selective_config",
        "check_fields": "models.selective_config",
        "checked_sizes": "models.selective_config",
        "has_parameters": "models.selective_config",
    },
    "runs.compression": {"run": "runs.compression:compress_saved_model"},
    "runs.data_source": {"calibration": "runs.data_source:draw_calibration"},
    "runs.evaluation": {"execute": "runs.evaluation:run_evaluation"},
    "runs.finetuning": {
        "add_lora": "runs.healing",
        "default_targets": "runs.healing",
        "execute": "runs.finetuning:run_finetuning",
    },
    "runs.pretraining": {"execute": "runs.pretraining:run_pretraining"},
    "ops.diag_scan": {"diag_system": "ops.diag_system"},
}
"""Names that have left a module which is still there, and where they are: `module`, or `module:new name`."""


def old_names(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds what has moved from it to another, with a DeprecationWarning."""
    moved = NAMES[module.removeprefix(f"{PACKAGE}.")]

    def find(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, renamed = moved[name].partition(":")
        new, renamed = f"{PACKAGE}.{place}", renamed or name
        warnings.warn(f"{module}.{name} is now {new}.{renamed}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(new), renamed)

    return find


class _OldModule(Loader):
    """A module whose names are those of others."""

    def __init__(self, new: Sequence[str]):
        self.new = new

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sources = [importlib.import_module(f"{PACKAGE}.{name}") for name in self.new]

        def find(name: str) -> Any:
            for source in sources:
                if not name.startswith("__") and hasattr(source, name):
                    return getattr(source, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = find


class _OldModules(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        old = fullname.removeprefix(f"{PACKAGE}.")
        if old == fullname or old not in MODULES:
            return None
        new = " and ".join(f"{PACKAGE}.{name}" for name in MODULES[old])
        warnings.warn(f"{fullname} is now {new}", DeprecationWarning, stacklevel=2)
        return ModuleSpec(
            fullname, _OldModule(MODULES[old]), is_package=any(name.startswith(f"{old}.") for name in MODULES)
        )


def install() -> None:
    """Let the old paths be imported, also where a folder of an old module is left with nothing but caches in it."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldModules())
