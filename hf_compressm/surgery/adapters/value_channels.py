"""Adapter for the value channels of gated delta-rule mixers: a subset of them for each value head.

Rows of values and gates leave the projections and the convolution, columns the read-out. The gated norm's weight, which
all heads share, is folded into the read-out and becomes 1, so that each head may keep other channels. The read-out also
takes up what the removed channels put out, as far as the others predict it, and that the norm averages over fewer.

Shapes: batch B, length L, H value heads of size V.

Source: `reduction.value_channels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.padding import RealFirst
from ...reduction import empirical_singular_values, output_residual, read_out_correction
from ...reduction.value_channels import norm_gain
from ..changes import ParameterChange, Term
from .base import MixerReduction, ReductionError
from .convolution import check_convolution, convolution_step
from .head_rows import KEY, VALUE, Segments, fit_sizes, picked_rows, row_shapes, with_kind
from .matrix_states import second_moment
from .selective import CalibratedAdapter, StateChoice, real_tokens

BLOCK = 16
"""Sizes of keys and values are multiples of this unless the caller says otherwise."""


class ValueStatistics:
    """Sums over tokens, padding left out, of what the value heads put out behind the gated norm.

    Args:
        norm: name of the norm in the mixer.
        real_first: whether the mixer moves padding to the end.

    Attributes:
        outputs: float64 (H, V, V), of y y^T.
        power: float64 (H, V), of the squares of normed outputs before weight and gate.
        tokens: number of tokens.
    """

    def __init__(self, norm: str, real_first: bool):
        self.norm, self.real_first = norm, real_first
        self.outputs: Tensor | None = None
        self.power: Tensor | None = None
        self.tokens = 0

    @torch.no_grad()
    def observe(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> None:
        """Add one batch of a mixer's inputs: (B, L, D), and a mask (B, L), zero at padding.

        Raises:
            ReductionError: if a sum is NaN or infinite.
        """
        tokens = RealFirst.of(attention_mask, hidden_states) if self.real_first else None
        real = real_tokens(attention_mask, hidden_states) if tokens is None else tokens.real
        o, y = self._outputs(mixer, hidden_states, attention_mask)
        mean = o.square().mean(-1, keepdim=True)
        counted = real[..., None, None]
        power = (o.square() / (mean + _eps(mixer.get_submodule(self.norm))) * counted).double().sum((0, 1))
        outputs = second_moment(y * counted)
        if not (outputs.isfinite().all() and power.isfinite().all()):
            raise ReductionError("outputs of value heads are NaN or infinite on the calibration data")
        self.outputs = outputs if self.outputs is None else self.outputs + outputs
        self.power = power if self.power is None else self.power + power
        self.tokens += int(real.sum())

    def _outputs(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What goes into the norm and what comes out of it, (B, L, H, V), in float32."""
        seen: list[Tensor] = []
        norm = mixer.get_submodule(self.norm)
        handle = norm.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
        try:
            mixer.forward(hidden_states, attention_mask=attention_mask)  # a call would observe itself
        finally:
            handle.remove()
        shape = (*hidden_states.shape[:2], mixer.num_v_heads, mixer.head_v_dim)
        o, y = (part.reshape(shape).float() for part in seen)
        return o, y

    def sum_with(self, all_reduce: Callable[[Tensor], Any]) -> None:
        """Sum everything over processes, in place, by a function that does so for one tensor, float64 (n,)."""
        assert self.outputs is not None and self.power is not None
        parts = (self.outputs, self.power, self.power.new_tensor([self.tokens]))
        flat = torch.cat([part.flatten() for part in parts])
        all_reduce(flat)
        outputs, power, tokens = flat.split([part.numel() for part in parts])
        self.outputs, self.power = outputs.view_as(self.outputs), power.view_as(self.power)
        self.tokens = int(tokens)


@dataclass(frozen=True)
class ValueMeasurement:
    """What the value heads put out, as means over tokens, and how the read-out weighs it.

    Attributes:
        Y: float64 (H, V, V), second moments of normed and gated outputs.
        W: float64 (H, V, V), O^T O of each head's columns O of the read-out.
        power: float64 (H, V), mean squares of normed outputs before weight and gate.
    """

    Y: Tensor
    W: Tensor
    power: Tensor

    def spectrum(self) -> Tensor:
        """Singular values of what the heads add to the output (V,), root of the sum of squares over heads."""
        values = [empirical_singular_values(Y, W) for Y, W in zip(self.Y, self.W, strict=True)]
        return torch.stack(values).square().sum(0).sqrt()

    def agreement(self, previous: ValueMeasurement, depth: int) -> float:
        """Share of the `depth` leading channels that both choose, mean over heads, in [0, 1]."""
        if self.Y.shape != previous.Y.shape:
            return 0.0
        pairs = [
            [set(StateChoice(depth).indices(Y, W)) for Y, W in zip(found.Y, found.W, strict=True)]
            for found in (self, previous)
        ]
        return sum(len(one & two) / depth for one, two in zip(*pairs, strict=True)) / len(self.Y)

    def state_dict(self) -> dict[str, Tensor]:
        """Y and W (H, V, V) and power (H, V), float64."""
        return {"Y": self.Y, "W": self.W, "power": self.power}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> ValueMeasurement:
        """The measurement whose `state_dict` this is: Y and W (H, V, V), power (H, V)."""
        return cls(state["Y"], state["W"], state["power"])


class ValueChannelAdapter(CalibratedAdapter):
    """The value channels of gated delta-rule mixers, of one size in all layers.

    Args:
        segments: function of a mixer that says what the rows of its projections and convolution make.
        norm: name of the gated norm in the mixer.
        read_out: name of the layer behind it.
        real_first: whether the mixer moves padding to the end before it mixes.
    """

    mixer_class = nn.Module
    measurement_class = ValueMeasurement
    uniform = True
    size_field = "linear_value_head_dim"
    read_out: str

    def __init__(
        self, segments: Callable[[Any], Segments], norm: str = "norm", read_out: str = "out_proj", *, real_first: bool
    ):
        self.segments, self.norm, self.read_out, self.real_first = segments, norm, read_out, real_first

    def state_size(self, mixer: Any) -> int:
        return len(mixer.get_parameter(f"{self.norm}.weight"))

    def parameter_shapes(self, mixer: Any, order: int) -> dict[str, torch.Size]:
        features = mixer.get_submodule(self.read_out).weight.shape[0]
        return row_shapes(mixer, self._segments(mixer), {KEY: mixer.head_k_dim, VALUE: order}) | {
            f"{self.norm}.weight": torch.Size([order]),
            f"{self.read_out}.weight": torch.Size([features, mixer.num_v_heads * order]),
        }

    def order_of(self, mixer: Any, shapes: Mapping[str, torch.Size]) -> int | None:
        found = shapes.get(f"{self.norm}.weight")
        return None if found is None else found[0]

    def statistics(self, mixer: Any) -> ValueStatistics:
        return ValueStatistics(self.norm, self.real_first)

    def measure(self, mixer: Any, statistics: ValueStatistics | None = None) -> ValueMeasurement:
        if statistics is None or statistics.outputs is None or statistics.power is None:
            raise ValueError("value channels are measured on calibration data; pass its statistics")
        outputs, power = ((found / max(statistics.tokens, 1)).cpu() for found in (statistics.outputs, statistics.power))
        columns = self._columns(mixer)
        return ValueMeasurement(outputs, columns.mT @ columns, power)

    def reduce_to(self, mixer: Any, measurement: ValueMeasurement, choice: StateChoice) -> MixerReduction:
        """Keep the channels of each value head from which the layer's output is predicted best.

        Raises:
            ReductionError: if a new parameter is NaN or infinite.
        """
        kept = [choice.indices(Y, W) for Y, W in zip(measurement.Y, measurement.W, strict=True)]
        return self.reduce_to_kept(mixer, measurement, kept)

    def reduce_to_kept(
        self, mixer: Any, measurement: ValueMeasurement, kept: Sequence[Sequence[int]]
    ) -> MixerReduction:
        """The mixer with these channels of each value head, and a read-out that makes up for the others.

        Args:
            mixer: the mixer, which is not changed.
            measurement: of it.
            kept: r indices in [0, V) for each value head.

        Raises:
            ReductionError: if a new parameter is NaN or infinite.
        """
        weight, folded, gains, missed = self._weight(mixer), [], [], []
        heads = zip(measurement.Y, measurement.W, measurement.power, map(list, kept), strict=True)
        for Y, W, power, channels in heads:
            gains.append(norm_gain(power, channels))
            predicted = read_out_correction(Y, channels)
            folded.append(predicted.T * (weight[channels] / gains[-1]))
            picks = torch.eye(len(Y), dtype=Y.dtype)[channels]
            missed.append(output_residual(Y, W, picks, predicted))
        changes = self._changes(mixer, kept, folded, gains)
        if not all(change.value.isfinite().all() for change in changes.values()):
            raise ReductionError("the reduced parameters are NaN or infinite")
        return MixerReduction(changes, residual=sum(missed) / len(missed))

    def size_multiple(self, mixer: Any) -> int:
        """Kernels for GPUs work on blocks of 16 channels; a layer that has no more may have fewer."""
        return BLOCK if self.state_size(mixer) > BLOCK else self._step(mixer)

    def check_multiple(self, mixer: Any, multiple: int) -> None:
        check_convolution(self._step(mixer), self.state_size(mixer), multiple)

    def keep(self, mixer: Any, kept: Sequence[Sequence[int]]) -> dict[str, ParameterChange]:
        weight = self._weight(mixer)
        folded = [torch.diag(weight)[:, list(channels)] for channels in kept]
        return self._changes(mixer, kept, folded, [1.0] * len(kept))

    def refitted(self, mixer: Any) -> dict[str, slice]:
        return dict.fromkeys(self.parameter_shapes(mixer, self.state_size(mixer)), slice(None))

    def update_size_attributes(self, mixer: Any, order: int) -> None:
        sizes = {
            "head_v_dim": order,
            "value_dim": order * mixer.num_v_heads,
            "conv_dim": mixer.conv1d.weight.shape[0],
        }
        for name, size in sizes.items():
            if hasattr(mixer, name):
                setattr(mixer, name, size)
        fit_sizes(mixer, self._segments(mixer))
        mixer.get_submodule(self.read_out).in_features = order * mixer.num_v_heads

    def _step(self, mixer: Any) -> int:
        return convolution_step(
            lambda size: [self.parameter_shapes(mixer, size)["conv1d.weight"][0]], self.state_size(mixer)
        )

    def _segments(self, mixer: Any) -> Segments:
        return with_kind(self.segments(mixer), VALUE)

    def _weight(self, mixer: Any) -> Tensor:
        return mixer.get_parameter(f"{self.norm}.weight").detach().to("cpu", torch.float64)

    def _columns(self, mixer: Any) -> Tensor:
        """The read-out's columns, float64 (H, D, V)."""
        weight = mixer.get_submodule(self.read_out).weight.detach().to("cpu", torch.float64)
        return weight.unflatten(1, (mixer.num_v_heads, -1)).transpose(0, 1)

    def _changes(
        self, mixer: Any, kept: Sequence[Sequence[int]], folded: Sequence[Tensor], gains: Sequence[float]
    ) -> dict[str, ParameterChange]:
        """Rows that stay, a norm with weight 1, and a read-out O C with C (V, r) of each head in `folded`.

        An output that stays is gain / weight times what it was with the weight, and the read-out's gradient with it.
        The norm's weight belongs to all heads: of its gradient each head is taken to have made the same part.
        """
        weight, heads, order = self._weight(mixer), mixer.num_v_heads, len(kept[0])
        picks = [torch.eye(len(weight), dtype=torch.float64)[list(channels)] for channels in kept]
        shares = sum(picks[1:], picks[0]) / heads * weight
        inverse = torch.where(weight != 0, 1 / torch.where(weight != 0, weight, 1), 0)
        back = torch.block_diag(*(gain * (pick * inverse).T for gain, pick in zip(gains, picks, strict=True)))
        read_out = (self._columns(mixer) @ torch.stack(list(folded))).transpose(0, 1).flatten(1)
        norm, last = f"{self.norm}.weight", f"{self.read_out}.weight"
        sizes = {KEY: mixer.head_k_dim, VALUE: len(weight)}
        return picked_rows(mixer, self._segments(mixer), sizes, VALUE, kept) | {
            norm: ParameterChange(torch.ones(order), (Term(norm, left=shares),)),
            last: ParameterChange(read_out, (Term(last, right=back.float()),)),
        }


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
