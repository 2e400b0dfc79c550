"""Adapters for Mamba mixers: a subset of states, the removed ones folded into the rows of `x_proj` that make C.

B_t and C_t are linear in the layer's input after its convolution, so the corrected read-out K C_t is a plain change of
weights, and the result is a smaller layer of the same class.

Shapes: I channels, R rank of the time step, N states before the cut, r after it. Source: Gu and Dao 2023, arXiv
2312.00752, for the layer; `hf_compressm.reduction.interpolative` for the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.mamba import CompreSSMMambaMixer, time_steps
from ...layers.mamba2 import CompreSSMMamba2Mixer
from ...layers.mixer import convolve, mask_padding
from ...layers.padding import RealFirst
from ...layers.plain import innermost
from ...reduction import output_residual, read_out_correction
from ..changes import ParameterChange, Term
from .base import MixerReduction, ReductionError, register_adapter
from .selective import SelectiveAdapter, SelectiveMeasurement, Signals, StateChoice


class MambaAdapter(SelectiveAdapter):
    """Mixers of Mamba, FalconMamba and Jamba, and this package's own.

    FalconMamba and Jamba normalise B and C over the states (RMS), so removing states rescales the others. The change is
    made good on average: in Jamba by the norms' learned weights; FalconMamba has none, so there the read-out path is
    rescaled as a whole, D by the inverse factor and `out_proj` by the factor.

    Args:
        mixer_class: the class or its full name.
        size_field: name of the config field that holds the state size of all layers; None for `state_sizes`.
    """

    dynamics = ("A_log", "D", "dt_proj.bias")

    def __init__(self, mixer_class: type[nn.Module] | str, size_field: str | None):
        self.mixer_class = mixer_class
        self.uniform = size_field is not None
        self.size_field = size_field or type(self).size_field

    def state_size(self, mixer: Any) -> int:
        return mixer.A_log.shape[1]

    def parameter_shapes(self, mixer: Any, order: int) -> dict[str, torch.Size]:
        channels, rank = mixer.A_log.shape[0], _rank(mixer)
        shapes = {
            "A_log": torch.Size([channels, order]),
            "x_proj.weight": torch.Size([rank + 2 * order, channels]),
        }
        if _learned_norms(mixer):
            shapes |= {name: torch.Size([order]) for name in ("b_layernorm.weight", "c_layernorm.weight")}
        elif _norms(mixer):
            shapes |= {"D": mixer.D.shape, "out_proj.weight": mixer.out_proj.weight.shape}
        return shapes

    def order_of(self, mixer: Any, shapes: Mapping[str, torch.Size]) -> int | None:
        if len(shapes.get("A_log", ())) == 2:
            return shapes["A_log"][1]
        if len(shapes.get("x_proj.weight", ())) == 2:  # all that a checkpoint of adapters tells
            return (shapes["x_proj.weight"][0] - _rank(mixer)) // 2
        return None

    def signals(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Signals:
        return mamba_signals(mixer, hidden_states, attention_mask)

    def reduce_to(self, mixer: Any, measurement: SelectiveMeasurement, choice: StateChoice) -> MixerReduction:
        """Keep a subset of states, with the removed ones folded into the read-out.

        Raises:
            ReductionError: if a new parameter is NaN or infinite.
        """
        G, W = measurement.G[0], measurement.W[0]
        kept = choice.indices(G, W)
        K = read_out_correction(G, kept)
        changes = self.subset_changes(mixer, measurement, kept, K)
        if not all(change.value.isfinite().all() for change in changes.values()):
            raise ReductionError("the reduced parameters are NaN or infinite")
        read_in = torch.eye(len(G), dtype=G.dtype)[kept]
        return MixerReduction(changes, residual=output_residual(G, W, read_in, K))

    def keep(self, mixer: Any, kept: Sequence[Sequence[int]]) -> dict[str, ParameterChange]:
        rank, size, index = _rank(mixer), self.state_size(mixer), torch.tensor(list(kept[0]))
        rows = {
            "x_proj.weight": torch.cat([torch.arange(rank), rank + index, rank + size + index]),
            **dict.fromkeys(("b_layernorm.weight", "c_layernorm.weight"), index),
        }
        columns = torch.eye(size, dtype=torch.float64)[:, index]
        changes = {}
        for name in self.parameter_shapes(mixer, size):
            picked = Term(name, right=columns) if name == "A_log" else Term(name, rows=rows.get(name))
            changes[name] = ParameterChange(picked(mixer.get_parameter(name).detach().cpu()), (picked,), rows=picked)
        return changes

    def subset_changes(
        self, mixer: Any, measurement: SelectiveMeasurement, kept: Sequence[int], K: Tensor
    ) -> dict[str, ParameterChange]:
        """Parameters of the mixer with the r kept states and the read-out K C_t, K float64 (r, N)."""
        G = measurement.G[0]
        # What moved the decay of a removed state n moves those of the kept ones, by their shares in predicting it.
        shares = K * G[kept] / G.diagonal().clamp(min=torch.finfo(G.dtype).tiny)
        rates = mixer.A_log.detach().cpu().double().exp()
        shares = shares * (rates[:, kept, None] / rates[:, None]).mean(0)
        shares[:, kept] = torch.eye(len(kept), dtype=G.dtype)
        changes = self._subset(mixer, kept, K, shares)
        order, index = len(kept), torch.tensor(kept)
        weights_B = _norm_weight(mixer, "b_layernorm", self.state_size(mixer))
        if not _norms(mixer):
            return changes
        # An RMS norm makes the mean square of what it is given 1; these are the mean squares asked for.
        wanted_C = (K @ measurement.W[0] @ K.T).diagonal().mean()
        wanted_B = (measurement.drives[0] / weights_B.square().clamp(min=1e-12))[index].mean()
        scale_B, scale_C = (float(wanted.clamp(min=1e-30).sqrt()) for wanted in (wanted_B, wanted_C))
        if _learned_norms(mixer):
            weight = torch.full((order,), scale_C, dtype=torch.float64)
            changes["b_layernorm.weight"] = ParameterChange(
                weights_B[index] * scale_B, (Term("b_layernorm.weight", rows=index, scale=1 / scale_B),)
            )
            weights_C = _norm_weight(mixer, "c_layernorm", self.state_size(mixer))
            shares_C = torch.eye(len(weights_C), dtype=torch.float64)[index] * weights_C / scale_C
            changes["c_layernorm.weight"] = ParameterChange(weight, (Term("c_layernorm.weight", left=shares_C),))
        else:
            D, out = (p.detach().to("cpu", torch.float64) for p in (mixer.D, mixer.out_proj.weight))
            scale = scale_B * scale_C
            changes["D"] = ParameterChange(D / scale, (Term("D", scale=scale),))
            changes["out_proj.weight"] = ParameterChange(
                out * scale,
                (Term("out_proj.weight", scale=1 / scale),),
                rows=Term("out_proj.weight", scale=scale),
            )
        return changes

    def _subset(self, mixer: Any, kept: Sequence[int], K: Tensor, shares: Tensor) -> dict[str, ParameterChange]:
        """The kept states with the read-out K C_t; gradients of the decays fold by `shares`, float64 (r, N)."""
        rank, size = _rank(mixer), self.state_size(mixer)
        index = torch.tensor(kept)
        select = torch.eye(size, dtype=torch.float64)[index]
        projection = mixer.x_proj.weight.detach().to("cpu", torch.float64)
        fold = K * _norm_weight(mixer, "c_layernorm", size)
        # A cut keeps the states' dynamics, so what trained row n of C trains row s wherever n = s. Co-states of the
        # kept states are driven by the folded read-out, so gradients of B fold as the read-out does.
        rows = Term("x_proj.weight", left=torch.block_diag(torch.eye(rank, dtype=torch.float64), select, fold))
        gradient = torch.block_diag(torch.eye(rank, dtype=torch.float64), K, select)
        return {
            "A_log": ParameterChange(mixer.A_log.detach().cpu()[:, index], (Term("A_log", right=shares.T),)),
            "x_proj.weight": ParameterChange(rows(projection), (Term("x_proj.weight", left=gradient),), rows=rows),
        }

    def refitted(self, mixer: Any) -> dict[str, slice]:
        rows = {"A_log": slice(None), "x_proj.weight": slice(_rank(mixer), None)}
        if _learned_norms(mixer):
            rows |= dict.fromkeys(("b_layernorm.weight", "c_layernorm.weight"), slice(None))
        return rows

    def update_size_attributes(self, mixer: Any, order: int) -> None:
        rank = _rank(mixer)
        mixer.x_proj.out_features = rank + 2 * order
        if hasattr(mixer, "ssm_state_size"):
            mixer.ssm_state_size = order
        if _norms(mixer) and not _learned_norms(mixer):
            for norm in (mixer.b_layernorm, mixer.c_layernorm):
                norm.weight = nn.Buffer(norm.weight.new_ones(order), persistent=False)


def mamba_signals(mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Signals:
    """Input of a Mamba mixer's scan for hidden states (B, L, H) and a mask (B, L), zero at padding."""
    projected = mixer.in_proj(mask_padding(hidden_states, attention_mask))
    u = convolved_tokens(mixer, projected.chunk(2, dim=-1)[0], attention_mask)
    size, projected = mixer.A_log.shape[1], mixer.x_proj(u)
    step, B, C = projected.split([projected.shape[-1] - 2 * size, size, size], dim=-1)
    if _norms(mixer):
        step, B, C = mixer.dt_layernorm(step), mixer.b_layernorm(B), mixer.c_layernorm(C)
    delta, bias = time_steps(mixer.dt_proj, step)
    dt = F.softplus(delta.float() if bias is None else delta.float() + bias)
    return Signals(
        u, time_of_tokens(mixer, dt, attention_mask), -mixer.A_log.float().exp(), B[:, :, None], C[:, :, None]
    )


def convolved_tokens(mixer: Any, channels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Output (B, L, I) of a mixer's convolution for channels (B, L, I), zero at padding."""
    tokens = RealFirst.of(attention_mask, channels) if _skips_padding(mixer) else None
    if tokens is None:
        return mask_padding(convolve(mixer, channels), attention_mask)
    return tokens.take_back(tokens.clear(convolve(mixer, tokens.bring(channels))))


def time_of_tokens(mixer: Any, dt: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Time steps (B, L, I), set to zero at padding for mixers that skip it."""
    return mask_padding(dt, attention_mask) if _skips_padding(mixer) else dt


def _skips_padding(mixer: Any) -> bool:
    """Whether padding leaves no trace in a mixer, as in this package's own; in transformers' it may."""
    return isinstance(mixer, CompreSSMMambaMixer | CompreSSMMamba2Mixer)


def _rank(mixer: Any) -> int:
    return innermost(mixer.dt_proj).in_features  # a quantised weight may have another shape


def _norms(mixer: Any) -> bool:
    return hasattr(mixer, "b_layernorm")


def _learned_norms(mixer: Any) -> bool:
    return _norms(mixer) and isinstance(mixer.b_layernorm.weight, nn.Parameter)


def _norm_weight(mixer: Any, name: str, size: int) -> Tensor:
    if not _learned_norms(mixer):
        return torch.ones(size, dtype=torch.float64)
    return getattr(mixer, name).weight.detach().to("cpu", torch.float64)


for _class, _field in {
    "transformers.models.mamba.modeling_mamba.MambaMixer": "state_size",
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": "state_size",
    "transformers.models.jamba.modeling_jamba.JambaMambaMixer": "mamba_d_state",
    "hf_compressm.layers.mamba.CompreSSMMambaMixer": None,
}.items():
    register_adapter(MambaAdapter(_class, _field))
