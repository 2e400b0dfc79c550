"""Mamba-2's scan: one decay per head, states of any size."""

from .naive import naive_ssd_scan
from .op import ssd_scan
from .step import ssd_state_update

__all__ = ["naive_ssd_scan", "ssd_scan", "ssd_state_update"]
