"""Adapters for Mamba-2 mixers: a subset of states in stock classes, a change of basis in this package's own.

B and C pass a convolution and SiLU after their projection, so nothing can be folded into `in_proj`. This package's
mixers carry a read-in L and a read-out R per group behind that, which reach the best rank r. Stock mixers keep r
channels each of B and C.

Shapes: I channels in H heads, G groups, N states before the cut, r after it. Rows of `in_proj` are gate (I), u (I),
B (G N), C (G N), dt (H); channels of the convolution are u, B, C. Source: Dao and Gu 2024, arXiv 2405.21060, for the
layer; `hf_compressm.reduction.interpolative` for the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.mixer import mask_padding
from ...layers.plain import innermost
from ...reduction import low_rank_basis, output_residual
from ..changes import ParameterChange, Term
from .base import MixerReduction, ReductionError, register_adapter
from .convolution import check_convolution, convolution_step
from .mamba import convolved_tokens, time_of_tokens
from .selective import SelectiveAdapter, SelectiveMeasurement, Signals, StateChoice


class _Mamba2Adapter(SelectiveAdapter):
    dynamics = ("A_log", "D", "dt_bias")

    def signals(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Signals:
        return mamba2_signals(mixer, hidden_states, attention_mask)


class StockMamba2Adapter(_Mamba2Adapter):
    """Mixers of Mamba-2 and its kin in transformers, whose config holds one state size for all layers.

    Args:
        mixer_class: the class or its full name.
        size_field: name of the config field that holds the state size.
    """

    uniform = True

    def __init__(self, mixer_class: type[nn.Module] | str, size_field: str):
        self.mixer_class = mixer_class
        self.size_field = size_field

    def state_size(self, mixer: Any) -> int:
        return _conv_states(mixer)

    def parameter_shapes(self, mixer: Any, order: int) -> dict[str, torch.Size]:
        channels, heads = _channels(mixer), mixer.A_log.shape[0]
        convolved = channels + 2 * mixer.n_groups * order
        rows, features = channels + convolved + heads, mixer.in_proj.weight.shape[1]
        shapes = {
            "in_proj.weight": torch.Size([rows, features]),
            "in_proj.bias": torch.Size([rows]),
            "conv1d.weight": torch.Size([convolved, 1, mixer.conv1d.weight.shape[2]]),
            "conv1d.bias": torch.Size([convolved]),
        }
        absent = [name for name in ("in_proj", "conv1d") if getattr(mixer, name).bias is None]
        return {name: shape for name, shape in shapes.items() if name.removesuffix(".bias") not in absent}

    def order_of(self, mixer: Any, shapes: Mapping[str, torch.Size]) -> int | None:
        channels = _channels(mixer)
        if len(shapes.get("conv1d.weight", ())) == 3:
            return (shapes["conv1d.weight"][0] - channels) // (2 * mixer.n_groups)
        if len(shapes.get("in_proj.weight", ())) == 2:  # all that a checkpoint of adapters tells
            rows = shapes["in_proj.weight"][0] - mixer.A_log.shape[0]
            return (rows - 2 * channels) // (2 * mixer.n_groups)
        return None

    def reduce_to(self, mixer: Any, measurement: SelectiveMeasurement, choice: StateChoice) -> MixerReduction:
        """Keep a subset of states of each group, with the read-out as it is."""
        kept = [choice.indices(G, W) for G, W in zip(measurement.G, measurement.W, strict=True)]
        residuals = []
        for G, W, states in zip(measurement.G, measurement.W, kept, strict=True):
            rows = torch.eye(len(G), dtype=G.dtype)[states]
            residuals.append(output_residual(G, W, rows, rows))
        return MixerReduction(self.keep(mixer, kept), residual=sum(residuals) / len(residuals))

    def size_multiple(self, mixer: Any) -> int:
        """What the installed convolution kernel needs."""

        def rows(size: int) -> list[int]:
            shapes = self.parameter_shapes(mixer, size)
            return [shapes[name][0] for name in ("conv1d.weight", "in_proj.weight")]

        return convolution_step(rows, _conv_states(mixer))

    def check_multiple(self, mixer: Any, multiple: int) -> None:
        check_convolution(self.size_multiple(mixer), _conv_states(mixer), multiple)

    def keep(self, mixer: Any, kept: Sequence[Sequence[int]]) -> dict[str, ParameterChange]:
        channels, size = _channels(mixer), _conv_states(mixer)
        states = torch.tensor([group * size + index for group, chosen in enumerate(kept) for index in chosen])
        block = mixer.n_groups * size
        u = torch.arange(channels)
        convolved = torch.cat([u, channels + states, channels + block + states])
        end = torch.arange(mixer.A_log.shape[0]) + 2 * channels + 2 * block
        rows = {"in_proj": torch.cat([u, channels + convolved, end]), "conv1d": convolved}
        changes = {}
        for name in self.parameter_shapes(mixer, size):
            index = rows[name.partition(".")[0]]
            old = mixer.get_parameter(name).detach().cpu()  # the plan goes to ranks with other devices
            picked = Term(name, rows=index)
            changes[name] = ParameterChange(picked(old), (picked,), rows=picked)
        return changes

    def refitted(self, mixer: Any) -> dict[str, slice]:
        channels, block = _channels(mixer), 2 * mixer.n_groups * _conv_states(mixer)
        rows = {"in_proj": slice(2 * channels, 2 * channels + block), "conv1d": slice(channels, None)}
        return {name: rows[name.partition(".")[0]] for name in self.parameter_shapes(mixer, _conv_states(mixer))}

    def update_size_attributes(self, mixer: Any, order: int) -> None:
        convolved = mixer.conv1d.weight.shape[0]
        mixer.conv1d.in_channels = mixer.conv1d.out_channels = mixer.conv1d.groups = convolved
        mixer.in_proj.out_features = mixer.in_proj.weight.shape[0]
        mixer.ssm_state_size, mixer.conv_dim = order, convolved
        if hasattr(mixer, "groups_time_state_size"):
            mixer.groups_time_state_size = mixer.n_groups * order
        if hasattr(mixer, "mup_vector"):
            _resize_multipliers(mixer, order)


class CompreSSMMamba2Adapter(_Mamba2Adapter):
    """This package's Mamba-2 mixer: the best basis of rank r for the states of each group."""

    mixer_class = "hf_compressm.layers.mamba2.CompreSSMMamba2Mixer"

    def state_size(self, mixer: Any) -> int:
        return _conv_states(mixer) if mixer.read_in is None else mixer.read_in.shape[1]

    def parameter_shapes(self, mixer: Any, order: int) -> dict[str, torch.Size]:
        size = _conv_states(mixer)
        if order == size:
            return {}
        return dict.fromkeys(("read_in", "read_out"), torch.Size([mixer.n_groups, order, size]))

    def order_of(self, mixer: Any, shapes: Mapping[str, torch.Size]) -> int | None:
        if len(shapes.get("read_in", ())) == 3:
            return shapes["read_in"][1]
        return _conv_states(mixer) if "conv1d.weight" in shapes else None

    def reduce_to(self, mixer: Any, measurement: SelectiveMeasurement, choice: StateChoice) -> MixerReduction:
        """Change the basis of each group's states, and keep the best r of the new ones.

        Raises:
            ReductionError: if a new parameter is NaN or infinite.
        """
        ins, outs, residuals = [], [], []
        for G, W in zip(measurement.G, measurement.W, strict=True):
            L, R = _basis(G, W, choice)
            ins.append(L)
            outs.append(R)
            residuals.append(output_residual(G, W, L, R))
        read_in, read_out = torch.stack(ins), torch.stack(outs)
        if not (read_in.isfinite().all() and read_out.isfinite().all()):
            raise ReductionError("the reduced parameters are NaN or infinite")
        return MixerReduction(basis_changes(mixer, read_in, read_out), residual=sum(residuals) / len(residuals))

    def keep(self, mixer: Any, kept: Sequence[Sequence[int]]) -> dict[str, ParameterChange]:
        rows = torch.eye(self.state_size(mixer), dtype=torch.float64)[torch.tensor([list(chosen) for chosen in kept])]
        return basis_changes(mixer, rows, rows)

    def refitted(self, mixer: Any) -> dict[str, slice]:
        return dict.fromkeys(("read_in", "read_out"), slice(None))


def mamba2_signals(mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Signals:
    """Input of a Mamba-2 mixer's scan for hidden states (B, L, H) and a mask (B, L), zero at padding."""
    hidden_states = mask_padding(hidden_states, attention_mask)
    projected = mixer.in_proj(hidden_states * getattr(mixer, "ssm_in_multiplier", 1.0))
    projected = projected * getattr(mixer, "mup_vector", 1.0)
    channels, heads, groups = _channels(mixer), mixer.A_log.shape[0], mixer.n_groups
    convolved = len(mixer.conv1d.weight)
    _, convolved, step = projected.split([channels, convolved, heads], dim=-1)
    convolved = convolved_tokens(mixer, convolved, attention_mask)
    size = _conv_states(mixer)
    u, B, C = convolved.split([channels, groups * size, groups * size], dim=-1)
    B, C = (signal.unflatten(-1, (groups, size)) for signal in (B, C))
    if getattr(mixer, "read_in", None) is not None:
        B, C = torch.einsum("blgn,grn->blgr", B, mixer.read_in), torch.einsum("blgn,grn->blgr", C, mixer.read_out)
    dt = F.softplus(step.float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
    dt = time_of_tokens(mixer, dt, attention_mask)
    per_head = channels // heads
    A = -mixer.A_log.float().exp().repeat_interleave(per_head)[:, None]
    return Signals(u, dt.repeat_interleave(per_head, dim=-1), A, B, C)


def _channels(mixer: Any) -> int:
    return innermost(mixer.out_proj).in_features  # a quantised weight may have another shape


def _conv_states(mixer: Any) -> int:
    """Number of states that the convolution's channels amount to."""
    return (mixer.conv1d.weight.shape[0] - _channels(mixer)) // (2 * mixer.n_groups)


def basis_changes(mixer: Any, read_in: Tensor, read_out: Tensor) -> dict[str, ParameterChange]:
    """Changes of read_in and read_out to L read_in and R read_out, or to L and R where there are none yet.

    Args:
        mixer: has `read_in` and `read_out`, each (G, N, ...) or None.
        read_in, read_out: L and R, float64 (G, r, N).
    """
    if mixer.read_in is None:
        # Nothing on record tells the gradient of a matrix that was not there.
        return {"read_in": ParameterChange(read_in, ()), "read_out": ParameterChange(read_out, ())}
    old_in, old_out = (p.detach().to("cpu", torch.float64) for p in (mixer.read_in, mixer.read_out))
    return {
        "read_in": ParameterChange(read_in @ old_in, (Term("read_in", left=read_out),)),
        "read_out": ParameterChange(read_out @ old_out, (Term("read_out", left=read_in),)),
    }


def _basis(G: Tensor, W: Tensor, choice: StateChoice) -> tuple[Tensor, Tensor]:
    if choice.selection == "largest":
        return low_rank_basis(G, W, choice.order)
    L, R = low_rank_basis(G, W, len(G))
    if choice.selection == "smallest":
        return L[-choice.order :], R[-choice.order :]
    kept = choice.indices(G, W)
    return L[kept], R[kept]


def _resize_multipliers(mixer: Any, order: int) -> None:
    """Falcon-H1 multiplies the projections by one factor per part; the parts of B and C change their length."""
    old, channels = mixer.mup_vector, _channels(mixer)
    block = (old.shape[-1] - 2 * channels - mixer.A_log.shape[0]) // 2
    lengths = [channels, channels, mixer.n_groups * order, mixer.n_groups * order, mixer.A_log.shape[0]]
    starts = [0, channels, 2 * channels, 2 * channels + block, 2 * channels + 2 * block]
    parts = [old[..., start : start + 1].expand(1, 1, length) for start, length in zip(starts, lengths, strict=True)]
    mixer.mup_vector = torch.cat(parts, dim=-1)


_STOCK = "transformers.models."
for _class, _field in {
    "mamba2.modeling_mamba2.Mamba2Mixer": "state_size",
    "bamba.modeling_bamba.BambaMixer": "mamba_d_state",
    "zamba2.modeling_zamba2.Zamba2MambaMixer": "mamba_d_state",
    "nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": "ssm_state_size",
    "falcon_h1.modeling_falcon_h1.FalconH1Mixer": "mamba_d_state",
    "granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer": "mamba_d_state",
}.items():
    register_adapter(StockMamba2Adapter(_STOCK + _class, _field))
register_adapter(CompreSSMMamba2Adapter())
