"""The stability trigger: cut once the ranking of Hankel singular values has settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..surgery import Measurement, find_mixers, history


class NotSettledError(Exception):
    """The ranking has not settled yet, so there is no plan to make."""


@dataclass
class StabilityTracker:
    """Compares successive measurements of a model and counts how long the ranking has been settled.

    Attributes:
        threshold: rank stability from which two measurements agree, in (0, 1].
        streak: number of agreements in a row, up to now.
        previous: mixer name -> its measurement last time.
    """

    threshold: float
    streak: int = 0
    previous: dict[str, Measurement] = field(default_factory=dict)

    def update(self, measurements: Mapping[str, Measurement], depths: Mapping[str, int]) -> float | None:
        """Compare a new measurement with the last one.

        Args:
            measurements: mixer name -> its measurement now.
            depths: mixer name -> number of leading states whose ranking matters, those that a cut would keep.

        Returns:
            The smallest rank stability over the layers, in [0, 1], or None at the first measurement.
        """
        previous, self.previous = self.previous, dict(measurements)
        if previous.keys() != measurements.keys():
            self.streak = 0
            return None
        score = min(
            measurement.agreement(previous[name], max(depths[name], 1)) for name, measurement in measurements.items()
        )
        self.streak = self.streak + 1 if score >= self.threshold else 0
        return score

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which `load_state_dict` restores the tracker exactly."""
        return {"streak": self.streak, "measurements": {n: m.state_dict() for n, m in self.previous.items()}}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Restore a state saved by `state_dict`, for a model with the same mixers.

        Raises:
            ValueError: if a measurement is of a mixer that the model does not have, or of another number of states.
        """
        sites = {site.name: site for site in find_mixers(model)}
        if foreign := state["measurements"].keys() - sites.keys():
            raise ValueError(f"it ranks the states of {sorted(foreign)[0]}, which the model does not have")
        self.streak = state["streak"]
        self.previous = {name: sites[name].adapter.load_measurement(m) for name, m in state["measurements"].items()}
        for name, measurement in self.previous.items():
            found, expected = len(measurement.spectrum()), sites[name].state_size
            if found != expected and not history(model):  # after the cut it is not used any more
                raise ValueError(f"it ranks {found} states of {name}, which has {expected}")
