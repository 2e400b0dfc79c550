"""State-space models that shrink while they train, with the Hugging Face Trainer."""

import sys
from pathlib import Path
from typing import Any

from . import moved as _moved

__version__ = "0.1.0"

_moved.install()

if Path((getattr(sys, "argv", None) or [""])[0]).stem == "hf-compressm":
    # The command shows its help without loading torch and transformers; what it runs imports what it needs.
    def __getattr__(name: str) -> Any:
        from . import api

        if name not in api.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(api, name)
else:
    from .api import *  # noqa: F403
    from .api import __all__ as __all__
