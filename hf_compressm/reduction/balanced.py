"""Balanced truncation of diagonal discrete-time systems by the square-root method.

Everything is computed in float64. Shapes: N states, r kept states, H inputs, M outputs. References: Moore 1981 (IEEE
TAC 26) for balancing; Tombs and Postlethwaite 1987 (Int. J. Control 46) for the square-root method; Al-Saggaf and
Franklin 1987 (IEEE TAC 32) for the discrete-time error bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gramians import DiagonalSystem, controllability_gramian, gramian_factor, observability_gramian

RANK_TOLERANCE = 1e-12
"""Hankel singular values below this share of the largest are rounding noise of float64 and count as zero."""


@dataclass(frozen=True)
class Balancing:
    """A system together with the factors that balance it.

    Attributes:
        system: the full system, complex128.
        singular_values: float64 (k,), positive, descending: the Hankel singular values above rounding level, k <= N.
        right: complex128 (N, k). Balanced coordinates z give the state h = right z.
        left: complex128 (N, k), with left^H right = I. A state h has balanced coordinates z = left^H h.
    """

    system: DiagonalSystem
    singular_values: Tensor
    right: Tensor
    left: Tensor

    @property
    def rank(self) -> int:
        """Order of a minimal realisation to working precision, between 0 and N."""
        return self.singular_values.shape[0]

    def spectrum(self) -> Tensor:
        """All singular values, float64 (N,), descending; those at rounding level are zero."""
        values = self.singular_values.new_zeros(self.system.order)
        values[: self.rank] = self.singular_values
        return values


@dataclass(frozen=True)
class Truncation:
    """A reduced diagonal system and the maps between its states and those it came from.

    Attributes:
        system: the reduced system of order r, complex128, diagonal, |poles| < 1.
        right: complex128 (N, r). The full state is approximated by h ~ right h_r.
        left: complex128 (N, r). Reduced states are h_r = left^H h; B_r = left^H B and C_r = C right.
        bound: H-infinity error bound, twice the sum of the discarded singular values.
    """

    system: DiagonalSystem
    right: Tensor
    left: Tensor
    bound: float


def balance(system: DiagonalSystem) -> Balancing:
    """Balance a system: factors L L^H = P and R R^H = Q, then an SVD of R^H L.

    The singular values of R^H L are the Hankel singular values sqrt(eig(P Q)), but obtained without squaring, so that
    small ones keep their accuracy.

    Raises:
        ValueError: if shapes disagree, an entry is not finite, or a pole is not inside the unit circle.
    """
    system = DiagonalSystem(*(tensor.to(torch.complex128) for tensor in system))
    system.check()
    L = gramian_factor(controllability_gramian(system.poles, system.B))
    R = gramian_factor(observability_gramian(system.poles, system.C))
    Y, values, Zh = torch.linalg.svd(R.mH @ L, full_matrices=False)
    rank = int((values > RANK_TOLERANCE * values[:1].sum()).sum())
    scale = values[:rank].rsqrt()
    return Balancing(
        system=system,
        singular_values=values[:rank],
        right=(L @ Zh[:rank].mH) * scale,
        left=(R @ Y[:, :rank]) * scale,
    )


def hankel_singular_values(system: DiagonalSystem) -> Tensor:
    """Hankel singular values of a system, float64 (N,), descending."""
    return balance(system).spectrum()


def error_bound(singular_values: Tensor, kept: Sequence[int]) -> float:
    """2 * sum of the discarded singular values: no input can make the outputs differ by more, in l2 gain.

    Args:
        singular_values: float64 (N,).
        kept: indices of the kept balanced states.
    """
    discarded = torch.ones_like(singular_values, dtype=torch.bool)
    discarded[list(kept)] = False
    return 2 * float(singular_values[discarded].sum())


def truncate(balancing: Balancing, kept: Sequence[int], order: int | None = None) -> Truncation:
    """Keep some balanced states, discard the others, and diagonalise what is left.

    The truncated system is stable whichever balanced states are kept; the error bound is smallest for the leading
    ones. Eigenvectors come with unit norm; the caller is free to rescale the states.

    Args:
        balancing: result of `balance`.
        kept: distinct indices into `balancing.singular_values`, 0 <= index < rank.
        order: number of states of the result, len(kept) <= order <= N. States beyond len(kept) are original modes,
            the most excited first, with a zero read-out: they change nothing, yet can be trained.

    Raises:
        ValueError: on indices out of range or repeated, or an order out of range.
    """
    full, rank = balancing.system, balancing.rank
    order = len(kept) if order is None else order
    if len(set(kept)) != len(kept) or any(not 0 <= index < rank for index in kept):
        raise ValueError(f"kept must be distinct indices in [0, {rank}); got {list(kept)}")
    if not max(1, len(kept)) <= order <= full.order:
        raise ValueError(f"order must lie in [{max(1, len(kept))}, {full.order}]; got {order}")

    index = torch.as_tensor(list(kept), dtype=torch.long, device=full.poles.device)
    right, left = balancing.right[:, index], balancing.left[:, index]
    poles, vectors = torch.linalg.eig(left.mH @ (full.poles[:, None] * right))
    right = right @ vectors
    left = torch.linalg.solve(vectors, left.mH).mH

    padding = excited_modes(full)[: order - len(kept)]
    selector = torch.eye(full.order, dtype=right.dtype, device=right.device)[:, padding]
    poles = torch.cat([inside_unit_circle(poles), full.poles[padding]])
    right = torch.cat([right, torch.zeros_like(selector)], dim=1)
    left = torch.cat([left, selector], dim=1)
    reduced = DiagonalSystem(poles, left.mH @ full.B, full.C @ right)
    return Truncation(reduced, right, left, error_bound(balancing.singular_values, kept))


def excited_modes(system: DiagonalSystem) -> Tensor:
    """Indices of the modes by descending steady-state energy |b_i|^2 / (1 - |pole_i|^2) under white input."""
    energy = system.B.abs().square().sum(1) / (1 - system.poles.abs().square())
    return energy.argsort(descending=True, stable=True)


def inside_unit_circle(poles: Tensor, margin: float = 1e-12) -> Tensor:
    """Move poles (N,) that rounding has put outside the circle of radius 1 - margin back onto it.

    In exact arithmetic truncation never does that; in float64 it can for poles within rounding of the circle.
    """
    radius = poles.abs()
    return torch.where(radius > 1 - margin, poles / radius * (1 - margin), poles)


def h2_norm(system: DiagonalSystem) -> float:
    """H2 norm, the root of sum_k |C A^k B|_F^2: the output energy under a unit white input. In closed form."""
    overlap = (system.B @ system.B.mH) * (system.C.mH @ system.C).mT
    energy = (overlap / (1 - system.poles[:, None] * system.poles.conj())).sum().real
    return float(energy.clamp(min=0).sqrt())


def difference(first: DiagonalSystem, second: DiagonalSystem) -> DiagonalSystem:
    """The system whose output is that of `first` minus that of `second`."""
    return DiagonalSystem(
        torch.cat([first.poles, second.poles]),
        torch.cat([first.B, second.B]),
        torch.cat([first.C, -second.C], dim=1),
    )
