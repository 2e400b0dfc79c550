"""One adapter per family of mixers: how to measure its states, and how to make it smaller."""

from . import refusals as _refusals  # noqa: F401
from .base import (
    Measurement,
    MixerAdapter,
    MixerReduction,
    MixerSite,
    ReductionError,
    Statistics,
    find_mixers,
    refused_mixers,
    register_adapter,
    register_refusal,
    register_subclass,
    state_sizes,
    supported_mixers,
)
from .gated_delta import GatedDeltaAdapter
from .lru import LRUAdapter
from .mamba import MambaAdapter
from .mamba2 import CompreSSMMamba2Adapter, StockMamba2Adapter
from .xlstm import XLSTMAdapter

__all__ = [
    "CompreSSMMamba2Adapter",
    "GatedDeltaAdapter",
    "LRUAdapter",
    "MambaAdapter",
    "Measurement",
    "MixerAdapter",
    "MixerReduction",
    "MixerSite",
    "ReductionError",
    "Statistics",
    "StockMamba2Adapter",
    "XLSTMAdapter",
    "find_mixers",
    "refused_mixers",
    "register_adapter",
    "register_refusal",
    "register_subclass",
    "state_sizes",
    "supported_mixers",
]
