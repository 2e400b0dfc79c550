"""Adapter for this package's gated delta-rule mixers: the best basis of rank r for the states of each key head.

With a write matrix L and an erase and read matrix R, the recurrence S <- a (S - beta (L k) ((R k)^T S - v^T)) is
that of the full size where R^T L = I, in any basis. At rank r the best L and R follow from the empirical Gramians of
states and queries. They may let a state grow where (R k)^T (L k) < 0. So a sample of tokens is kept, on which no
transition may have an eigenvalue beyond 1; where one has, the key head gets a rotation, L = R with orthonormal rows. At
the first cut no transition can have one then; at a later one the choice with smaller eigenvalues is taken.

Shapes: batch B, length L, T tokens of a sample, G key heads of size K, or r of a state, H value heads.

Source: the recurrence: Yang et al., arXiv 2412.06464; the balancing basis: `reduction.interpolative`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ...layers.padding import RealFirst
from ...ops.gated_delta_scan import delta_state_gramian
from ...reduction.key_channels import leading_rotation
from .base import register_adapter
from .head_rows import Segments, flat_segments, with_convolution
from .matrix_states import MatrixMeasurement, MatrixStatistics, second_moment
from .own_basis import OwnBasisAdapter, Pairs
from .selective import StateChoice, look_weights, real_tokens
from .value_channels import ValueChannelAdapter

logger = logging.get_logger(__name__)

SAMPLE = 2048
"""Tokens on which stability is checked, at most."""
SAMPLE_OF_BATCH = 256
"""How many of these come from one batch, at most."""
LIMIT = 1 + 1e-6
"""Largest modulus of an eigenvalue of a transition, but for rounding."""


@dataclass(frozen=True)
class Transitions:
    """What tokens do to the states: S <- decay (S - strength write erase^T S) + ...

    Attributes:
        write, erase: (T, G, K), keys in the present basis.
        strength, decay: (T, H), in [0, 1].
    """

    write: Tensor
    erase: Tensor
    strength: Tensor
    decay: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Transitions]) -> Transitions:
        """Join samples of one mixer, each of its own T."""
        fields = ("write", "erase", "strength", "decay")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))

    def largest(self, head: int, read_in: Tensor, read_out: Tensor) -> float:
        """Largest |decay (1 - strength (R e)^T (L w))| of a key head: an eigenvalue of its transitions after a cut.

        Args:
            head: number of the key head.
            read_in, read_out: L and R, (r, K).
        """
        per_head = self.strength.shape[1] // self.write.shape[1]
        values = slice(head * per_head, (head + 1) * per_head)
        written, erased = (
            self.write[:, head] @ read_in.to(self.write).T,
            self.erase[:, head] @ read_out.to(self.erase).T,
        )
        overlap = (written * erased).sum(-1, keepdim=True)
        return float((self.decay[:, values] * (1 - self.strength[:, values] * overlap)).abs().max())


class DeltaStatistics(MatrixStatistics):
    """Second moments of queries, erase keys and states in the present basis, and a sample of transitions.

    Over processes only the sums are summed: the process that decides checks its own sample.
    """

    def __init__(self) -> None:
        super().__init__(self._moments)
        self.samples: list[Transitions] = []

    def _moments(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        tokens = RealFirst.of(attention_mask, hidden_states)
        real = real_tokens(None, hidden_states) if tokens is None else tokens.real
        hidden_states = hidden_states if tokens is None else tokens.bring(hidden_states)
        q, k, v, g, beta = mixer.recurrence_inputs(hidden_states, tokens=tokens)
        q, k, erase = mixer.to_state_basis(q, k)
        erased = k if erase is None else erase
        self._take(real, k, erased, beta, g.exp())
        queries, keys = (second_moment(part * real[..., None, None]) for part in (q, erased))
        return torch.stack([queries, keys, delta_state_gramian(k, v, g, beta, look_weights(real), erase=erase)])

    def _take(self, real: Tensor, *signals: Tensor) -> None:
        """Keep evenly spaced real tokens of a batch, as far as there is room."""
        room = min(SAMPLE - sum(len(part.write) for part in self.samples), SAMPLE_OF_BATCH)
        places = real.flatten().nonzero()[:, 0]
        if room > 0 and len(places):
            places = places[:: -(-len(places) // room)]
            self.samples.append(Transitions(*(signal.flatten(0, 1)[places].float().cpu() for signal in signals)))


@dataclass(frozen=True)
class DeltaMeasurement(MatrixMeasurement):
    """Second moments of a layer, K being that of erase keys, and a sample of its transitions.

    Attributes:
        transitions: the sample, or None in a measurement that was loaded, which serves to compare only.
    """

    transitions: Transitions | None = None

    @classmethod
    def of(cls, statistics: DeltaStatistics | None) -> DeltaMeasurement:  # type: ignore[override]
        """Means over tokens of the gathered statistics, (G, K, K), on the CPU, and the sample.

        Raises:
            ValueError: if nothing was gathered.
        """
        means = MatrixMeasurement.of(statistics)
        samples = statistics.samples if statistics is not None else []
        return cls(means.Q, means.K, means.P, Transitions.joined(samples) if samples else None)


class CompreSSMGatedDeltaAdapter(OwnBasisAdapter):
    """This package's Gated DeltaNet mixer, whose states may be of another size in each layer."""

    mixer_class = "hf_compressm.layers.gated_delta.CompreSSMGatedDeltaMixer"
    measurement_class = DeltaMeasurement
    dynamics = ("A_log", "dt_bias")

    def __init__(self) -> None:
        self.values = ValueChannelAdapter(_segments, real_first=True)

    def statistics(self, mixer: Any) -> DeltaStatistics:
        return DeltaStatistics()

    def pairs(self, measurement: DeltaMeasurement, choice: StateChoice) -> Pairs:
        moments = list(zip(measurement.Q, measurement.K, measurement.P, strict=True))
        return _stable(super().pairs(measurement, choice), moments, measurement.transitions)


def _segments(mixer: Any) -> Segments:
    return with_convolution(mixer, flat_segments(mixer))


def _stable(pairs: Pairs, moments: list[tuple[Tensor, Tensor, Tensor]], transitions: Transitions | None) -> Pairs:
    """L and R of each key head, with a rotation in place of those that let a state grow on the sample."""

    def rate(head: int, pair: tuple[Tensor, Tensor]) -> float:
        return float("inf") if transitions is None else transitions.largest(head, *pair)

    found, rates, rotated = [], [], 0
    for head, (pair, (Q, K, P)) in enumerate(zip(pairs, moments, strict=True)):
        rates.append(rate(head, pair))
        if not rates[-1] <= LIMIT:
            rotation = (leading_rotation(Q, K, P, len(pair[0])),) * 2
            if not rate(head, rotation) > rates[-1]:
                pair, rotated = rotation, rotated + 1
        found.append(pair)
    logger.info(
        f"states of {len(pairs) - rotated} key heads are cut by write and erase matrices, of {rotated} by a rotation; "
        f"largest eigenvalue of a transition with the former: {max(rates):.4f}"
    )
    return found


register_adapter(CompreSSMGatedDeltaAdapter())
