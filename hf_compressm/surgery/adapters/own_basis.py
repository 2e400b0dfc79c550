"""What adapters share of this package's mixers with a matrix per head as state: a cut changes the basis of its rows.

Shapes: G key heads of size K, r rows of a state.

Source: the balancing basis: `reduction.interpolative`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...reduction import output_residual
from ..changes import ParameterChange, Term
from .base import MixerReduction, ReductionError
from .mamba2 import basis_changes
from .matrix_states import MatrixMeasurement, choose_basis
from .selective import CalibratedAdapter, StateChoice

Pairs = list[tuple[Tensor, Tensor]]
"""A read-in L and a read-out R, float64 (r, K), for each key head."""


class OwnBasisAdapter(CalibratedAdapter):
    """Mixers with `num_k_heads`, `head_k_dim`, `state_size` and, at a smaller size, `read_in` and `read_out`."""

    measurement_class: Any = MatrixMeasurement
    read_out = "out_proj"

    def state_size(self, mixer: Any) -> int:
        return mixer.state_size

    def parameter_shapes(self, mixer: Any, order: int) -> dict[str, torch.Size]:
        shapes = {"out_proj.weight": mixer.get_submodule("out_proj").weight.shape}
        if order < mixer.head_k_dim:
            shapes |= dict.fromkeys(("read_in", "read_out"), torch.Size([mixer.num_k_heads, order, mixer.head_k_dim]))
        return shapes

    def order_of(self, mixer: Any, shapes: Mapping[str, torch.Size]) -> int | None:
        if len(shapes.get("read_in", ())) == 3:
            return shapes["read_in"][1]
        return mixer.head_k_dim if "norm.weight" in shapes else None

    def pairs(self, measurement: Any, choice: StateChoice) -> Pairs:
        """L and R of each key head, from the basis that balances its states and queries."""
        moments = zip(measurement.Q, measurement.K, measurement.P, strict=True)
        return [choose_basis(Q, K, P, choice) for Q, K, P in moments]

    def reduce_to(self, mixer: Any, measurement: Any, choice: StateChoice) -> MixerReduction:
        """Change the basis of each key head's states, and keep the best r of the new rows.

        Raises:
            ReductionError: if a new parameter is NaN or infinite.
        """
        pairs = self.pairs(measurement, choice)
        moments = zip(measurement.P, measurement.Q, pairs, strict=True)
        residuals = [output_residual(P, Q, *pair) for P, Q, pair in moments]
        read_in, read_out = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        if not (read_in.isfinite().all() and read_out.isfinite().all()):
            raise ReductionError("the reduced parameters are NaN or infinite")
        return MixerReduction(_changes(mixer, read_in, read_out), residual=sum(residuals) / len(residuals))

    def keep(self, mixer: Any, kept: Sequence[Sequence[int]]) -> dict[str, ParameterChange]:
        rows = torch.eye(mixer.state_size, dtype=torch.float64)[torch.tensor([list(chosen) for chosen in kept])]
        return _changes(mixer, rows, rows)

    def refitted(self, mixer: Any) -> dict[str, slice]:
        return dict.fromkeys(("read_in", "read_out"), slice(None))


def _changes(mixer: Any, read_in: Tensor, read_out: Tensor) -> dict[str, ParameterChange]:
    same = Term("out_proj.weight")
    weight = mixer.get_parameter("out_proj.weight").detach().cpu()
    return basis_changes(mixer, read_in, read_out) | {"out_proj.weight": ParameterChange(weight, (same,), rows=same)}
