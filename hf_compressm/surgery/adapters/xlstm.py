"""Adapter for transformers' xLSTM (mLSTM) layers: the best basis of rank r for the keys and queries of each head.

C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, h_t = C_t^T q_t / max(|n_t^T q_t|, 1). There is no delta
rule, and keys and queries come straight from linear layers: L k in place of k and R q in place of q fold into these,
and with R^T L = I nothing changes. The best L and R of rank r follow from the empirical Gramians as in Mamba-2. Their
product with q's factor 1/sqrt(K), which becomes 1/sqrt(r), folds into R.

Shapes: batch B, length L, G heads with keys of size K and values of size V.

Source: Beck et al., xLSTM, arXiv 2405.04517; Beck et al., xLSTM 7B, arXiv 2503.13427.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...reduction import output_residual
from ..changes import ParameterChange, Term
from .base import MixerReduction, ReductionError, register_adapter
from .matrix_states import MatrixMeasurement, MatrixStatistics, choose_basis, second_moment
from .selective import CalibratedAdapter, StateChoice, look_weights, real_tokens


class XLSTMAdapter(CalibratedAdapter):
    """Layers of transformers' xLSTM, whose config holds the size of all keys as a factor of the hidden size."""

    mixer_class = "transformers.models.xlstm.modeling_xlstm.xLSTMLayer"
    measurement_class = MatrixMeasurement
    uniform = True
    size_field = "qk_dim_factor"
    read_out = "out_proj"

    def state_size(self, mixer: Any) -> int:
        rows = mixer.q.weight.shape[0] if _separate(mixer) else (len(mixer.qkv_opreact.weight) - 2 * mixer.v_dim) // 2
        return rows // mixer.config.num_heads

    def parameter_shapes(self, mixer: Any, order: int) -> dict[str, torch.Size]:
        keys, features = order * mixer.config.num_heads, mixer.config.hidden_size
        rows = {"q": keys, "k": keys} if _separate(mixer) else {"qkv_opreact": 2 * (keys + mixer.v_dim)}
        shapes = {f"{name}.weight": torch.Size([number, features]) for name, number in rows.items()}
        if mixer.config.use_bias:
            shapes |= {f"{name}.bias": torch.Size([number]) for name, number in rows.items()}
        return shapes | {"out_proj.weight": torch.Size([features, mixer.v_dim])}

    def order_of(self, mixer: Any, shapes: Mapping[str, torch.Size]) -> int | None:
        if "q.weight" in shapes:
            return shapes["q.weight"][0] // mixer.config.num_heads
        if "qkv_opreact.weight" in shapes:
            return (shapes["qkv_opreact.weight"][0] - 2 * mixer.v_dim) // 2 // mixer.config.num_heads
        return None

    def statistics(self, mixer: Any) -> MatrixStatistics:
        return MatrixStatistics(xlstm_moments)

    def reduce_to(self, mixer: Any, measurement: MatrixMeasurement, choice: StateChoice) -> MixerReduction:
        """Change the basis of each head's keys and queries, and keep the best r of the new channels.

        Raises:
            ReductionError: if a new parameter is NaN or infinite.
        """
        pairs, residuals = [], []
        for Q, K, P in zip(measurement.Q, measurement.K, measurement.P, strict=True):
            L, R = choose_basis(Q, K, P, choice)
            pairs.append((L, R))
            residuals.append(output_residual(P, Q, L, R))
        if not all(part.isfinite().all() for pair in pairs for part in pair):
            raise ReductionError("the reduced parameters are NaN or infinite")
        return MixerReduction(self.in_basis(mixer, pairs), residual=sum(residuals) / len(residuals))

    def size_multiple(self, mixer: Any) -> int:
        """Caches of transformers round the size of all heads' keys together up to 64, and fit no other."""
        return 64 // math.gcd(64, mixer.config.num_heads)

    def check_multiple(self, mixer: Any, multiple: int) -> None:
        needed = self.size_multiple(mixer)
        if multiple % needed:
            raise ValueError(
                f"caches of transformers' xLSTM hold multiples of 64 keys of all {mixer.config.num_heads} heads "
                f"together, so the model could not generate at every multiple of {multiple}. Set "
                f"multiple_of={needed}, or leave it out."
            )

    def keep(self, mixer: Any, kept: Sequence[Sequence[int]]) -> dict[str, ParameterChange]:
        identity = torch.eye(self.state_size(mixer), dtype=torch.float64)
        return self.in_basis(mixer, [(identity[list(channels)], identity[list(channels)]) for channels in kept])

    def in_basis(self, mixer: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, ParameterChange]:
        """Parameters with L k and R q in place of the keys and queries of each head; L and R float64 (r, K)."""
        L, R = (torch.block_diag(*parts) for parts in zip(*pairs, strict=True))
        scale = math.sqrt(len(pairs[0][0]) / pairs[0][0].shape[1])
        forward, backward = {"q": scale * R, "k": L}, {"q": L / scale, "k": R}
        if not _separate(mixer):
            rest = torch.eye(2 * mixer.v_dim, dtype=torch.float64)
            forward, backward = (
                {"qkv_opreact": torch.block_diag(parts["q"], parts["k"], rest)} for parts in (forward, backward)
            )
        changes = {}
        for name in self.parameter_shapes(mixer, self.state_size(mixer)):
            layer, old = name.partition(".")[0], mixer.get_parameter(name).detach().to("cpu", torch.float64)
            rows, gradient = Term(name, left=forward.get(layer)), Term(name, left=backward.get(layer))
            changes[name] = ParameterChange(rows(old), (gradient,), rows=rows)
        return changes

    def refitted(self, mixer: Any) -> dict[str, slice]:
        return dict.fromkeys(self.parameter_shapes(mixer, self.state_size(mixer)), slice(None))

    def update_size_attributes(self, mixer: Any, order: int) -> None:
        mixer.qk_dim = order * mixer.config.num_heads
        for name in ("q", "k") if _separate(mixer) else ("qkv_opreact",):
            getattr(mixer, name).out_features = len(getattr(mixer, name).weight)

    def read_config(self, config: Any) -> list[int]:
        keys = int(config.hidden_size * config.qk_dim_factor) if hasattr(config, self.size_field) else 0
        return [keys // config.num_heads] if keys else []

    def write_config(self, config: Any, sizes: Sequence[int]) -> None:
        """The factor from which the layers compute the size of all heads' keys together, int(hidden_size * factor)."""
        keys = sizes[0] * config.num_heads
        factor = keys / config.hidden_size
        exact = int(config.hidden_size * factor) == keys  # else rounding has lost the last row
        config.qk_dim_factor = factor if exact else math.nextafter(factor, 2 * factor)


def xlstm_moments(mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Sums over tokens of q q^T, k k^T, and of what the states contribute to outputs: float64 (3, G, K, K).

    The last is (C C^T + |h|^2 n n^T) / d^2, with d what C^T q is divided by: errors of C and of n in the output h.
    """
    heads, real = mixer.config.num_heads, real_tokens(attention_mask, hidden_states)
    if _separate(mixer):
        q, k, v = (layer(hidden_states) for layer in (mixer.q, mixer.k, mixer.v))
        gates = [mixer.igate_preact(hidden_states), mixer.fgate_preact(hidden_states)]
    else:
        q, k, v, _ = mixer.qkv_opreact(hidden_states).tensor_split(
            (mixer.qk_dim, 2 * mixer.qk_dim, 2 * mixer.qk_dim + mixer.v_dim), dim=-1
        )
        gates = list(mixer.ifgate_preact(hidden_states).chunk(2, dim=-1))
    q, k, v = (part.float().unflatten(-1, (heads, -1)) for part in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    cap = mixer.config.gate_soft_cap
    write, forget = (cap * torch.tanh(gate.float() / cap) for gate in gates)
    queries, keys = (second_moment(part * real[..., None, None]) for part in (q, k))
    return torch.stack([queries, keys, _state_moment(q, k, v, write, F.logsigmoid(forget), look_weights(real))])


def _state_moment(q: Tensor, k: Tensor, v: Tensor, write: Tensor, decay: Tensor, weights: Tensor) -> Tensor:
    """The states' part of `xlstm_moments`: q, k (B, L, G, K), v (B, L, G, V), gates (B, L, G), weights (B, L)."""
    B, length, G, K = k.shape
    C, n, m = v.new_zeros(B, G, K, v.shape[-1]), v.new_zeros(B, G, K), v.new_zeros(B, G)
    total = torch.zeros(G, K, K, dtype=torch.float64, device=v.device)
    for t in range(length):
        largest = torch.maximum(decay[:, t] + m, write[:, t])
        kept, written = (decay[:, t] + m - largest).exp()[..., None], (write[:, t] - largest).exp()[..., None]
        C = kept[..., None] * C + (written * k[:, t])[..., None] * v[:, t, :, None]
        n, m = kept * n + written * k[:, t], largest
        looked = weights[:, t].nonzero()[:, 0]
        if len(looked):
            states, sums, query = C[looked], n[looked], q[looked, t]
            divisor = torch.maximum((sums * query).sum(-1).abs(), (-m[looked]).exp())[..., None]
            output = torch.einsum("bgkv,bgk->bgv", states, query) / divisor
            parts = torch.cat([states, (sums * output.norm(dim=-1, keepdim=True))[..., None]], dim=-1)
            parts = parts / divisor[..., None] * weights[looked, t, None, None, None].sqrt()
            rows = parts.permute(1, 2, 0, 3).flatten(2)
            total += (rows @ rows.mT).double()
    return total


def _separate(mixer: Any) -> bool:
    return mixer.config.weight_mode == "single"


register_adapter(XLSTMAdapter())
