"""Diagonal complex scan, h_k = lam * h_{k-1} + u_k, alone and as a system with input map and read-out."""

from .naive import naive_diag_scan
from .scan import diag_scan
from .system import diag_system

__all__ = ["diag_scan", "diag_system", "naive_diag_scan"]
