"""A whole run from a file or a command line: pretraining, fine-tuning, evaluation, compression of a saved model.

A name is imported with what it needs when it is first used, so that `hf-compressm --help` is quick.
"""

import importlib
from typing import Any

_HOMES = {
    "CompressionJob": "compression",
    "DataSource": "arguments",
    "compress_saved_model": "compression",
    "inspect_model": "inspection",
    "parse_evaluation": "evaluation",
    "parse_finetune": "finetuning",
    "parse_run": "pretraining",
    "run_evaluation": "evaluation",
    "run_finetuning": "finetuning",
    "run_pretraining": "pretraining",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
