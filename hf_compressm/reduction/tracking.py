"""Following balanced states from one training step to a later one, and how settled their ranking is."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .balanced import Balancing


def match_states(earlier: Balancing, later: Balancing) -> Tensor:
    """Which later balanced state continues each earlier one.

    A state's identity is its direction, not its value: the overlap |left_later^H right_earlier| is 1 for a state
    that has not turned and 0 for unrelated ones. The pairing that maximises the total overlap is a linear sum
    assignment. Between steps of training the layer's own coordinates move little, so directions can be compared.

    Returns:
        long (k_earlier,): index of the later state, or -1 for an earlier state left without a partner.

    Raises:
        ValueError: if the layer's order has changed in between.
    """
    if earlier.system.order != later.system.order:
        raise ValueError(
            f"states can be matched only while the layer keeps its order; it went from "
            f"{earlier.system.order} to {later.system.order}"
        )
    return assign((later.left.mH @ earlier.right).abs().clamp(max=1).mT)


def assign(overlap: Tensor) -> Tensor:
    """The pairing of rows with columns that maximises the sum of overlaps, a linear sum assignment.

    Args:
        overlap: real (k_earlier, k_later).

    Returns:
        long (k_earlier,): column of each row, or -1 for a row left without one.
    """
    rows, columns = linear_sum_assignment(overlap.cpu().numpy(), maximize=True)
    partner = torch.full((len(overlap),), -1, dtype=torch.long)
    partner[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return partner


def rank_stability(partner: Tensor, depth: int) -> float:
    """How far two rankings of the same states agree, from 0 (disjoint) to 1 (equal): their average overlap.

    The mean over k = 1..depth of the share of states common to both top-k sets. Unlike a rank correlation over all
    states it does not see the noise at the bottom, where ranks mean nothing.

    Args:
        partner: long (k,), result of `match_states`; both rankings are by descending singular value.
        depth: number of leading states that matter, >= 1.

    Source: Fagin, Kumar, Sivakumar, Comparing top k lists (SIAM J. Discrete Math. 17, 2003).
    """
    if depth < 1:
        raise ValueError(f"depth must be >= 1; got {depth}")
    depth = min(depth, partner.shape[0])
    shares = []
    for k in range(1, depth + 1):
        head = partner[:k]
        shares.append(float(((head >= 0) & (head < k)).sum()) / k)
    return sum(shares) / len(shares) if shares else 1.0
