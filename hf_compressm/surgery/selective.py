"""What all selective layers share: their signals, the statistics gathered from them, and the resulting measurement.

Shapes: batch B, length L, channels I, groups G of channels with their own B and C, states N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.state_statistics import state_gramian
from ..reduction import empirical_singular_values, select_subset
from .adapters import ReductionError, find_mixers

STRIDE = 8
"""Every how many tokens the states are looked at. Neighbouring states are nearly alike, and each look costs N^2."""


@dataclass(frozen=True)
class Signals:
    """What enters the scan of a selective layer: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, read out by C_t.

    Attributes:
        u, dt: (B, L, I).
        A: (I, N), or (I, 1) where all states of a channel decay alike.
        B, C: (B, L, G, N).
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def selective_signals(mixer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Signals:
    """What a selective mixer with an adapter gives its scan for the hidden states (B, L, H) that it gets.

    Raises:
        ValueError: if the mixer is not selective.
    """
    statistics = find_mixers(mixer)[0].adapter.statistics(mixer)
    if not isinstance(statistics, SelectiveStatistics):
        raise ValueError(f"{type(mixer).__name__} is not a selective layer")
    return statistics.signals(mixer, hidden_states, attention_mask)


class SelectiveStatistics:
    """Sums over tokens from which the empirical Gramians of a selective layer follow.

    Args:
        signals: function of a mixer, its hidden states and its mask that gives `Signals`.

    Attributes:
        states: float64 (G, N, N), sum of h h^T over the tokens looked at and the channels of a group.
        read_outs: float64 (G, N, N), sum of c c^T over tokens.
        drives: float64 (G, N), sum of b^2 over tokens.
        looked: number of tokens looked at for `states`.
        tokens: number of tokens for the others.
    """

    def __init__(self, signals: Any):
        self.signals = signals
        self.states: Tensor | None = None
        self.read_outs: Tensor | None = None
        self.drives: Tensor | None = None
        self.looked = self.tokens = 0

    @torch.no_grad()
    def observe(self, mixer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> None:
        signals: Signals = self.signals(mixer, hidden_states, attention_mask)
        length = signals.u.shape[1]
        mask = None if attention_mask is None else attention_mask[:, -length:].to(signals.u.device)
        stride = min(STRIDE, length)
        states = state_gramian(signals.u, signals.dt, signals.A, signals.B, mask, stride)
        counted = 1 if mask is None else mask[..., None, None]
        rows = (signals.C.float() * counted).flatten(0, 1).transpose(0, 1)
        read_outs = (rows.mT @ rows).double()
        drives = (signals.B.float() * counted).square().sum((0, 1)).double()
        if not all(found.isfinite().all() for found in (states, read_outs, drives)):
            raise ReductionError("states, inputs or read-outs are NaN or infinite on the calibration data")
        self.states = states if self.states is None else self.states + states
        self.read_outs = read_outs if self.read_outs is None else self.read_outs + read_outs
        self.drives = drives if self.drives is None else self.drives + drives
        ones = torch.ones(signals.u.shape[:2]) if mask is None else mask
        self.tokens += int(ones.sum())
        self.looked += int(ones[:, stride - 1 :: stride].sum())

    def sum_with(self, all_reduce: Callable[[Tensor], Any]) -> None:
        """Sum everything over processes, in place, by a function that does so for one tensor."""
        assert self.states is not None and self.read_outs is not None and self.drives is not None
        sums = (self.states, self.read_outs, self.drives, self.states.new_tensor([self.looked, self.tokens]))
        flat = torch.cat([tensor.flatten() for tensor in sums])  # at many ranks a collective costs latency most
        all_reduce(flat)
        parts = [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in sums]), sums, strict=True)]
        self.states, self.read_outs, self.drives = parts[:3]
        self.looked, self.tokens = (int(count) for count in parts[3])


@dataclass(frozen=True)
class SelectiveMeasurement:
    """Empirical Gramians of a selective layer, per group of channels.

    Attributes:
        G: float64 (G, N, N), mean of h h^T over tokens, summed over a group's channels.
        W: float64 (G, N, N), mean of c c^T over tokens.
        drives: float64 (G, N), mean of b^2 over tokens.
    """

    G: Tensor
    W: Tensor
    drives: Tensor

    @classmethod
    def of(cls, statistics: SelectiveStatistics | None) -> SelectiveMeasurement:
        """The measurement that gathered statistics amount to, on the CPU."""
        if statistics is None or statistics.states is None:
            raise ValueError("selective layers are measured on calibration data; pass its statistics")
        assert statistics.read_outs is not None and statistics.drives is not None
        tokens = max(statistics.tokens, 1)
        G = statistics.states / max(statistics.looked, 1)
        return cls(G.cpu(), (statistics.read_outs / tokens).cpu(), (statistics.drives / tokens).cpu())

    def spectrum(self) -> Tensor:
        """Empirical Hankel singular values, root of the sum of squares over groups at equal rank."""
        values = [empirical_singular_values(G, W) for G, W in zip(self.G, self.W, strict=True)]
        return torch.stack(values).square().sum(0).sqrt()

    def agreement(self, previous: SelectiveMeasurement, depth: int) -> float:
        """Average overlap of the leading choices of states, over groups and over all depths up to `depth`."""
        if self.G.shape != previous.G.shape:
            return 0.0
        scores = []
        for pair in zip(self.G, self.W, previous.G, previous.W, strict=True):
            now, then = select_subset(*pair[:2], depth), select_subset(*pair[2:], depth)
            scores += [len({*now[:k]} & {*then[:k]}) / k for k in range(1, depth + 1)]
        return sum(scores) / len(scores)

    def state_dict(self) -> dict[str, Tensor]:
        return {"G": self.G, "W": self.W, "drives": self.drives}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> SelectiveMeasurement:
        """The measurement that `state_dict` was taken of."""
        return cls(state["G"], state["W"], state["drives"])


def choose_states(G: Tensor, W: Tensor, order: int, selection: str, generator: torch.Generator | None) -> list[int]:
    """Indices of the states of one group to keep, ascending.

    Raises:
        ValueError: on an unknown selection, or "random" without a generator.
    """
    if selection == "largest":
        return sorted(select_subset(G, W, order))
    if selection == "smallest":
        return sorted(select_subset(G, W, len(G))[-order:])
    if selection != "random":
        raise ValueError(f"unknown selection {selection!r}; allowed are largest, smallest, random")
    if generator is None:
        raise ValueError("selection 'random' needs a generator, so that a run can be repeated")
    return sorted(torch.randperm(len(G), generator=generator)[:order].tolist())
