"""The stability trigger: has the ranking of Hankel singular values settled?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..reduction import Balancing, DiagonalSystem, balance, match_states, rank_stability


@dataclass
class StabilityTracker:
    """Compares successive measurements of a model and counts how long the ranking has been settled.

    Attributes:
        threshold: rank stability from which two measurements agree, in (0, 1].
        streak: number of agreements in a row, up to now.
        previous: mixer name -> the balancing measured last.
    """

    threshold: float
    streak: int = 0
    previous: dict[str, Balancing] = field(default_factory=dict)

    def update(self, balancings: Mapping[str, Balancing], depths: Mapping[str, int]) -> float | None:
        """Take in a new measurement.

        Args:
            balancings: mixer name -> its balanced realisation now.
            depths: mixer name -> number of leading states whose ranking matters, those that a cut would keep.

        Returns:
            The smallest rank stability over the layers, in [0, 1], or None at the first measurement.
        """
        previous, self.previous = self.previous, dict(balancings)
        if previous.keys() != balancings.keys():
            self.streak = 0
            return None
        score = min(
            rank_stability(match_states(previous[name], balancings[name]), max(depths[name], 1)) for name in balancings
        )
        self.streak = self.streak + 1 if score >= self.threshold else 0
        return score

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which `load_state_dict` restores the tracker exactly."""
        return {
            "streak": self.streak,
            "systems": {name: tuple(b.system) for name, b in self.previous.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state saved by `state_dict`."""
        self.streak = state["streak"]
        self.previous = {name: balance(DiagonalSystem(*system)) for name, system in state["systems"].items()}
