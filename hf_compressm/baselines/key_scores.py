"""Rank key channels of layers with matrix-valued states by published scores.

Shapes: batch B, length L, G key heads of size K.

Source: rank-revealing QR: arXiv 2602.04852; GHOST: arXiv 2602.11408, its formula as reported second-hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..surgery.adapters.matrix_states import MatrixMeasurement, MatrixStatistics, second_moment

KEY_METHODS = ("first", "random", "ghost", "drrqr")
"""Scores of key channels; "drrqr" is for transformers' delta-rule layers, whose queries and keys are normalised."""


class KeyStatistics:
    """What the scores of a layer's key channels need: the moments that its adapter gathers, and those of raw keys.

    Args:
        adapter: has `statistics(mixer)`, a `MatrixStatistics`, and for "drrqr" `queries_and_keys`, as
            `GatedDeltaAdapter` does.
        mixer: the layer.

    Attributes:
        moments: of queries, keys and states at the recurrence.
        raw: float64 (G, K, K), sum over tokens of q q^T + k k^T before normalisation; 0 where nothing wants it.
    """

    def __init__(self, adapter: Any, mixer: nn.Module):
        self.adapter = adapter
        self.moments: MatrixStatistics = adapter.statistics(mixer)
        self.raw: Any = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of key heads and of their channels, (G, K)."""
        assert self.moments.sums is not None
        return self.moments.sums.shape[1:3]  # type: ignore[return-value]

    @property
    def tokens(self) -> int:
        """Number of real tokens that were looked at."""
        return self.moments.tokens

    @torch.no_grad()
    def observe(self, mixer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None) -> None:
        """Add one batch of a mixer's inputs: (B, L, H), and a mask (B, L), zero at padding.

        Raises:
            ReductionError: if a sum is NaN or infinite.
        """
        self.moments.observe(mixer, hidden_states, attention_mask)
        if "drrqr" in key_methods(self.adapter):
            signals = self.adapter.queries_and_keys(mixer, hidden_states, attention_mask)
            self.raw = self.raw + sum(second_moment(signal) for signal in signals)

    def kept(self, method: str, order: int) -> list[list[int]]:
        """Channels of each key head that a method keeps, ascending.

        Args:
            method: "drrqr", the pivots of a QR decomposition of all queries and keys; or "ghost", the largest products
                of the diagonals of E[S S^T] and E[q q^T].
            order: 1 <= order <= K.
        """
        if method == "drrqr":
            return [sorted(qr_pivots(moment, order)) for moment in self.raw]
        found = MatrixMeasurement.of(self.moments)
        scores = found.P.diagonal(dim1=1, dim2=2) * found.Q.diagonal(dim1=1, dim2=2)
        return [sorted(row.topk(order).indices.tolist()) for row in scores]


def qr_pivots(moment: Tensor, order: int) -> list[int]:
    """Choose the columns that a QR decomposition with column pivoting takes first, by the columns' second moment.

    Args:
        moment: float64 (K, K), symmetric positive semidefinite.
        order: 1 <= order <= K.

    Returns:
        Indices in the order in which they are taken.
    """
    residual, chosen = moment.clone(), list[int]()
    tiny = torch.finfo(moment.dtype).tiny
    for _ in range(order):
        power = residual.diagonal().clone()
        power[chosen] = -1.0
        pivot = int(power.argmax())
        chosen.append(pivot)
        column = residual[:, pivot] * power[pivot].clamp(min=tiny).rsqrt()
        residual = residual - torch.outer(column, column)
    return chosen


def key_methods(adapter: Any) -> tuple[str, ...]:
    """Scores for layers with matrix-valued states, whose rows are key channels; none for an adapter of others."""
    if not issubclass(getattr(adapter, "measurement_class", object), MatrixMeasurement):
        return ()
    return KEY_METHODS if hasattr(adapter, "queries_and_keys") else KEY_METHODS[:-1]
