"""Diagonal complex scan, h_k = lam * h_{k-1} + u_k."""

from ...moved import old_names
from .naive import naive_diag_scan
from .op import diag_scan

__all__ = ["diag_scan", "naive_diag_scan"]

__getattr__ = old_names(__name__)
