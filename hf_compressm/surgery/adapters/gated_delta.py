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
from ...layers.plain import innermost
from ...ops.gated_delta_scan import delta_state_gramian
from ...reduction.key_channels import key_moments, missed_share
from ..changes import ParameterChange, Term
from .base import MixerReduction, register_adapter
from .convolution import check_convolution, convolution_step
from .matrix_states import MatrixMeasurement, MatrixStatistics, choose_channels, second_moment
from .selective import CalibratedAdapter, StateChoice, look_weights, real_tokens

BLOCK = 16
"""Key sizes are multiples of this unless the caller says otherwise."""
KEY, OTHER = "key", "other"


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

    def __init__(self, mixer_class: str):
        self.mixer_class = mixer_class

    @abstractmethod
    def segments(self, mixer: Any) -> dict[str, list[tuple[str, int]]]:
        """How the rows of each projection are divided: (KEY, key head) or (OTHER, number of rows), in their order."""

    @abstractmethod
    def projected(self, mixer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channels q|k|v before the convolution, raw time step and raw write strength: (B, L, C), (B, L, H) twice."""

    def strength(self, mixer: Any, raw: Tensor) -> Tensor:
        """Write strength beta from its raw value (B, L, H)."""
        return raw.sigmoid()

    def state_size(self, mixer: Any) -> int:
        keys = [kind for kind, _ in self._segments(mixer)["conv1d"]].count(KEY)
        return (mixer.conv1d.weight.shape[0] - _value_size(mixer)) // keys

    def parameter_shapes(self, mixer: Any, order: int) -> dict[str, torch.Size]:
        shapes = {}
        for name, segments in self._segments(mixer).items():
            rows = sum(order if kind == KEY else number for kind, number in segments)
            layer = innermost(getattr(mixer, name))
            if layer.weight is not None:
                tail = (1, mixer.conv_kernel_size) if name == "conv1d" else (layer.in_features,)
                shapes[f"{name}.weight"] = torch.Size([rows, *tail])
            if layer.bias is not None:
                shapes[f"{name}.bias"] = torch.Size([rows])
        return shapes | {f"{self.read_out}.weight": mixer.get_submodule(self.read_out).weight.shape}

    def order_of(self, mixer: Any, shapes: Mapping[str, torch.Size]) -> int | None:
        for name, segments in self._segments(mixer).items():
            if f"{name}.weight" in shapes:
                others = sum(number for kind, number in segments if kind == OTHER)
                return (shapes[f"{name}.weight"][0] - others) // [kind for kind, _ in segments].count(KEY)
        return None

    def statistics(self, mixer: Any) -> MatrixStatistics:
        return MatrixStatistics(self.moments)

    def signals(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> DeltaSignals:
        """Input of the mixer's recurrence for hidden states (B, L, D); nothing is written at padding."""
        hidden_states = mask_padding(hidden_states, attention_mask)
        channels, step, strength = self.projected(mixer, hidden_states)
        convolved = mixer.conv1d(channels.mT)[..., : channels.shape[1]].mT
        convolved = ACT2FN[mixer.activation](convolved).float()
        size, heads = self.state_size(mixer), mixer.num_k_heads
        q, k, v = convolved.split([heads * size, heads * size, _value_size(mixer)], dim=-1)
        q, k = (unit_vectors(part.unflatten(-1, (heads, size))) for part in (q, k))
        g = -mixer.A_log.float().exp() * F.softplus(step.float() + mixer.dt_bias.float())
        beta = mask_padding(self.strength(mixer, strength.float()), attention_mask)
        g = mask_padding(g, attention_mask)
        return DeltaSignals(q, k, v.unflatten(-1, (mixer.num_v_heads, -1)), g, beta)

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
        index = {name: self._rows(mixer, name, kept) for name in self._segments(mixer)}
        changes = {}
        for name in self.parameter_shapes(mixer, self.state_size(mixer)):
            picked = Term(name, rows=index.get(name.partition(".")[0]))
            changes[name] = ParameterChange(picked(mixer.get_parameter(name).detach().cpu()), (picked,), rows=picked)
        return changes

    def refitted(self, mixer: Any) -> dict[str, slice]:
        return dict.fromkeys(self.parameter_shapes(mixer, self.state_size(mixer)), slice(None))

    def update_size_attributes(self, mixer: Any, order: int) -> None:
        mixer.head_k_dim, mixer.key_dim = order, order * mixer.num_k_heads
        mixer.conv_dim = mixer.conv1d.weight.shape[0]
        mixer.conv1d.in_channels = mixer.conv1d.out_channels = mixer.conv1d.groups = mixer.conv_dim
        for name in self._segments(mixer):
            if name != "conv1d":
                getattr(mixer, name).out_features = getattr(mixer, name).weight.shape[0]

    def _step(self, mixer: Any) -> int:
        def rows(size: int) -> list[int]:
            return [self.parameter_shapes(mixer, size)["conv1d.weight"][0]]

        return convolution_step(rows, self.state_size(mixer))

    def _segments(self, mixer: Any) -> dict[str, list[tuple[str, int]]]:
        heads = [(KEY, head) for head in range(mixer.num_k_heads)]
        return self.segments(mixer) | {"conv1d": [*heads, *heads, (OTHER, _value_size(mixer))]}

    def _rows(self, mixer: Any, name: str, kept: Sequence[Sequence[int]]) -> Tensor:
        """Indices of a projection's rows that stay: the given channels of each key head, and all that is not a key."""
        size, start, rows = self.state_size(mixer), 0, []
        for kind, number in self._segments(mixer)[name]:
            if kind == KEY:
                rows += [start + channel for channel in kept[number]]
            else:
                rows += range(start, start + number)
            start += size if kind == KEY else number
        return torch.tensor(rows)


class QwenDeltaAdapter(GatedDeltaAdapter):
    """Qwen3.5 and Qwen4-exp: one projection for q|k|v."""

    def segments(self, mixer: Any) -> dict[str, list[tuple[str, int]]]:
        heads = [(KEY, head) for head in range(mixer.num_k_heads)]
        return {"in_proj_qkv": [*heads, *heads, (OTHER, _value_size(mixer))]}

    def projected(self, mixer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(layer(hidden_states) for layer in (mixer.in_proj_qkv, mixer.in_proj_a, mixer.in_proj_b))


class QwenNextDeltaAdapter(GatedDeltaAdapter):
    """Qwen3-Next: one projection in which q, k, v and the gate of a key head lie side by side."""

    def segments(self, mixer: Any) -> dict[str, list[tuple[str, int]]]:
        width = 2 * _value_size(mixer) // mixer.num_k_heads
        heads = [[(KEY, head), (KEY, head), (OTHER, width)] for head in range(mixer.num_k_heads)]
        return {"in_proj_qkvz": sum(heads, [])}

    def projected(self, mixer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(hidden_states), mixer.in_proj_ba(hidden_states))
        q, k, v, _, b, a = parts
        return torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1), a, b


class OlmoDeltaAdapter(GatedDeltaAdapter):
    """OLMo-Hybrid: a projection each for q, k and v; write strengths up to 2 where the config allows it."""

    read_out = "o_proj"

    def segments(self, mixer: Any) -> dict[str, list[tuple[str, int]]]:
        heads = [(KEY, head) for head in range(mixer.num_k_heads)]
        return {"q_proj": heads, "k_proj": heads}

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
