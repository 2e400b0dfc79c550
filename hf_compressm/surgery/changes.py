"""The change of one parameter in a cut: its new value, and the linear map from old gradients to new ones.

If the loss depends on old parameters p and the reduced model behaves like p ~ M q for new parameters q, then the
gradient with respect to q is M^T times that with respect to p. Optimizer moments are averages of gradients and of
their squares, so they follow the same map: first moments through M^T, second moments through its squared entries
(exact for uncorrelated gradient entries).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One summand of a gradient map: scale * contract * (left @ old[rows] @ right).

    Attributes:
        source: name of the old parameter, within its mixer, whose gradient enters.
        left: real (new rows, old rows), acting on the first axis; or (blocks, new rows, old rows), acting on the second
            axis of an old parameter (blocks, old rows, columns), block by block; None for the identity.
        right: real (old columns, new columns) acting on the last axis, or one such matrix per block; None for the
            identity.
        contract: real, shaped like the product, or None. When given, the product is weighted by it and its last axis is
            summed: the gradient of a scale that multiplies a whole row.
        rows: int64, which entries of the first axis enter; None for all.
        scale: a factor for everything.
    """

    source: str
    left: Tensor | None = None
    right: Tensor | None = None
    contract: Tensor | None = None
    rows: Tensor | None = None
    scale: float = 1.0

    def __call__(self, old: Tensor) -> Tensor:
        """Apply the map to a tensor (old shape); gives (new shape)."""
        return self._apply(old, lambda factor: factor, self.scale)

    def squared(self, old: Tensor) -> Tensor:
        """Apply the map with every entry squared to a tensor (old shape), as second moments transform."""
        return self._apply(old, lambda factor: factor.square(), self.scale**2)

    def _apply(self, old: Tensor, entry: Callable[[Tensor], Tensor], scale: float) -> Tensor:
        result = old if self.rows is None else old.index_select(0, self.rows.to(old.device))
        if self.left is not None:
            left = entry(self.left.to(old))
            result = left @ result if left.ndim == 3 else torch.tensordot(left, result, dims=1)
        result = result if self.right is None else result @ entry(self.right.to(old))
        result = result if self.contract is None else (entry(self.contract.to(old)) * result).sum(-1)
        return result if scale == 1 else scale * result


@dataclass(frozen=True)
class ParameterChange:
    """A parameter's new value, and the map from the old gradients of the same mixer to its own.

    Attributes:
        value: new value, any shape; it takes the dtype and device of the parameter it replaces.
        gradient: terms whose sum is the new gradient.
        rows: how the rows of a weight are mapped to those of its value, a refit aside: what LoRA adds to the weight
            is mapped likewise. None where no linear layer holds the parameter.
    """

    value: Tensor
    gradient: tuple[Term, ...]
    rows: Term | None = None

    def map_first(self, old: Mapping[str, Tensor]) -> Tensor:
        """New gradient or first moment, (new shape), from old ones (old shape) by parameter name."""
        return self._sum(old, Term.__call__)

    def map_second(self, old: Mapping[str, Tensor]) -> Tensor:
        """New second moment, (new shape), from old ones (old shape) by parameter name."""
        return self._sum(old, Term.squared)

    def _sum(self, old: Mapping[str, Tensor], apply: Callable[[Term, Tensor], Tensor]) -> Tensor:
        first, *rest = self.gradient
        total = apply(first, old[first.source])
        for term in rest:
            total = total + apply(term, old[term.source])
        return total
