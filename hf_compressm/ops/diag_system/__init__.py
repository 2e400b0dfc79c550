"""Diagonal linear system: input map, diagonal scan and read-out."""

from .naive import naive_diag_system
from .op import diag_system
from .pairs import diag_system_of_pairs, multiply_pairs

__all__ = ["diag_system", "diag_system_of_pairs", "multiply_pairs", "naive_diag_system"]
