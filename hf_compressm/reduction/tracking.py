"""Match balanced states between two training steps, and measure how much their ranking changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .balanced import Balancing


def match_states(earlier: Balancing, later: Balancing) -> Tensor:
    """Which later balanced state continues each earlier one; see `match_directions`.

    Returns:
        long (k_earlier,): index of the later state, or -1 for an earlier state left without a partner.

    Raises:
        ValueError: if the layer's order has changed in between.
    """
    return match_directions(earlier.right, earlier.left, later.right, later.left)


def match_directions(earlier_right: Tensor, earlier_left: Tensor, later_right: Tensor, later_left: Tensor) -> Tensor:
    """Which later coordinate of a layer's state continues each earlier one.

    A coordinate's identity is its direction, not its singular value: the overlap
    sqrt(|left_later^H right_earlier| |left_earlier^H right_later|) is 1 for one that has not turned and 0 for unrelated
    ones, on whatever scale the coordinates are. The pairing that maximises the total overlap is a linear sum
    assignment. Between steps of training the layer's own states move little, so directions can be compared.

    Args:
        earlier_right, earlier_left: (N, k_earlier), h = right z and z = left^H h, with left^H right = I.
        later_right, later_left: (N, k_later), likewise.

    Returns:
        long (k_earlier,): index of the later coordinate, or -1 for an earlier one left without a partner.

    Raises:
        ValueError: if the number of states N has changed in between.
    """
    if len(earlier_right) != len(later_right):
        raise ValueError(
            f"states can be matched only while the layer keeps its order; it went from "
            f"{len(earlier_right)} to {len(later_right)} states"
        )
    squares = (later_left.mH @ earlier_right).abs().mT * (earlier_left.mH @ later_right).abs()
    rows, columns = linear_sum_assignment(squares.sqrt().clamp(max=1).cpu().numpy(), maximize=True)
    partner = torch.full((earlier_right.shape[1],), -1, dtype=torch.long)
    partner[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return partner


def average_overlap(now: Sequence[int], then: Sequence[int]) -> float:
    """Average overlap of two rankings of equal length, best first, from 0 (disjoint) to 1 (equal).

    The mean over k = 1, 2, ... of the share of indices that both rankings have among their first k.

    Source: Fagin, Kumar, Sivakumar, Comparing top k lists (SIAM J. Discrete Math. 17, 2003).
    """
    shares = [len({*now[:k]} & {*then[:k]}) / k for k in range(1, len(now) + 1)]
    return sum(shares) / len(shares)


def rank_stability(partner: Tensor, depth: int) -> float:
    """How far two rankings of the same states agree, from 0 (disjoint) to 1 (equal): their average overlap.

    The mean over k = 1..depth of the share of states common to both top-k sets. Unlike a rank correlation over all
    states it does not see the noise at the bottom, where ranks mean nothing.

    Args:
        partner: long (k,), result of `match_states`; both rankings are by descending singular value.
        depth: number of leading states that matter, >= 1.

    Raises:
        ValueError: if depth is below 1.

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
