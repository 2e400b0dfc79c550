"""Mamba's selective scan, with cost in proportion to the number of states."""

from .naive import naive_selective_scan
from .op import selective_scan
from .step import selective_state_update

__all__ = ["naive_selective_scan", "selective_scan", "selective_state_update"]
