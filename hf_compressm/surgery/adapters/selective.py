"""Signals, statistics and measurement of selective layers, and what their adapters have in common.

Shapes: batch B, length L, channels I, groups G of channels with their own B and C, states N. Source: empirical
Gramians: Moore 1981 (IEEE TAC 26); Lall, Marsden and Glavaski 2002 (Int. J. Robust Nonlinear Control 12).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.state_gramian import state_gramian
from ...reduction import Selection, average_overlap, empirical_singular_values, select_subset
from .base import MixerAdapter, MixerReduction, ReductionError, find_mixers

STRIDE = 8
"""How many tokens a look at the states stands for, at most: neighbouring states are alike, and each look costs N^2."""
_GOLDEN = 2654435769
"""2^32 divided by the golden ratio: its multiples modulo 2^32 are spread evenly."""


@dataclass(frozen=True)
class Signals:
    """Input of the scan of a selective layer: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, read out by C_t.

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
    """Input of a selective mixer's scan for hidden states (B, L, H) and a mask (B, L), zero at padding.

    Raises:
        ValueError: if the mixer is not selective.
    """
    statistics = find_mixers(mixer)[0].adapter.statistics(mixer)
    if not isinstance(statistics, SelectiveStatistics):
        raise ValueError(f"{type(mixer).__name__} is not a selective layer")
    return statistics.signals(mixer, hidden_states, attention_mask)


def real_tokens(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor:
    """Which tokens (B, L, ...) are not padding: bool (B, L). A mask may be longer: its last L columns count.

    Raises:
        ValueError: if the mask is not (B, at least L) or (1, at least L), of any dtype, zero at padding.
    """
    batch, length = hidden_states.shape[:2]
    if attention_mask is None:
        return torch.ones(1, 1, dtype=torch.bool, device=hidden_states.device).expand(batch, length)
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] < length:
        raise ValueError(
            f"a selective layer got hidden states of {batch} sequences and {length} tokens with an attention mask "
            f"{shape}; it must be ({batch}, {length}), zero at padding"
        )
    return (attention_mask[:, -length:] != 0).to(hidden_states.device).expand(batch, -1)


def look_weights(real: Tensor, stride: int = STRIDE) -> Tensor:
    """At which tokens to look at the states, and how many tokens each look stands for. bool (B, L) -> float32 (B, L).

    The real tokens of a sequence, wherever its padding is, are divided into stretches of 1, 1, 1, 1, 2, 2, 4, 4, ...
    tokens up to `stride`, and of `stride` from there on; the last one may be shorter. There is one look in each, which
    weighs as much as the stretch has tokens. So weights sum to the number of real tokens, sequences of any length count
    in proportion, and what is chosen in one depends on no other. Stretches are short at the beginning of a sequence,
    where states change most. The place within a stretch moves on by the golden ratio from one to the next: over many of
    them each place is as likely as another, without a period that the data may share.

    Args:
        real: which tokens are not padding.
        stride: a power of two.
    """
    sizes = [1, 1, *(2**k for k in range(stride.bit_length() - 1) for _ in range(2))]  # 2 * stride tokens in all
    ends = torch.tensor(sizes, device=real.device).cumsum(0)
    rank = real.long().cumsum(1) - 1
    index = torch.where(rank < 2 * stride, torch.bucketize(rank, ends, right=True), len(sizes) - 2 + rank // stride)
    size = torch.tensor([*sizes, stride], device=real.device)[index.clamp(max=len(sizes))]
    start = rank // size * size
    size = torch.minimum(size, real.sum(1, keepdim=True) - start)
    place = ((index * _GOLDEN + 2**29) % 2**32 * size) >> 32
    return torch.where(real & (rank - start == place), size, 0).float()


class SelectiveStatistics:
    """Sums over tokens, padding left out, from which the empirical Gramians of a selective layer follow.

    Args:
        signals: function of a mixer, its hidden states and its mask that gives `Signals`.

    Attributes:
        states: float64 (G, N, N), sum of h h^T over tokens and the channels of a group, estimated by `look_weights`.
        read_outs: float64 (G, N, N), sum of c c^T over tokens.
        drives: float64 (G, N), sum of b^2 over tokens.
        looked: number of tokens looked at for `states`.
        tokens: number of tokens.
    """

    def __init__(self, signals: Any):
        self.signals = signals
        self.states: Tensor | None = None
        self.read_outs: Tensor | None = None
        self.drives: Tensor | None = None
        self.looked = self.tokens = 0

    @torch.no_grad()
    def observe(self, mixer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> None:
        """Add one batch of a mixer's inputs: (B, L, H), and a mask (B, L), zero at padding.

        Raises:
            ReductionError: if states, inputs or read-outs are NaN or infinite.
        """
        real = real_tokens(attention_mask, hidden_states)
        signals: Signals = self.signals(mixer, hidden_states, attention_mask)
        weights = look_weights(real)
        states = state_gramian(signals.u, signals.dt, signals.A, signals.B, weights)
        counted = real[..., None, None]
        rows = (signals.C.float() * counted).flatten(0, 1).transpose(0, 1)
        read_outs = (rows.mT @ rows).double()
        drives = (signals.B.float() * counted).square().sum((0, 1)).double()
        if not all(found.isfinite().all() for found in (states, read_outs, drives)):
            raise ReductionError("states, inputs or read-outs are NaN or infinite on the calibration data")
        self.states = states if self.states is None else self.states + states
        self.read_outs = read_outs if self.read_outs is None else self.read_outs + read_outs
        self.drives = drives if self.drives is None else self.drives + drives
        self.tokens += int(real.sum())
        self.looked += int(weights.count_nonzero())

    def sum_with(self, all_reduce: Callable[[Tensor], Any]) -> None:
        """Sum everything over processes, in place. `all_reduce` does so for one tensor, float64 (n,)."""
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
        """Means over tokens of the gathered statistics, on the CPU.

        Raises:
            ValueError: if nothing was gathered.
        """
        if statistics is None or statistics.states is None:
            raise ValueError("selective layers are measured on calibration data; pass its statistics")
        assert statistics.read_outs is not None and statistics.drives is not None
        tokens = max(statistics.tokens, 1)
        sums = (statistics.states, statistics.read_outs, statistics.drives)
        return cls(*((found / tokens).cpu() for found in sums))

    def spectrum(self) -> Tensor:
        """Empirical Hankel singular values, float64 (N,), descending: root of the sum of squares over groups."""
        values = [empirical_singular_values(G, W) for G, W in zip(self.G, self.W, strict=True)]
        return torch.stack(values).square().sum(0).sqrt()

    def agreement(self, previous: SelectiveMeasurement, depth: int) -> float:
        """Average overlap of the leading choices of states, over groups and depths up to `depth`, in [0, 1]."""
        if self.G.shape != previous.G.shape:
            return 0.0
        scores = [
            average_overlap(select_subset(*pair[:2], depth), select_subset(*pair[2:], depth))
            for pair in zip(self.G, self.W, previous.G, previous.W, strict=True)
        ]
        return sum(scores) / len(scores)

    def state_dict(self) -> dict[str, Tensor]:
        """G (G, N, N), W (G, N, N) and drives (G, N), float64."""
        return {"G": self.G, "W": self.W, "drives": self.drives}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> SelectiveMeasurement:
        """The measurement whose `state_dict` this is: G (G, N, N), W (G, N, N) and drives (G, N)."""
        return cls(state["G"], state["W"], state["drives"])


@dataclass(frozen=True)
class StateChoice:
    """Which states of a group to keep.

    Attributes:
        order: how many, r >= 1.
        selection: "largest" are those that predict the output best; "smallest" and "random" are controls.
        generator: CPU generator for "random".
    """

    order: int
    selection: Selection = "largest"
    generator: torch.Generator | None = None

    def indices(self, G: Tensor, W: Tensor) -> list[int]:
        """The states of one group to keep, r indices in [0, N), ascending.

        Args:
            G, W: float64 (N, N), empirical Gramians; see `select_subset`.

        Raises:
            ValueError: on an unknown selection, or "random" without a generator.
        """
        if self.selection == "largest":
            return sorted(select_subset(G, W, self.order))
        if self.selection == "smallest":
            return sorted(select_subset(G, W, len(G))[-self.order :])
        return self.random_indices(len(G))

    def random_indices(self, size: int) -> list[int]:
        """A random choice of r of `size` indices, ascending, for ablations.

        Raises:
            ValueError: if the selection is another one than "random", or there is no generator.
        """
        if self.selection != "random":
            raise ValueError(f"unknown selection {self.selection!r}; allowed are largest, smallest, random")
        if self.generator is None:
            raise ValueError("selection 'random' needs a generator, so that a run can be repeated")
        return sorted(torch.randperm(size, generator=self.generator)[: self.order].tolist())


class CalibratedAdapter(MixerAdapter[Any]):
    """What adapters of layers that are measured on calibration data have in common.

    Attributes:
        measurement_class: its `of` makes a measurement of statistics, `from_state_dict` of what a checkpoint holds.
    """

    measurement_class: Any

    @abstractmethod
    def reduce_to(self, mixer: Any, measurement: Any, choice: StateChoice) -> MixerReduction:
        """`reduce`, with the choice of states in one argument."""

    def measure(self, mixer: Any, statistics: Any = None) -> Any:
        return self.measurement_class.of(statistics)

    def load_measurement(self, state: Mapping[str, Tensor]) -> Any:
        return self.measurement_class.from_state_dict(state)

    def reduce(
        self,
        mixer: Any,
        measurement: Any,
        order: int,
        selection: Selection = "largest",
        generator: torch.Generator | None = None,
    ) -> MixerReduction:
        return self.reduce_to(mixer, measurement, StateChoice(order, selection, generator))


class SelectiveAdapter(CalibratedAdapter):
    """What adapters of selective layers have in common: they are measured by their empirical Gramians."""

    measurement_class = SelectiveMeasurement

    @abstractmethod
    def signals(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Signals:
        """Input of the mixer's scan for hidden states (B, L, H) and a mask (B, L), zero at padding."""

    def statistics(self, mixer: Any) -> SelectiveStatistics:
        return SelectiveStatistics(self.signals)
