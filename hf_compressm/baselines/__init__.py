"""Other methods to make models smaller, each from its formula: for comparisons with the plain Trainer.

Source: each module names its own.
"""

from .distillation import DistillationCallback
from .hankel_norm import HankelNormCallback, hankel_nuclear_norm
from .score_cut import RivalCutCallback, rival_cut
from .selection import LTI_METHODS, METHODS, RivalStatistics, gather_rival_statistics, rival_selection

__all__ = [
    "LTI_METHODS",
    "METHODS",
    "DistillationCallback",
    "HankelNormCallback",
    "RivalCutCallback",
    "RivalStatistics",
    "gather_rival_statistics",
    "hankel_nuclear_norm",
    "rival_cut",
    "rival_selection",
]
