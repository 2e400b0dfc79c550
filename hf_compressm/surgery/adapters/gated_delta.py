"""Adapters for gated delta-rule mixers (Gated DeltaNet) of transformers: a subset of key channels.

The state of a value head is a matrix S (K, V); a cut lowers K, which the config holds once for all layers. Rows that
make the removed channels of q and k leave the projections and the convolution, so the result is a plain checkpoint.
Queries and keys are normalised behind the convolution, so what is left of them has length 1 again, which was measured
to be better than to keep its length before the cut.

Shapes: batch B, length L, G key heads of size K, H value heads of size V, H a multiple of G.

Source: the recurrence: Yang et al., arXiv 2412.06464; the choice of channels: `reduction.key_channels`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ...layers.gated_delta import unit_vectors
from ...layers.mixer import mask_padding
from ...ops.gated_delta_scan import delta_state_gramian
from ...reduction.key_channels import key_moments, missed_share
from ..changes import ParameterChange, Term
from .base import MixerReduction, register_adapter
from .convolution import check_convolution, convolution_step
from .head_rows import (
    KEY,
    VALUE,
    Segments,
    fit_sizes,
    flat_segments,
    heads_of,
    picked_rows,
    row_shapes,
    size_from_rows,
    with_convolution,
    with_kind,
)
from .matrix_states import MatrixMeasurement, MatrixStatistics, choose_channels, second_moment
from .selective import CalibratedAdapter, StateChoice, look_weights, real_tokens
from .value_channels import BLOCK, ValueChannelAdapter


@dataclass(frozen=True)
class DeltaSignals:
    """Input of the recurrence S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T, with a_t = exp(g_t).

    Attributes:
        q, k: (B, L, G, K), of length 1.
        v: (B, L, H, V).
        g: (B, L, H), <= 0.
        beta: (B, L, H), >= 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


class GatedDeltaAdapter(CalibratedAdapter):
    """Gated delta-rule mixers in transformers, whose config holds one key size for all layers.

    Args:
        mixer_class: full name of the class.
    """

    measurement_class = MatrixMeasurement
    uniform = True
    size_field = "linear_key_head_dim"
    dynamics = ("A_log", "dt_bias")
    read_out: str = "out_proj"
    norm = "norm"

    def __init__(self, mixer_class: str):
        self.mixer_class = mixer_class
        self.values = ValueChannelAdapter(self._segments, self.norm, self.read_out, real_first=False)

    @abstractmethod
    def segments(self, mixer: Any) -> dict[str, list[tuple[str, int]]]:
        """What the rows of each projection make, in their order: (KEY, key head) or (VALUE, value head)."""

    @abstractmethod
    def projected(self, mixer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channels q|k|v before the convolution, raw time step and raw write strength: (B, L, C), (B, L, H) twice."""

    def strength(self, mixer: Any, raw: Tensor) -> Tensor:
        """Write strength beta from its raw value (B, L, H)."""
        return raw.sigmoid()

    def state_size(self, mixer: Any) -> int:
        rows = mixer.conv1d.weight.shape[0]
        return size_from_rows(rows, self._segments(mixer)["conv1d"], KEY, mixer.head_v_dim)

    def parameter_shapes(self, mixer: Any, order: int) -> dict[str, torch.Size]:
        shapes = row_shapes(mixer, self._keys(mixer), {KEY: order, VALUE: mixer.head_v_dim})
        return shapes | {f"{self.read_out}.weight": mixer.get_submodule(self.read_out).weight.shape}

    def order_of(self, mixer: Any, shapes: Mapping[str, torch.Size]) -> int | None:
        for name, parts in self._keys(mixer).items():
            if f"{name}.weight" in shapes:
                return size_from_rows(shapes[f"{name}.weight"][0], parts, KEY, mixer.head_v_dim)
        return None

    def statistics(self, mixer: Any) -> MatrixStatistics:
        return MatrixStatistics(self.moments)

    def signals(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> DeltaSignals:
        """Input of the mixer's recurrence for hidden states (B, L, D); nothing is written at padding."""
        hidden_states = mask_padding(hidden_states, attention_mask)
        channels, step, strength = self.projected(mixer, hidden_states)
        q, k, v = self._convolved(mixer, channels)
        g = -mixer.A_log.float().exp() * F.softplus(step.float() + mixer.dt_bias.float())
        beta = mask_padding(self.strength(mixer, strength.float()), attention_mask)
        g = mask_padding(g, attention_mask)
        return DeltaSignals(unit_vectors(q), unit_vectors(k), v, g, beta)

    def queries_and_keys(
        self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, L, G, K) before they are normalised, for hidden states (B, L, D); zero at padding."""
        channels, _, _ = self.projected(mixer, mask_padding(hidden_states, attention_mask))
        real = real_tokens(attention_mask, hidden_states)[..., None, None]
        q, k, _ = self._convolved(mixer, channels)
        return q * real, k * real

    def _convolved(self, mixer: Any, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channels q|k|v (B, L, C) -> q and k (B, L, G, K) and v (B, L, H, V) behind convolution and activation."""
        convolved = mixer.conv1d(channels.mT)[..., : channels.shape[1]].mT
        convolved = ACT2FN[mixer.activation](convolved).float()
        keys = mixer.num_k_heads * self.state_size(mixer)
        q, k, v = convolved.split([keys, keys, _value_size(mixer)], dim=-1)
        q, k = (part.unflatten(-1, (mixer.num_k_heads, -1)) for part in (q, k))
        return q, k, v.unflatten(-1, (mixer.num_v_heads, -1))

    def moments(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Sums over tokens of q q^T, k k^T and, estimated by `look_weights`, S S^T: float64 (3, G, K, K)."""
        real = real_tokens(attention_mask, hidden_states)
        signals = self.signals(mixer, hidden_states, attention_mask)
        queries, keys = (second_moment(part * real[..., None, None]) for part in (signals.q, signals.k))
        states = delta_state_gramian(signals.k, signals.v, signals.g, signals.beta, look_weights(real))
        return torch.stack([queries, keys, states])

    def reduce_to(self, mixer: Any, measurement: MatrixMeasurement, choice: StateChoice) -> MixerReduction:
        moments = list(zip(measurement.Q, measurement.K, strict=True))
        kept = [choose_channels(Q, K, choice) for Q, K in moments]
        missed = [missed_share(key_moments(*pair), channels) for pair, channels in zip(moments, kept, strict=True)]
        return MixerReduction(self.keep(mixer, kept), residual=sum(missed) / len(missed))

    def size_multiple(self, mixer: Any) -> int:
        """Kernels for GPUs work on blocks of 16 channels; a layer that has no more may have fewer."""
        return BLOCK if self.state_size(mixer) > BLOCK else self._step(mixer)

    def check_multiple(self, mixer: Any, multiple: int) -> None:
        check_convolution(self._step(mixer), self.state_size(mixer), multiple)

    def keep(self, mixer: Any, kept: Sequence[Sequence[int]]) -> dict[str, ParameterChange]:
        sizes = {KEY: self.state_size(mixer), VALUE: mixer.head_v_dim}
        same = Term(f"{self.read_out}.weight")
        weight = mixer.get_parameter(same.source).detach().cpu()
        changes = picked_rows(mixer, self._keys(mixer), sizes, KEY, kept)
        return changes | {same.source: ParameterChange(weight, (same,), rows=same)}

    def refitted(self, mixer: Any) -> dict[str, slice]:
        return dict.fromkeys(self.parameter_shapes(mixer, self.state_size(mixer)), slice(None))

    def update_size_attributes(self, mixer: Any, order: int) -> None:
        mixer.head_k_dim, mixer.key_dim = order, order * mixer.num_k_heads
        mixer.conv_dim = mixer.conv1d.weight.shape[0]
        fit_sizes(mixer, self._keys(mixer))

    def _step(self, mixer: Any) -> int:
        def rows(size: int) -> list[int]:
            return [self.parameter_shapes(mixer, size)["conv1d.weight"][0]]

        return convolution_step(rows, self.state_size(mixer))

    def _segments(self, mixer: Any) -> Segments:
        return with_convolution(mixer, self.segments(mixer))

    def _keys(self, mixer: Any) -> Segments:
        return with_kind(self._segments(mixer), KEY)


class QwenDeltaAdapter(GatedDeltaAdapter):
    """Qwen3.5 and Qwen4-exp: one projection for q|k|v."""

    def segments(self, mixer: Any) -> dict[str, list[tuple[str, int]]]:
        return flat_segments(mixer)

    def projected(self, mixer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(layer(hidden_states) for layer in (mixer.in_proj_qkv, mixer.in_proj_a, mixer.in_proj_b))


class QwenNextDeltaAdapter(GatedDeltaAdapter):
    """Qwen3-Next: one projection in which q, k, v and the gate of a key head lie side by side."""

    def segments(self, mixer: Any) -> dict[str, list[tuple[str, int]]]:
        heads, values = heads_of(mixer)
        times = len(values) // len(heads)
        parts = [[head, head, *values[times * head[1] :][:times] * 2] for head in heads]
        return {"in_proj_qkvz": sum(parts, [])}

    def projected(self, mixer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(hidden_states), mixer.in_proj_ba(hidden_states))
        q, k, v, _, b, a = parts
        return torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1), a, b


class OlmoDeltaAdapter(GatedDeltaAdapter):
    """OLMo-Hybrid: a projection each for q, k and v; write strengths up to 2 where the config allows it."""

    read_out, norm = "o_proj", "o_norm"

    def segments(self, mixer: Any) -> dict[str, list[tuple[str, int]]]:
        heads, values = heads_of(mixer)
        return {"q_proj": heads, "k_proj": heads, "v_proj": values, "g_proj": values}

    def projected(self, mixer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [layer(hidden_states) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        return torch.cat(parts, dim=-1), mixer.a_proj(hidden_states), mixer.b_proj(hidden_states)

    def strength(self, mixer: Any, raw: Tensor) -> Tensor:
        return raw.sigmoid() * (2 if mixer.allow_neg_eigval else 1)


def _value_size(mixer: Any) -> int:
    return mixer.num_v_heads * mixer.head_v_dim


_STOCK = "transformers.models."
for _adapter, _class in (
    (QwenDeltaAdapter, "qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet"),
    (QwenDeltaAdapter, "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeGatedDeltaNet"),
    (QwenDeltaAdapter, "qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextGatedDeltaNet"),
    (QwenNextDeltaAdapter, "qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet"),
    (OlmoDeltaAdapter, "olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet"),
):
    register_adapter(_adapter(_STOCK + _class))
