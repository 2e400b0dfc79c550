"""Reduction of value channels: columns of a matrix-valued state S (K, V), which only a norm over V reads together.

A head puts out o_t = S_t^T q_t (V,), normed and gated: y = w * o / sqrt(mean(o^2) + eps) * gate, and the layer
sum_h O_h y_h with O_h of its read-out. A column of S depends on no other, so of the o that stay nothing changes but the
mean in the norm, and w, which all heads share, folds into O. Statistics of a head: Y = E[y y^T], float64 (V, V), and
the power E[n^2] of n = o / sqrt(mean(o^2) + eps), float64 (V,).

Source: the layer: Yang et al., Gated Delta Networks, arXiv 2412.06464; pivoted Cholesky and interpolative
decompositions: Halko, Martinsson and Tropp, SIAM Review 53 (2011).
"""

from __future__ import annotations

from torch import Tensor


def norm_gain(power: Tensor, kept: list[int]) -> float:
    """By how much the norm makes what stays larger: f with y' ~ f y, where mean(o'^2) ~ mean(o^2) / f^2.

    Args:
        power: float64 (V,), >= 0.
        kept: r distinct indices in [0, V).

    Returns:
        f > 0; 1 where all channels stay, or nothing that stays has power.
    """
    left = float(power[kept].mean())
    return float((power.mean() / left).sqrt()) if left > 0 else 1.0
