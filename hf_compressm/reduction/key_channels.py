"""Reduction of matrix-valued states: linear attention and delta rules, S_t = f(S_{t-1}) + k_t v_t^T, o_t = S_t^T q_t.

A key channel n is a row of the state S (K, V): written by k_n, read by q_n. Its statistics are the second moments
Q = E[q q^T] and K = E[k k^T] of queries and keys at the recurrence, and P = E[S S^T], the state covariance over value
channels; all float64 (K, K), symmetric positive semidefinite. P is the empirical controllability Gramian and Q weighs
by read-out, as G and W do in a selective layer, so the square roots of the eigenvalues of P Q are the empirical Hankel
singular values.

With a delta rule every key channel acts on all others through k k^T, so that only rotations of key space are exact; a
subset of channels is then an approximation, and which subset is best follows from keys and queries, not from P.

Source: Yang et al., Gated Delta Networks, arXiv 2412.06464 (the recurrence); rank-revealing selection of key channels
after training: arXiv 2602.04852.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interpolative import select_subset


def key_moments(Q: Tensor, K: Tensor) -> Tensor:
    """M = Q / tr Q + K / tr K: directions that queries or keys use, each weighted by its share.

    Args:
        Q, K: float64 (K, K), second moments of queries and of keys.

    Returns:
        float64 (K, K), of trace 2, or less where queries or keys vanish.
    """
    shares = [moment / moment.trace().clamp(min=torch.finfo(moment.dtype).tiny) for moment in (Q, K)]
    return shares[0] + shares[1]


def select_key_channels(Q: Tensor, K: Tensor, order: int) -> list[int]:
    """Choose key channels from which the others can be predicted best, by pivots of M = Q / tr Q + K / tr K.

    Args:
        Q, K: float64 (K, K), second moments of queries and of keys.
        order: number of channels to keep, 1 <= order <= K.

    Returns:
        Indices in the order in which they were chosen; a prefix is the choice for a smaller order.
    """
    M = key_moments(Q, K)
    return select_subset(M, M, order)


def missed_share(M: Tensor, kept: list[int]) -> float:
    """Share of tr M that the kept channels do not predict by least squares, in [0, 1].

    Args:
        M: float64 (K, K), symmetric positive semidefinite.
        kept: r distinct indices.
    """
    total = float(M.trace())
    if total <= 0:
        return 0.0
    inner = M[kept][:, kept]
    inner = inner + 1e-9 * inner.diagonal().mean() * torch.eye(len(kept), dtype=M.dtype, device=M.device)
    explained = torch.linalg.solve(inner, M[kept]) * M[kept]
    return max(0.0, 1 - float(explained.sum()) / total)


def leading_rotation(Q: Tensor, K: Tensor, P: Tensor, order: int) -> Tensor:
    """Orthonormal directions of key space that matter most: eigenvectors of P^(1/2) M P^(1/2), M of `key_moments`.

    Args:
        Q, K, P: float64 (K, K), second moments of queries, keys and states, symmetric positive semidefinite.
        order: number of directions r, 1 <= r <= K.

    Returns:
        float64 (r, K), with orthonormal rows.
    """
    values, vectors = torch.linalg.eigh(P)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    _, directions = torch.linalg.eigh(root @ key_moments(Q, K) @ root)
    return directions[:, -order:].mT.flip(0)
