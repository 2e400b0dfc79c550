"""Order policies: they choose, from the spectra of all layers, how many states each layer keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..reduction import SizeConstraints, energy_orders, numerical_rank, target_orders


@dataclass(frozen=True)
class Question:
    """What a policy is asked.

    Attributes:
        spectra: per layer, the Hankel singular values of all N states, float64 (N,), descending.
        original: per layer, the number of states before the first cut, >= 1.
        constraints: what a state size must satisfy.
        attempts_left: number of cuts, this one included, in which the goal is to be reached, >= 1.
    """

    spectra: Sequence[Tensor]
    original: Sequence[int]
    constraints: SizeConstraints
    attempts_left: int = 1


class OrderPolicy(ABC):
    """Chooses the number of states of every layer."""

    @abstractmethod
    def answer(self, asked: Question) -> list[int]:
        """Wanted orders, one per layer, before constraints."""

    def orders(
        self,
        spectra: Sequence[Tensor],
        original: Sequence[int],
        constraints: SizeConstraints,
        attempts_left: int = 1,
    ) -> list[int]:
        """Wanted orders, one per layer, before constraints. Arguments as in `Question`: spectra float64 (N,)."""
        return self.answer(Question(spectra, original, constraints, attempts_left))


@dataclass(frozen=True)
class Energy(OrderPolicy):
    """Keep the fewest states whose singular values sum to at least (1 - tau) of the layer's total.

    Attributes:
        tau: share of the sum of Hankel singular values that may go at each cut, in (0, 1).
    """

    tau: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.tau < 1:
            raise ValueError(f"tau must lie strictly between 0 and 1; got {self.tau}")

    def answer(self, asked: Question) -> list[int]:
        """The fewest states that keep the share."""
        return energy_orders(asked.spectra, self.tau)


@dataclass(frozen=True)
class Target(OrderPolicy):
    """Reach a mean state size over all layers, shared out by how slowly each layer's spectrum falls.

    Attributes:
        mean_state_size: states per layer on average at the end, >= 1.
    """

    mean_state_size: float

    def __post_init__(self) -> None:
        if self.mean_state_size < 1:
            raise ValueError(f"the target state size must be at least 1; got {self.mean_state_size}")

    def answer(self, asked: Question) -> list[int]:
        """Orders with the wanted mean. With several attempts left, each shrinks the mean by the same factor.

        Where a runtime says which sizes are allowed, the goal is the largest of them that the mean does not exceed.
        """
        present = sum(map(len, asked.spectra)) / len(asked.spectra)
        goal = self.mean_state_size
        if (allowed := asked.constraints.allowed) is not None:
            goal = max((size for size in allowed if size <= goal), default=present)
        if goal >= present:
            return [len(spectrum) for spectrum in asked.spectra]
        step = present * (goal / present) ** (1 / asked.attempts_left)
        return target_orders(asked.spectra, max(step, asked.constraints.minimum), asked.constraints)


@dataclass(frozen=True)
class Fraction(OrderPolicy):
    """Keep, in every layer alike, a share of the states that training began with.

    Attributes:
        share: share of the original number of states to keep at the end, in (0, 1).
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"the fraction to keep must lie strictly between 0 and 1; got {self.share}")

    def answer(self, asked: Question) -> list[int]:
        """The share of each layer's states. With several attempts left, each shrinks a layer by the same factor."""
        orders = []
        for spectrum, begun in zip(asked.spectra, asked.original, strict=True):
            present, final = len(spectrum), max(math.ceil(self.share * begun - 1e-9), 1)
            step = math.ceil(present * (final / present) ** (1 / asked.attempts_left) - 1e-9)
            orders.append(min(step, present, max(numerical_rank(spectrum), 1)))
        return orders


Policy = Energy | Target | Fraction


def choose_policy(
    tau: float | None = None,
    target: float | None = None,
    fraction: float | None = None,
    names: Sequence[str] = ("tau", "target_state_size", "keep_fraction"),
) -> Policy | None:
    """Return the policy that the one given amount asks for; None if none is given.

    Args:
        tau: as of `Energy`.
        target: as of `Target`.
        fraction: as of `Fraction`.
        names: how the three are called where they are given, for the message.

    Raises:
        ValueError: if several are given, or one is out of its range.
    """
    given = {Energy: tau, Target: target, Fraction: fraction}
    chosen: list[Policy] = [policy(value) for policy, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise ValueError(f"give exactly one of {names[0]}, {names[1]} and {names[2]}, not several")
    return chosen[0] if chosen else None


def check_target(policy: Policy | None, sizes: Sequence[float], minimum: int = 1) -> None:
    """Refuse a target that no cut can reach.

    Args:
        policy: any; only a `Target` is checked.
        sizes: present number of states of each layer.
        minimum: smallest number of states that a layer may keep.

    Raises:
        ValueError: if the target is not below the present mean, or is below the minimum.
    """
    if not isinstance(policy, Target):
        return
    target, mean = policy.mean_state_size, sum(sizes) / len(sizes)
    if target >= mean:
        raise ValueError(
            f"target_state_size is {target:g}, but the model has only {mean:g} states per layer ({list(sizes)}). "
            "Choose a smaller target, or a larger model."
        )
    if target < minimum:
        raise ValueError(f"target_state_size is {target:g}, below min_state_size, {minimum}. Choose a larger target.")


def describe_policy(policy: Policy) -> dict[str, Any]:
    """JSON-ready name and settings of a policy."""
    return {"policy": type(policy).__name__.lower(), **asdict(policy)}
