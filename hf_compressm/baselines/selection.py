"""Published scores for the states of selective layers: keep those with the largest, with the read-out as it is.

Scores made for time-invariant layers (LAST, AIRE, the mean-LTI surrogate) are applied to the mean system of a layer,
whose time step, B and C are their means over tokens. Shapes: B batch, L length, I channels, G groups, J = I / G, N
states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery import Signals, find_mixers, gather_statistics, selective_signals
from ..surgery.adapters import write_sizes_to_config
from ..surgery.resize import replace_parameters

METHODS = ("first", "random", "ghost", "mean_lti", "last", "aire", "sparse_ssm")


class RivalStatistics:
    """Sums over tokens that the scores need; for experiments, since it looks at the states of every token.

    Attributes:
        energy: float64 (G, N), sum of h^2 c^2 over tokens and channels.
        squares: float64 (L, I, N), sum of h^2 over sequences, by time step.
        step: float64 (I,), B, C: float64 (G, N), sums over tokens.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.energy: Any = 0
        self.squares: Any = 0
        self.step: Any = 0
        self.B: Any = 0
        self.C: Any = 0
        self.A: Any = None

    @torch.no_grad()
    def observe(self, mixer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> None:
        signals: Signals = selective_signals(mixer, hidden_states, attention_mask)
        batch, length, channels = signals.u.shape
        groups, size = signals.B.shape[2:]
        state = signals.u.new_zeros(batch, groups, channels // groups, size)
        rates = signals.A.view(groups, channels // groups, -1)
        squares = []
        for t in range(length):
            step = signals.dt[:, t].view(batch, groups, -1, 1)
            drive = step * signals.u[:, t].view(batch, groups, -1, 1)
            state = (step * rates).exp() * state + drive * signals.B[:, t, :, None]
            self.energy = self.energy + (state.square().sum(2) * signals.C[:, t].square()).sum(0).double()
            squares.append(state.square().sum(0).flatten(0, 1))
        self.squares = self.squares + torch.stack(squares).double()
        self.step = self.step + signals.dt.sum((0, 1)).double()
        self.B = self.B + signals.B.sum((0, 1)).double()
        self.C = self.C + signals.C.sum((0, 1)).double()
        self.A = signals.A.double()
        self.tokens += batch * length


def gather_rival_statistics(model: nn.Module, batches: Any) -> dict[str, RivalStatistics]:
    """Pass calibration batches of one common length through a model with selective layers; see `gather_statistics`."""
    return gather_statistics(model, batches, make=lambda site: RivalStatistics())


def rival_selection(
    method: str, statistics: RivalStatistics, order: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """States of each group that a rival method keeps, ascending.

    - first: the first r. - random: any r.
    - ghost: the largest E[h^2 c^2] (GHOST, arXiv 2602.11408; its formula as reported second-hand).
    - mean_lti: the largest |b c| / (1 - a^2), the Hankel singular value of the state alone in the mean system.
    - last: the largest b^2 c^2 / (1 - |a|)^2 (LAST, arXiv 2411.02824).
    - aire: the largest b^2 c^2 / (1 - a^2) (AIRE-Prune, arXiv 2602.00534).
    - sparse_ssm: at every time step the r states with the largest sum of A_log^2 h^2 get a vote (SparseSSM, structured,
      arXiv 2506.09613).

    Scores of channels are added up.

    Raises:
        ValueError: on an unknown method, or "random" without a generator.
    """
    groups, size = statistics.B.shape
    if method == "first":
        return [list(range(order))] * groups
    if method == "random":
        if generator is None:
            raise ValueError("method 'random' needs a generator, so that a run can be repeated")
        return [sorted(torch.randperm(size, generator=generator)[:order].tolist()) for _ in range(groups)]
    scores = _scores(method, statistics, order)
    return [sorted(row.topk(order).indices.tolist()) for row in scores]


def cut_to(model: nn.Module, kept: Mapping[str, list[list[int]]]) -> None:
    """Leave the given states of each mixer, by mixer name and group, with all else as it is."""
    sites = find_mixers(model)
    changes = {site.name: site.adapter.keep(site.mixer, kept[site.name]) for site in sites}  # type: ignore[attr-defined]
    replace_parameters(sites, {name: {key: c.value for key, c in found.items()} for name, found in changes.items()})
    write_sizes_to_config(model, sites)


def _scores(method: str, statistics: RivalStatistics, order: int) -> Tensor:
    groups, size = statistics.B.shape
    if method == "ghost":
        return statistics.energy
    rates = statistics.A.expand(-1, size)
    if method == "sparse_ssm":
        # Where all states of a head decay alike, A_log is one factor for all of them.
        weighted = (rates.neg().log().square() * statistics.squares).unflatten(1, (groups, -1)).sum(2)
        chosen = weighted.topk(order, dim=-1).indices
        return torch.zeros_like(weighted).scatter(-1, chosen, 1.0).sum(0)
    step = statistics.step / statistics.tokens
    poles = (step[:, None] * rates).exp().unflatten(0, (groups, -1))
    into = step.unflatten(0, (groups, -1))[..., None] * (statistics.B / statistics.tokens)[:, None]
    gain = (into * (statistics.C / statistics.tokens)[:, None]).abs()
    scores = {
        "mean_lti": gain / (1 - poles.square()),
        "last": gain.square() / (1 - poles).square(),
        "aire": gain.square() / (1 - poles.square()),
    }
    if method not in scores:
        raise ValueError(f"unknown method {method!r}; allowed are {', '.join(METHODS)}")
    return scores[method].sum(1)
