"""Adapter for this package's lightning attention: the best basis of rank r for the states of each head.

S_t = a S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, with a decay a that is fixed: with L k in place of k and R q in place of q
nothing changes where R^T L = I, and no choice of L and R can let a state grow.

Shapes: batch B, length L, H heads of size K.

Source: the recurrence: MiniMax, arXiv 2501.08313, section 2.2; the balancing basis: `reduction.interpolative`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...layers.padding import RealFirst
from ...ops.gated_delta_scan import delta_state_gramian
from .base import register_adapter
from .matrix_states import MatrixStatistics, second_moment
from .own_basis import OwnBasisAdapter
from .selective import look_weights, real_tokens


class CompreSSMLightningAdapter(OwnBasisAdapter):
    """This package's lightning attention, whose states may be of another size in each layer."""

    mixer_class = "hf_compressm.layers.lightning.CompreSSMLightningMixer"

    def statistics(self, mixer: Any) -> MatrixStatistics:
        return MatrixStatistics(lightning_moments)


def lightning_moments(mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Sums over tokens of q q^T, k k^T and, estimated by `look_weights`, S S^T: float64 (3, H, r, r)."""
    tokens = RealFirst.of(attention_mask, hidden_states)
    real = real_tokens(None, hidden_states) if tokens is None else tokens.real
    hidden_states = hidden_states if tokens is None else tokens.bring(hidden_states)
    q, k, v, steps = mixer.recurrence_inputs(hidden_states, tokens)
    q, k = mixer.to_state_basis(q, k)
    queries, keys = (second_moment(part * real[..., None, None]) for part in (q, k))
    # The delta rule without a key to erase by is this recurrence.
    states = delta_state_gramian(
        k, v, steps * mixer.log_decay(v.device), steps, look_weights(real), erase=torch.zeros_like(k)
    )
    return torch.stack([queries, keys, states])


register_adapter(CompreSSMLightningAdapter())
