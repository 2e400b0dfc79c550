"""Reduction of selective layers from empirical Gramians: a subset of states with a corrected read-out, or a new basis.

A selective layer computes y_k = c_k^T h_k with states h_k and read-outs c_k that vary from token to token. Its
empirical Gramians are G = E[h h^T] (controllability: how strongly inputs drive the states) and W = E[c c^T]
(how strongly outputs read them), both float64 (N, N), symmetric positive semidefinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gramians import gramian_factor

RIDGE = 1e-6
"""Ridge of the least-squares prediction, relative to a unit diagonal: Gramians gathered in float32 are no better."""


def empirical_singular_values(G: Tensor, W: Tensor) -> Tensor:
    """Empirical Hankel singular values: square roots of the eigenvalues of G W.

    Computed as the singular values of a product of factors, never by eigenvalues of the product itself.

    Args:
        G, W: float64 (N, N), symmetric positive semidefinite.

    Returns:
        float64 (N,), descending, >= 0.
    """
    values = torch.linalg.svdvals(gramian_factor(W).T @ gramian_factor(G))
    return torch.nn.functional.pad(values, (0, len(G) - len(values)))


def pivoted_states(G: Tensor, W: Tensor, order: int) -> list[int]:
    """The states that `select_subset` chooses, without those that it has no reason to choose.

    Args:
        G, W: float64 (N, N), symmetric positive semidefinite.
        order: largest number of states, 1 <= order <= N.

    Returns:
        At most `order` indices; states that nothing drives or that others predict exactly are left out.

    Raises:
        ValueError: if the order is out of range.
    """
    if not 1 <= order <= len(G):
        raise ValueError(f"order must lie between 1 and the number of states {len(G)}; got {order}")
    residual = G.clone()
    floor = RIDGE * G.diagonal()
    left = torch.ones(len(G), dtype=torch.bool, device=G.device)
    chosen: list[int] = []
    while len(chosen) < order:
        power = residual.diagonal()
        gain = ((W @ residual) * residual).sum(0) / torch.where(power > floor, power, 1)
        gain = torch.where(left & (power > floor), gain, -1.0)
        pivot = int(gain.argmax())
        if gain[pivot] < 0:
            break
        chosen.append(pivot)
        left[pivot] = False
        residual = residual - torch.outer(residual[:, pivot], residual[pivot]) / power[pivot]
    return chosen


def select_subset(G: Tensor, W: Tensor, order: int) -> list[int]:
    """Choose states one by one so that the kept ones predict all others with the least error in the output.

    Each step adds the state j that lowers tr(W E) most, where E is the covariance of what the kept states do not
    predict. Adding j turns E into E - E_j E_j^T / E_jj, as in a Cholesky factorisation with pivots chosen by W.

    Args:
        G, W: float64 (N, N), symmetric positive semidefinite.
        order: number of states to keep, 1 <= order <= N.

    Returns:
        Indices in the order in which they were chosen, so that a prefix is the choice for a smaller order. States that
        nothing drives or that others predict exactly come last.

    Source: pivoted Cholesky and interpolative decompositions: Halko, Martinsson and Tropp, SIAM Review 53 (2011).
    """
    chosen = pivoted_states(G, W, order)
    remaining = [j for j in range(len(G)) if j not in set(chosen)]
    return chosen + remaining[: order - len(chosen)]


def read_out_correction(G: Tensor, kept: list[int]) -> Tensor:
    """Fold the removed states into the read-out of the kept ones: c' = K c.

    With h ~ K^T h_kept the least-squares prediction of all states from the kept ones, c^T h ~ (K c)^T h_kept. Columns
    of kept states are unit vectors.

    Args:
        G: float64 (N, N).
        kept: r distinct indices.

    Returns:
        K, float64 (r, N).
    """
    scale = G.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1), 0)
    correlation = G * inverse[:, None] * inverse
    inner = correlation[kept][:, kept] + RIDGE * torch.eye(len(kept), dtype=G.dtype, device=G.device)
    K = torch.linalg.solve(inner, correlation[kept]) * inverse[kept][:, None] * scale
    K[:, kept] = torch.eye(len(kept), dtype=G.dtype, device=G.device)
    return K


def output_residual(G: Tensor, W: Tensor, read_in: Tensor, read_out: Tensor) -> float:
    """Share of the read-out's energy that a reduced layer misses, were read-outs and states independent.

    The reduced layer computes (R c)^T (L h) in place of c^T h. With M = I - R^T L the share is
    tr(W M G M^T) / tr(W G), in [0, inf).

    Args:
        G, W: float64 (N, N).
        read_in: L, float64 (r, N); for a subset, rows of the identity.
        read_out: R, float64 (r, N).
    """
    miss = torch.eye(len(G), dtype=G.dtype, device=G.device) - read_out.T @ read_in
    total = (W * G).sum()
    return float((W * (miss @ G @ miss.T)).sum() / total) if total > 0 else 0.0


def low_rank_basis(G: Tensor, W: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Best read-in L and read-out R of a layer whose states all decay alike, so that any change of basis is exact.

    Among all rank-r pairs, (R c)^T (L h) is closest to c^T h in mean square for independent c and h. By the
    square-root method: with factors G = F F^T, W = E E^T and E^T F = V S U^T, L = S^(-1/2) V^T E^T and
    R = S^(-1/2) U^T F^T on the leading r triples. States are scaled so that rows of L and R have equal norms.

    Args:
        G, W: float64 (N, N), symmetric positive semidefinite.
        order: r, 1 <= r <= N.

    Returns:
        L and R, float64 (r, N). Rows beyond the numerical rank are zero.

    Raises:
        ValueError: if the order is out of range.

    Source: Tombs and Postlethwaite 1987 (Int. J. Control 46), the square-root method.
    """
    if not 1 <= order <= len(G):
        raise ValueError(f"order must lie between 1 and the number of states {len(G)}; got {order}")
    F, E = gramian_factor(G), gramian_factor(W)
    V, S, Uh = torch.linalg.svd(E.T @ F, full_matrices=False)
    rank = min(order, int((S[:1] * torch.finfo(S.dtype).eps < S).sum()))
    L = (V[:, :rank] / S[:rank].sqrt()).T @ E.T
    R = Uh[:rank] / S[:rank, None].sqrt() @ F.T
    balance = (R.norm(dim=1) / L.norm(dim=1)).sqrt()[:, None]
    padding = (0, 0, 0, order - rank)
    return torch.nn.functional.pad(L * balance, padding), torch.nn.functional.pad(R / balance, padding)
