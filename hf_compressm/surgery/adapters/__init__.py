"""Adapters: one file for each family of mixers says how to measure its states and how to make it smaller.

Uses `surgery.changes` and `surgery.peft`, and no other part of `surgery`. Importing it registers the adapters.

Source: each module names its own.
"""

from . import gated_delta as _gated_delta  # noqa: F401
from . import gated_delta_own as _gated_delta_own  # noqa: F401
from . import lightning as _lightning  # noqa: F401
from . import lru as _lru  # noqa: F401
from . import mamba as _mamba  # noqa: F401
from . import mamba2 as _mamba2  # noqa: F401
from . import refusals as _refusals  # noqa: F401
from . import xlstm as _xlstm  # noqa: F401
