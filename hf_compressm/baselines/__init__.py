"""Rivals of compression while training, each from its formula: for comparisons with the plain Trainer."""

from .distillation import DistillationCallback
from .hankel_norm import HankelNormCallback, hankel_nuclear_norm
from .selection import METHODS, cut_to, gather_rival_statistics, rival_selection

__all__ = [
    "METHODS",
    "DistillationCallback",
    "HankelNormCallback",
    "cut_to",
    "gather_rival_statistics",
    "hankel_nuclear_norm",
    "rival_selection",
]
