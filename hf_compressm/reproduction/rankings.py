"""Rank the states of a mixer, and compare two rankings of the same mixer.

Shapes: N states, k ranked directions, r kept ones.

Source: Chahine et al. 2026, "The Curious Case of In-Training Compression of State Space Models", arXiv 2510.02823,
which tracks singular values over training and bounds their moves by Weyl's theorem.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..reduction import (
    controllability_gramian,
    empirical_singular_values,
    energy_orders,
    hankel_operator,
    low_rank_basis,
    match_directions,
    numerical_rank,
    observability_gramian,
    pivoted_states,
    rank_stability,
    select_subset,
    spectral_move,
)
from ..reduction.interpolative import RIDGE
from ..reduction.key_channels import key_moments, select_key_channels
from ..surgery import CompreSSMMamba2Adapter, MixerAdapter
from ..surgery.adapters.gated_delta import GatedDeltaAdapter
from ..surgery.adapters.lru import LRUMeasurement
from ..surgery.adapters.matrix_states import MatrixMeasurement
from ..surgery.adapters.selective import SelectiveMeasurement

TAIL = 1e-3
"""Share of the sum of singular values that the states at the bottom hold, among which ranks mean nothing."""

MOVES = ("move", "bound", "move_over_bound", "clear_gaps")
"""What `next_step` returns."""

DRAWS = 20
"""Random choices of states over which `held_by_chance` is averaged."""


@dataclass(frozen=True)
class Ranking:
    """The states of a mixer, or of one of its groups of channels, in the order in which a cut would keep them.

    Attributes:
        P, Q: controllability and observability Gramian, (N, N), float64 or complex128; the empirical ones of selective
            layers.
        right, left: (N, k), h = right z and z = left^H h for ranked coordinates z, the most important first. Balanced
            directions where a cut changes the basis; columns of the identity where it keeps a subset of the states.
        ranked: number of coordinates above the noise, <= k. Those beyond have no order among themselves.
        leading: number of coordinates that hold all but `TAIL` of the sum of singular values, <= ranked.
    """

    P: Tensor
    Q: Tensor
    right: Tensor
    left: Tensor
    ranked: int
    leading: int

    @property
    def operator(self) -> Tensor:
        """The Hankel operator whose eigenvalues are the singular values; see `reduction.hankel_operator`."""
        return hankel_operator(self.P, self.Q)

    def held(self, left: Tensor) -> float:
        """Return the energy of all future outputs that the coordinates left^H h, left (N, r), predict.

        For white input and the best linear estimate of the state from these coordinates it is tr(Q K^H S K), with
        S = left^H P left and K = S^-1 left^H P. The r leading balanced coordinates hold the most: the sum of their
        squared singular values.
        """
        cross = left.mH @ self.P
        power = (cross @ left).diagonal().real.clamp(min=0)
        inverse = torch.where(power > 0, power, torch.inf).rsqrt()[:, None]
        cross, left = inverse * cross, left * inverse.T
        values, vectors = torch.linalg.eigh(cross @ left)
        through = vectors.mH[values > RIDGE] @ cross
        return float(((through @ self.Q @ through.mH).diagonal().real / values[values > RIDGE]).sum())


def rankings(adapter: MixerAdapter, measurement: Any) -> list[Ranking]:
    """Return the ranking of a measurement, one for each group of channels with states of its own.

    Raises:
        TypeError: for a measurement of an adapter that is not this package's.
    """
    if isinstance(measurement, LRUMeasurement):
        balancing = measurement.balancing
        poles, B, C = balancing.system
        P, Q = controllability_gramian(poles, B), observability_gramian(poles, C)
        return [_ranking(P, Q, balancing.singular_values, balancing.right, balancing.left, balancing.rank)]
    if isinstance(measurement, MatrixMeasurement):
        moments = zip(measurement.Q, measurement.K, measurement.P, strict=True)
        if isinstance(adapter, GatedDeltaAdapter):
            return [_of_key_channels(Q, K, P) for Q, K, P in moments]
        return [_of_basis(P, Q) for Q, _, P in moments]
    if not isinstance(measurement, SelectiveMeasurement):
        raise TypeError(
            f"rankings of {type(measurement).__name__} cannot be compared; known are LRUMeasurement, "
            "SelectiveMeasurement and MatrixMeasurement, which the adapters of this package give"
        )
    make = _of_basis if isinstance(adapter, CompreSSMMamba2Adapter) else _of_subset
    return [make(G, W) for G, W in zip(measurement.G, measurement.W, strict=True)]


def _of_basis(G: Tensor, W: Tensor) -> Ranking:
    spectrum = empirical_singular_values(G, W)
    L, R = low_rank_basis(G, W, len(G))
    rank = int((L.norm(dim=1) > 0).sum())
    return _ranking(G, W, spectrum, R[:rank].T, L[:rank].T, rank)


def _of_subset(G: Tensor, W: Tensor) -> Ranking:
    chosen = torch.eye(len(G), dtype=G.dtype)[:, select_subset(G, W, len(G))]
    return _ranking(G, W, empirical_singular_values(G, W), chosen, chosen, len(pivoted_states(G, W, len(G))))


def _of_key_channels(Q: Tensor, K: Tensor, P: Tensor) -> Ranking:
    chosen = torch.eye(len(P), dtype=P.dtype)[:, select_key_channels(Q, K, len(P))]
    powers = torch.linalg.eigvalsh(key_moments(Q, K))
    rank = int((powers > RIDGE * powers[-1]).sum())
    return _ranking(P, Q, empirical_singular_values(P, Q), chosen, chosen, rank)


def _ranking(P: Tensor, Q: Tensor, spectrum: Tensor, right: Tensor, left: Tensor, ranked: int) -> Ranking:
    leading = min(energy_orders([spectrum], TAIL)[0], ranked) if numerical_rank(spectrum) else 0
    return Ranking(P, Q, right, left, ranked, leading)


def match(now: Ranking, end: Ranking) -> Tensor:
    """Return which coordinate at the end continues each one now: int64, shape (k_now,), -1 for none.

    States of which a cut keeps a subset are paired with themselves, others by `reduction.match_directions`.
    """
    return match_directions(now.right, now.left, end.right, end.left)


def agreement(now: Ranking, end: Ranking, partner: Tensor) -> dict[str, float | None]:
    """Compute Spearman's rank correlation of matched coordinates, in [-1, 1]; None where fewer than three are compared.

    Args:
        now, end: the two rankings.
        partner: shape (k_now,), what `match` returned.

    Returns:
        `spearman`: over coordinates that are among the leading ones now or at the end. `compared`: their number.
        `spearman_all`: over all coordinates above the noise now or at the end.
    """
    here, there = torch.arange(len(partner)), partner
    found: dict[str, float | None] = {}
    for name, depths in {"spearman": (now.leading, end.leading), "spearman_all": (now.ranked, end.ranked)}.items():
        used = (there >= 0) & ((here < depths[0]) | (there < depths[1]))
        pairs = here[used].clamp(max=now.ranked), there[used].clamp(max=end.ranked)
        distinct = min(len(pair.unique()) for pair in pairs)
        found[name] = float(spearmanr(*(pair.numpy() for pair in pairs)).statistic) if distinct > 2 else None
        if name == "spearman":
            found["compared"] = float(used.sum())
    return found


def kept_agreement(now: Ranking, end: Ranking, partner: Tensor, order: int) -> dict[str, float | None]:
    """Compare what a cut to `order` states, >= 1, keeps now with what it would keep at the end.

    `partner`, shape (k_now,), is what `match` returned.

    At most as many states as both measurements rank are looked at; if that is none, all values but `kept` are None.

    Returns:
        `kept`: r, the number of states. `overlap`: mean squared cosine of the principal angles between the spans of
        right[:, :r] now and at the end, in [0, 1]; for subsets the share of states in both. `chance`: r / N, what
        the overlap of a random choice is on average. `stability`: `reduction.rank_stability` to depth r. `held`: of
        the energy at the end that the r coordinates of a cut at the end hold, the part that those chosen now hold
        (`Ranking.held`). A chosen subset is not quite the best, so there it may exceed 1 slightly.
        `held_by_chance`: the same for r of the layer's states drawn at random.
    """
    r = min(order, now.ranked, end.ranked)
    if r == 0:
        return {"kept": 0, **dict.fromkeys(("overlap", "chance", "stability", "held", "held_by_chance"))}
    bases = [torch.linalg.qr(ranking.right[:, :r])[0] for ranking in (now, end)]
    generator, best = torch.Generator().manual_seed(0), end.held(end.left[:, :r])
    states = torch.eye(len(end.P), dtype=end.P.dtype)
    drawn = [end.held(states[:, torch.randperm(len(states), generator=generator)[:r]]) for _ in range(DRAWS)]
    return {
        "kept": r,
        "overlap": float((bases[0].mH @ bases[1]).abs().square().sum() / r),
        "chance": r / len(end.P),
        "stability": rank_stability(partner, r),
        "held": end.held(now.left[:, :r]) / best,
        "held_by_chance": sum(drawn) / DRAWS / best,
    }


def next_step(now: Ranking, following: Ranking) -> dict[str, float | None]:
    """Compare the move of the singular values in the following optimizer step with Weyl's bound.

    Returns:
        `move`, `bound`: as `reduction.spectral_move` gives them, relative to the largest singular value.
        `move_over_bound`: in [0, 1]. `clear_gaps`: share of the gaps between leading singular values that are too wide
        for their neighbours to cross in this step; None if there is no gap. Both are None if nothing moved, as in the
        first step of a warm-up.
    """
    moved = spectral_move(now.operator, following.operator)
    largest = max(float(moved.values[0]), torch.finfo(torch.float64).tiny)
    gaps = -moved.values[: now.leading].diff()
    return {
        "move": moved.move / largest,
        "bound": moved.bound / largest,
        "move_over_bound": moved.move / moved.bound if moved.bound > 0 else None,
        "clear_gaps": float((gaps > moved.spread).double().mean()) if len(gaps) and moved.bound > 0 else None,
    }


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Average entries with the same keys value by value, nested mappings included."""
    entries = list(entries)
    columns = {key: [entry[key] for entry in entries] for key in entries[0]}
    return {key: mean_of(c) if isinstance(c[0], Mapping) else mean(c) for key, c in columns.items()}
