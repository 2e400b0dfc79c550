"""Diagonal linear system: input map, diagonal scan and read-out."""

from .naive import naive_diag_system
from .op import diag_system

__all__ = ["diag_system", "naive_diag_system"]
