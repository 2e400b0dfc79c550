"""Rank states by published scores; those with the largest stay, and the read-out does not change.

Scores made for time-invariant layers (LAST, AIRE, the mean-LTI surrogate) are applied to the modes of `LRU` layers, and
to the mean system of a selective layer, whose time step, B and C are their means over tokens. Shapes: B batch, L
length, I channels, G groups, J = I / G, N states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.lru import LRU
from ..reduction import DiagonalSystem
from ..surgery import MixerSite, ReductionError, Signals, find_mixers, gather_statistics, selective_signals
from ..surgery.adapters.selective import real_tokens
from .key_scores import KeyStatistics, key_methods

METHODS = ("first", "random", "ghost", "mean_lti", "last", "aire", "sparse_ssm")
LTI_METHODS = ("first", "random", "last", "aire")


class RivalStatistics:
    """Sums over tokens, padding left out, that the scores need.

    For experiments, since it looks at the states of every token, one time step after the other.

    Attributes:
        energy: float64 (G, N), sum of h^2 c^2 over tokens and channels.
        squares: float64 (L, I, N), sum of h^2 over sequences, by real tokens before; L is that of the longest sequence.
        step: float64 (I,), B, C: float64 (G, N), sums over tokens.
        tokens: number of tokens.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.energy: Any = 0
        self.squares: Any = None
        self.step: Any = 0
        self.B: Any = 0
        self.C: Any = 0
        self.A: Any = None

    @torch.no_grad()
    def observe(self, mixer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> None:
        """Add one batch of a mixer's inputs: (B, L, H), and a mask (B, L), zero at padding.

        Raises:
            ReductionError: if a sum is NaN or infinite.
        """
        signals: Signals = selective_signals(mixer, hidden_states, attention_mask)
        batch, length, channels = signals.u.shape
        real = real_tokens(attention_mask, hidden_states)
        counted, rank = real.float()[..., None], (real.long().cumsum(1) - 1).clamp(min=0)
        groups, size = signals.B.shape[2:]
        state = signals.u.new_zeros(batch, groups, channels // groups, size, dtype=torch.float32)
        rates = signals.A.view(groups, channels // groups, -1)
        squares = state.new_zeros(int(real.sum(1).max()), channels, size, dtype=torch.float64)
        for t in range(length):
            step = signals.dt[:, t].view(batch, groups, -1, 1)
            drive = step * signals.u[:, t].float().view(batch, groups, -1, 1)
            state.mul_((step * rates).exp()).addcmul_(drive, signals.B[:, t, :, None].float())
            square = state.square() * counted[:, t, :, None, None]
            self.energy = self.energy + (square.sum(2) * signals.C[:, t].float().square()).sum(0).double()
            squares.index_add_(0, rank[real[:, t], t], square[real[:, t]].flatten(1, 2).double())
        self.squares = _sum_by_step(self.squares, squares)
        self.step = self.step + (signals.dt * counted).sum((0, 1)).double()
        self.B = self.B + (signals.B * counted[..., None]).sum((0, 1)).double()
        self.C = self.C + (signals.C * counted[..., None]).sum((0, 1)).double()
        self.A = signals.A.double()
        self.tokens += int(counted.sum())
        if not all(found.isfinite().all() for found in (self.energy, self.squares, self.step, self.B, self.C)):
            raise ReductionError("states, inputs or read-outs are NaN or infinite on the calibration data")


def _sum_by_step(total: Tensor | None, found: Tensor) -> Tensor:
    """Sum of two tensors (L, I, N) whose lengths may differ."""
    if total is None:
        return found
    length = max(len(total), len(found))
    return sum(F.pad(t, (0, 0, 0, 0, 0, length - len(t))) for t in (total, found))  # type: ignore[return-value]


def check_method(model: nn.Module, method: str) -> None:
    """Raise ValueError unless every mixer of a model can be ranked by a method; the message names the allowed ones."""
    for site in find_mixers(model):
        others = LTI_METHODS if isinstance(site.mixer, LRU) else METHODS
        _check_method(method, key_methods(site.adapter) or others)


def _check_method(method: str, allowed: tuple[str, ...]) -> None:
    if method not in allowed:
        raise ValueError(f"unknown method {method!r}; allowed for this layer are {', '.join(allowed)}")


Rival = RivalStatistics | KeyStatistics | DiagonalSystem


def gather_rival_statistics(model: nn.Module, batches: Any = None) -> dict[str, Rival]:
    """Input of the scores for each mixer, by name: statistics over calibration batches, or an `LRU` layer's system.

    Args:
        model: a model with supported mixers.
        batches: for selective layers; see `gather_statistics`.

    Raises:
        ValueError, TypeError: calibration batches that are missing, empty, too short or of the wrong fields.
        ReductionError: weights or statistics that are NaN or infinite, or a pole not inside the unit circle.
    """
    sites = find_mixers(model)
    found: dict[str, Rival] = {
        site.name: _system(site.name, site.mixer) for site in sites if isinstance(site.mixer, LRU)
    }
    if len(found) < len(sites):
        found |= gather_statistics(model, batches, make=_statistics)
    return {site.name: found[site.name] for site in sites}


def _statistics(site: MixerSite) -> RivalStatistics | KeyStatistics:
    return KeyStatistics(site.adapter, site.mixer) if key_methods(site.adapter) else RivalStatistics()


def _system(name: str, mixer: LRU) -> DiagonalSystem:
    system = DiagonalSystem(*mixer.system())
    try:
        system.check()
    except ValueError as error:
        raise ReductionError(f"{name}: {error}") from error
    return system


def rival_selection(
    method: str, statistics: Rival, order: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """States of each group that a rival method keeps, ascending.

    - first: the first r. - random: any r.
    - ghost: the largest E[h^2 c^2] (GHOST, arXiv 2602.11408; its formula as reported second-hand).
    - mean_lti: the largest |b c| / (1 - a^2), the Hankel singular value of the state alone in the mean system.
    - last: the largest b^2 c^2 / (1 - |a|)^2 (LAST, arXiv 2411.02824).
    - aire: the largest b^2 c^2 / (1 - a^2) (AIRE-Prune, arXiv 2602.00534).
    - sparse_ssm: at every time step the r states with the largest sum of A_log^2 h^2 get a vote (SparseSSM, structured,
      arXiv 2506.09613).

    Scores of channels are added up. For `LRU` layers there are first, random, last and aire; for key channels of layers
    with matrix-valued states those of `KeyStatistics.kept`.

    Raises:
        ValueError: on an unknown method, or one that the layer does not have; "random" without a generator; an order
            that is not between 1 and the present number of states.
    """
    if isinstance(statistics, KeyStatistics):
        allowed, (groups, size) = key_methods(statistics.adapter), statistics.shape
    elif isinstance(statistics, DiagonalSystem):
        allowed, (groups, size) = LTI_METHODS, (1, statistics.order)
    else:
        allowed, (groups, size) = METHODS, statistics.B.shape
    _check_method(method, allowed)
    if not 1 <= order <= size:
        raise ValueError(f"the order must lie between 1 and {size}, the present number of states; got {order}")
    if method == "first":
        return [list(range(order))] * groups
    if method == "random":
        if generator is None:
            raise ValueError("method 'random' needs a generator, so that a run can be repeated")
        return [sorted(torch.randperm(size, generator=generator)[:order].tolist()) for _ in range(groups)]
    if isinstance(statistics, KeyStatistics):
        return statistics.kept(method, order)
    if isinstance(statistics, DiagonalSystem):
        scores = _lti_scores(method, statistics)
    else:
        scores = _scores(method, statistics, order)
    return [sorted(row.topk(order).indices.tolist()) for row in scores]


def _lti_scores(method: str, system: DiagonalSystem) -> Tensor:
    """Scores (1, N) of modes."""
    poles, B, C = system
    gain = B.abs().square().sum(1) * C.abs().square().sum(0)
    decay = (1 - poles.abs()).square() if method == "last" else 1 - poles.abs().square()
    return (gain / decay)[None]


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
    return scores[method].sum(1)
