"""How many states to keep in each layer, and which.

A spectrum is a float64 tensor (N,) of Hankel singular values in descending order, one per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Selection = Literal["largest", "smallest", "random"]


@dataclass(frozen=True)
class SizeConstraints:
    """What a state size must satisfy.

    Attributes:
        minimum: fewest states a layer may be left with, >= 1.
        multiple_of: sizes are multiples of this, >= 1. A layer whose present size is not a multiple may keep it.
        uniform: all layers end with one common size. None: only where the model's class needs it.
        minimum_change: a cut takes place only where at least this share of a layer's states goes, in [0, 1).
    """

    minimum: int = 1
    multiple_of: int = 1
    uniform: bool | None = None
    minimum_change: float = 0.05

    def __post_init__(self) -> None:
        if self.minimum < 1 or self.multiple_of < 1:
            raise ValueError(
                f"minimum and multiple_of must be >= 1; got minimum={self.minimum}, multiple_of={self.multiple_of}"
            )
        if not 0 <= self.minimum_change < 1:
            raise ValueError(f"minimum_change must lie in [0, 1); got {self.minimum_change}")

    def for_uniform_layers(self) -> SizeConstraints:
        """The same for a model whose config holds one state size for all layers.

        Raises:
            ValueError: if sizes that differ were asked for by uniform=False.
        """
        if self.uniform is False:
            raise ValueError(
                "this model's config holds one state size for all layers, so uniform=False cannot be met. Leave it "
                "out, or convert the model with hf_compressm.from_stock to one with a state size per layer."
            )
        return replace(self, uniform=True)

    def apply(self, orders: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Round wanted orders up to allowed ones, and leave layers alone that would lose too little.

        Args:
            orders: wanted number of states per layer, >= 0.
            sizes: present number of states per layer.

        Raises:
            ValueError: if `uniform` is asked for and the present sizes differ.
        """
        if self.uniform and len(set(sizes)) > 1:
            raise ValueError(f"uniform=True needs layers of one common size; got sizes {list(sizes)}")
        wanted = [max(orders)] * len(orders) if self.uniform else list(orders)
        allowed = []
        for order, size in zip(wanted, sizes, strict=True):
            order = max(order, self.minimum)
            order = min(math.ceil(order / self.multiple_of) * self.multiple_of, size)
            allowed.append(order if order < size and order <= (1 - self.minimum_change) * size else size)
        return allowed


def numerical_rank(spectrum: Tensor) -> int:
    """Number of nonzero singular values of a spectrum."""
    return int((spectrum > 0).sum())


def energy_orders(spectra: Sequence[Tensor], tau: float) -> list[int]:
    """Per layer, the fewest leading states whose singular values sum to at least (1 - tau) of the layer's total.

    The plain sum of singular values counts, not that of their squares: arXiv 2510.02823, section 3.

    Args:
        spectra: per layer, float64 (N,), descending.
        tau: share of the total that may go, in (0, 1).

    Raises:
        ValueError: if tau is not in (0, 1).
    """
    if not 0 < tau < 1:
        raise ValueError(f"tau must lie strictly between 0 and 1; got {tau}")
    orders = []
    for spectrum in spectra:
        reached = spectrum.cumsum(0) >= (1 - tau) * spectrum.sum()
        orders.append(min(int((~reached).sum()) + 1, max(numerical_rank(spectrum), 1)))
    return orders


def target_orders(
    spectra: Sequence[Tensor], mean_state_size: float, constraints: SizeConstraints | None = None
) -> list[int]:
    """Share out a mean state size over the layers by water-filling their normalised spectra.

    Every spectrum is divided by its sum; one level is lowered over all layers until the states above it fill the
    budget mean_state_size * layers. A layer whose spectrum falls slowly thus gets more states. With `multiple_of`
    states are handed out in blocks, ranked by the mean of the block.

    Args:
        spectra: per layer, float64 (N,), descending.
        mean_state_size: wanted mean number of states per layer, between constraints.minimum and the present mean.

    Raises:
        ValueError: if the mean is below the minimum or above the present mean.
    """
    constraints = constraints or SizeConstraints()
    present = sum(map(len, spectra)) / len(spectra)
    if not constraints.minimum <= mean_state_size <= present:
        raise ValueError(
            f"the target mean state size must lie between the minimum {constraints.minimum} and the present mean "
            f"{present:g}; got {mean_state_size:g}"
        )
    if constraints.uniform:
        block = constraints.multiple_of
        return [max(int(mean_state_size // block) * block, constraints.minimum)] * len(spectra)

    block = constraints.multiple_of
    first = math.ceil(constraints.minimum / block) * block
    orders = [min(first, len(spectrum)) for spectrum in spectra]
    budget = round(mean_state_size * len(spectra)) - sum(orders)
    blocks = sorted(
        (
            (float(spectrum[start : start + block].mean() / spectrum.sum()), -layer, -start)
            for layer, spectrum in enumerate(spectra)
            for start in range(orders[layer], numerical_rank(spectrum), block)
        ),
        reverse=True,
    )
    for _, layer, start in blocks:
        width = min(block, len(spectra[-layer]) + start)
        if budget < width:
            break
        orders[-layer] += width
        budget -= width
    return orders


def select_states(rank: int, count: int, selection: Selection, generator: torch.Generator | None = None) -> list[int]:
    """Which `count` of `rank` balanced states (0 has the largest singular value) to keep.

    Args:
        selection: "largest" is balanced truncation; "smallest" and "random" are controls for ablations.
        generator: CPU generator, needed for "random".

    Raises:
        ValueError: on an unknown selection, or "random" without a generator.
    """
    count = min(count, rank)
    if selection == "largest":
        return list(range(count))
    if selection == "smallest":
        return list(range(rank - count, rank))
    if selection == "random":
        if generator is None:
            raise ValueError("selection 'random' needs a generator, so that a run can be repeated")
        return sorted(torch.randperm(rank, generator=generator)[:count].tolist())
    raise ValueError(f"unknown selection {selection!r}; allowed are {', '.join(get_args(Selection))}")
