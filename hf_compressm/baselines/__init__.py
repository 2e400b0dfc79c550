"""Other ways to choose states, to compare with: published scores, each from its formula."""

from .selection import METHODS, cut_to, gather_rival_statistics, rival_selection

__all__ = ["METHODS", "cut_to", "gather_rival_statistics", "rival_selection"]
DistillationCallback = HankelNormCallback = RivalCutCallback = rival_cut = None
