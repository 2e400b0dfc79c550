"""Choose how many states to keep in each layer, and which.

A spectrum is a float64 tensor (N,) of Hankel singular values in descending order, one per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

Selection = Literal["largest", "smallest", "random"]


@dataclass(frozen=True)
class SizeConstraints:
    """What a state size must satisfy.

    Attributes:
        minimum: fewest states a layer may be left with, >= 1.
        multiple_of: sizes are multiples of this, >= 1. A layer whose present size is not a multiple may keep it. None:
            what the model's mixers prefer, 1 for most.
        uniform: all layers end with one common size. None: only where the model's class needs it.
        minimum_change: a cut takes place only where at least this share of a layer's states goes, in [0, 1).
        tied: groups of layers, by index, each of which ends with one common size; filled in for configs that hold one
            size for several layers.
        sizes_for: name of the runtime that is to run the result, such as "llama.cpp": layers end with numbers of states
            that it takes, or keep their own until a cut can reach one. In place of multiple_of.
        allowed: those numbers, ascending; filled in for the model. None: no such limit.
    """

    minimum: int = 1
    multiple_of: int | None = None
    uniform: bool | None = None
    minimum_change: float = 0.05
    tied: tuple[tuple[int, ...], ...] = ()
    sizes_for: str | None = None
    allowed: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.minimum < 1 or self.block < 1:
            raise ValueError(
                f"minimum and multiple_of must be >= 1; got minimum={self.minimum}, multiple_of={self.multiple_of}"
            )
        if not 0 <= self.minimum_change < 1:
            raise ValueError(f"minimum_change must lie in [0, 1); got {self.minimum_change}")
        if self.sizes_for is not None and self.multiple_of is not None and self.allowed is None:
            raise ValueError(
                f"sizes_for={self.sizes_for!r} says which state sizes are allowed, so multiple_of={self.multiple_of} "
                "has no place beside it; leave one of them out"
            )

    @property
    def block(self) -> int:
        """Sizes are multiples of this, >= 1."""
        return 1 if self.multiple_of is None else self.multiple_of

    def for_uniform_layers(self, groups: Sequence[Sequence[int]]) -> SizeConstraints:
        """The same for layers of which a config holds one state size for each of these groups.

        Raises:
            ValueError: if sizes that differ were asked for by uniform=False.
        """
        if self.uniform is False and any(len(group) > 1 for group in groups):
            raise ValueError(
                "this model's config holds one state size for all layers, so uniform=False cannot be met. Leave it "
                "out, or convert the model with hf_compressm.from_stock to one with a state size per layer."
            )
        return replace(self, tied=(*self.tied, *map(tuple, groups)))

    def groups(self, count: int) -> list[tuple[int, ...]]:
        """Which of `count` layers end with a common size: every layer is in exactly one of the groups."""
        if self.uniform:
            return [tuple(range(count))]
        member = {layer: group for group in self.tied for layer in group}
        return list(dict.fromkeys(member.get(layer, (layer,)) for layer in range(count)))

    def round_up(self, order: int, size: int) -> int:
        """The smallest allowed number of states that is at least `order`; the present `size` if there is none."""
        if self.allowed is None:
            return min(math.ceil(order / self.block) * self.block, size)
        return next((found for found in self.allowed if order <= found < size), size)

    def starts(self, first: int, size: int) -> list[int]:
        """Numbers of states in [first, size) from which a layer of `size` states may grow to the next allowed one."""
        if self.allowed is None:
            return list(range(first, size, self.block))
        return [found for found in self.allowed if first <= found < size]

    def apply(self, orders: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Round wanted orders up to allowed ones, and leave layers alone that would lose too little.

        Args:
            orders: wanted number of states per layer, >= 0.
            sizes: present number of states per layer.

        Raises:
            ValueError: if layers are to have a common size and their present sizes differ.
        """
        allowed = list(sizes)
        for group in self.groups(len(sizes)):
            if len(present := {sizes[layer] for layer in group}) > 1:
                what = "uniform=True" if self.uniform else "a config that holds one size for several layers"
                found = [sizes[layer] for layer in group]
                raise ValueError(f"{what} needs layers of one common size; got sizes {found}")
            size, order = present.pop(), max(self.minimum, *(orders[layer] for layer in group))
            order = self.round_up(order, size)
            if order < size and order <= (1 - self.minimum_change) * size:
                for layer in group:
                    allowed[layer] = order
        return allowed


def numerical_rank(spectrum: Tensor) -> int:
    """Number of nonzero singular values of a spectrum (N,)."""
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
    states are handed out in blocks, ranked by the mean of the block. Layers that share a size get them together, ranked
    by the mean over these layers.

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
    block, groups = constraints.block, constraints.groups(len(spectra))
    if len(groups) == 1 and (constraints.uniform or constraints.tied):
        if constraints.allowed is not None:
            return [constraints.round_up(math.ceil(mean_state_size - 1e-9), len(spectra[0]))] * len(spectra)
        return [max(int(mean_state_size // block) * block, constraints.minimum)] * len(spectra)

    orders = [constraints.round_up(constraints.minimum, len(spectrum)) for spectrum in spectra]
    budget = round(mean_state_size * len(spectra)) - sum(orders)
    blocks = sorted(
        (
            (sum(_share(spectra[layer], start, end) for layer in group) / len(group), -index, -start, end - start)
            for index, group in enumerate(groups)
            for start, end in _steps(constraints, orders[group[0]], [spectra[layer] for layer in group])
        ),
        reverse=True,
    )
    for _, index, _, width in blocks:
        group = groups[-index]
        if budget < width * len(group):
            break
        for layer in group:
            orders[layer] += width
        budget -= width * len(group)
    return orders


def _steps(constraints: SizeConstraints, first: int, spectra: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Numbers of states between which layers of one size may grow, from `first` on, as (from, to)."""
    size, rank = len(spectra[0]), max(map(numerical_rank, spectra))
    return [(start, end) for start, end in pairwise([*constraints.starts(first, size), size]) if start < rank]


def _share(spectrum: Tensor, start: int, end: int) -> float:
    """Mean of singular values [start, end) as a share of the spectrum's sum."""
    return float(spectrum[start:end].mean() / spectrum.sum())


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
