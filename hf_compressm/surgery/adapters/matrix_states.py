"""Statistics and measurement of layers with matrix-valued states.

Shapes: batch B, length L, G key heads of size K, value channels V. A state S is (K, V).

Source: `reduction.key_channels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...reduction import average_overlap, empirical_singular_values, low_rank_basis
from ...reduction.key_channels import select_key_channels
from .base import ReductionError
from .selective import StateChoice, real_tokens


class MatrixStatistics:
    """Sums over tokens, padding left out, of second moments of queries, keys and states, per key head.

    Args:
        moments: function of a mixer, its hidden states (B, L, H) and its mask (B, L) that gives a batch's `sums`.

    Attributes:
        sums: float64 (3, G, K, K): of q q^T, of k k^T, and of S S^T over value channels and the head's value heads.
        tokens: number of tokens.
    """

    def __init__(self, moments: Callable[[Any, Tensor, Tensor | None], Tensor]):
        self.moments = moments
        self.sums: Tensor | None = None
        self.tokens = 0

    @torch.no_grad()
    def observe(self, mixer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> None:
        """Take in one batch of a mixer's inputs: (B, L, H), and a mask (B, L) with 0 for padding.

        Raises:
            ReductionError: if a sum is NaN or infinite.
        """
        sums = self.moments(mixer, hidden_states, attention_mask)
        if not sums.isfinite().all():
            raise ReductionError("queries, keys or states are NaN or infinite on the calibration data")
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += int(real_tokens(attention_mask, hidden_states).sum())

    def sum_with(self, all_reduce: Callable[[Tensor], Any]) -> None:
        """Sum everything over processes, in place, by a function that does so for one tensor, float64 (n,)."""
        assert self.sums is not None
        flat = torch.cat([self.sums.flatten(), self.sums.new_tensor([self.tokens])])
        all_reduce(flat)
        self.sums, self.tokens = flat[:-1].view_as(self.sums), int(flat[-1])


@dataclass(frozen=True)
class MatrixMeasurement:
    """Second moments of a layer with matrix-valued states, per key head, as means over tokens.

    Attributes:
        Q, K: float64 (G, K, K), of queries and of keys.
        P: float64 (G, K, K), of states, summed over value channels and the head's value heads.
    """

    Q: Tensor
    K: Tensor
    P: Tensor

    @classmethod
    def of(cls, statistics: MatrixStatistics | None) -> MatrixMeasurement:
        """Means over tokens of the gathered statistics, (G, K, K), on the CPU.

        Raises:
            ValueError: if nothing was gathered.
        """
        if statistics is None or statistics.sums is None:
            raise ValueError("layers with matrix-valued states are measured on calibration data; pass its statistics")
        return cls(*(statistics.sums / max(statistics.tokens, 1)).cpu())

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> MatrixMeasurement:
        """The measurement that `state_dict` was taken of; tensors (G, K, K)."""
        return cls(state["Q"], state["K"], state["P"])

    def spectrum(self) -> Tensor:
        """Empirical Hankel singular values (K,), root of the sum of squares over key heads at equal rank."""
        values = [empirical_singular_values(P, Q) for P, Q in zip(self.P, self.Q, strict=True)]
        return torch.stack(values).square().sum(0).sqrt()

    def agreement(self, previous: MatrixMeasurement, depth: int) -> float:
        """Average overlap of the leading choices of channels, over key heads and over all depths up to `depth`."""
        if self.Q.shape != previous.Q.shape:
            return 0.0
        scores = [
            average_overlap(select_key_channels(*parts[:2], depth), select_key_channels(*parts[2:], depth))
            for parts in zip(self.Q, self.K, previous.Q, previous.K, strict=True)
        ]
        return sum(scores) / len(scores)

    def state_dict(self) -> dict[str, Tensor]:
        """The three moments by name, float64 (G, K, K)."""
        return {"Q": self.Q, "K": self.K, "P": self.P}


def second_moment(signal: Tensor) -> Tensor:
    """Sum over tokens of x x^T per head, for x (B, L, G, K): float64 (G, K, K)."""
    rows = signal.flatten(0, 1).transpose(0, 1)
    return (rows.mT @ rows).double()


def choose_channels(Q: Tensor, K: Tensor, choice: StateChoice) -> list[int]:
    """Channels of one key head to keep, ascending.

    Args:
        Q, K: float64 (K, K), second moments of queries and keys.
        choice: of 1 <= order <= K channels.

    Raises:
        ValueError: on an unknown selection, or random without a generator.
    """
    if choice.selection == "largest":
        return sorted(select_key_channels(Q, K, choice.order))
    if choice.selection == "smallest":
        return sorted(select_key_channels(Q, K, len(Q))[-choice.order :])
    return choice.random_indices(len(Q))


def choose_basis(Q: Tensor, K: Tensor, P: Tensor, choice: StateChoice) -> tuple[Tensor, Tensor]:
    """Read-in L and read-out R of one key head, float64 (r, K), from the basis that balances P and Q.

    Args:
        Q, K, P: float64 (K, K), second moments of queries, keys and states.
        choice: of 1 <= r <= K new channels.

    Raises:
        ValueError: on an unknown selection, or random without a generator.
    """
    if choice.selection == "largest":
        return low_rank_basis(P, Q, choice.order)
    L, R = low_rank_basis(P, Q, len(P))
    if choice.selection == "smallest":
        return L[-choice.order :], R[-choice.order :]
    kept = choose_channels(Q, K, choice)
    return L[kept], R[kept]
