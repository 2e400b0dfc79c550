"""Bound the change of Hankel singular values between two pairs of Gramians by Weyl's inequality."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def hankel_operator(P: Tensor, Q: Tensor) -> Tensor:
    """H = (P^(1/2) Q P^(1/2))^(1/2), a Hermitian matrix whose eigenvalues are the Hankel singular values.

    From the SVD of Q^(1/2) P^(1/2) = U S V^H as H = V S V^H, so that small values are not squared. Roots are by `eigh`,
    with eigenvalues at rounding level clamped to zero. Absolute accuracy is about sqrt(eps) times the largest singular
    value where a Gramian is singular, and about eps times it where none is.

    Args:
        P, Q: Gramians (N, N), Hermitian positive semidefinite, real or complex; computed in double precision.

    Returns:
        float64 or complex128 (N, N), Hermitian positive semidefinite.

    Source: arXiv 2510.02823, Lemma 3.1.
    """
    _, values, vectors = torch.linalg.svd(_root(Q) @ _root(P))
    return (vectors.mH * values) @ vectors


def _root(gramian: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gramian.to(torch.complex128 if gramian.is_complex() else torch.float64))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mH


class SpectralMove(NamedTuple):
    """How far the eigenvalues of a Hermitian matrix moved, and how far they could have.

    Attributes:
        values: float64 (N,), eigenvalues before the change, descending.
        move: largest |eigenvalue_i after - eigenvalue_i before|, both sorted.
        bound: spectral norm of the change. By Weyl's inequality move <= bound.
        spread: largest minus smallest eigenvalue of the change, at most 2 * bound. Neighbours whose gap was larger do
            not cross on the straight way from one matrix to the other.
    """

    values: Tensor
    move: float
    bound: float
    spread: float


def spectral_move(before: Tensor, after: Tensor) -> SpectralMove:
    """Compare two Hermitian matrices (N, N), such as `hankel_operator` gives at successive steps.

    Source: Horn and Johnson, Matrix Analysis (2013), theorem 4.3.1.
    """
    first, second = (torch.linalg.eigvalsh(matrix).flip(0) for matrix in (before, after))
    change = torch.linalg.eigvalsh(after - before)
    move = float((second - first).abs().max())
    return SpectralMove(first, move, float(change.abs().max()), float(change[-1] - change[0]))
