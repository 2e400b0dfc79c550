"""One adapter per mixer class: how to measure its states, and how to make it smaller.

To support a new architecture, subclass `MixerAdapter` for its mixer class and call `register_adapter` with an
instance. Nothing else in the library needs to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..reduction import Selection
from .changes import ParameterChange

Mixer = TypeVar("Mixer", bound=nn.Module)


class ReductionError(RuntimeError):
    """A layer could not be measured or reduced: NaN or infinite weights, an unstable pole, a result off its target."""


class Measurement(Protocol):
    """What an adapter learnt about one mixer; opaque to everyone else but for the spectrum."""

    def spectrum(self) -> Tensor:
        """Hankel singular values of all N states, float64 (N,), descending."""
        ...


@dataclass(frozen=True)
class MixerReduction:
    """A mixer's parameters at a smaller order.

    Attributes:
        changes: by parameter name within the mixer.
        bound: H-infinity bound on the change of the mixer's input-output map, or None where no bound is known.
    """

    changes: dict[str, ParameterChange]
    bound: float | None


class MixerAdapter(ABC, Generic[Mixer]):
    """Knows one mixer class. Stateless: one instance serves all mixers of its class."""

    mixer_class: type[Mixer]

    @abstractmethod
    def state_size(self, mixer: Mixer) -> int:
        """Present number of states N."""

    @abstractmethod
    def parameter_shapes(self, mixer: Mixer, order: int) -> dict[str, torch.Size]:
        """Shape of every parameter that depends on the number of states, by name, for N = order."""

    @abstractmethod
    def order_of(self, shapes: Mapping[str, torch.Size]) -> int | None:
        """The number of states that a checkpoint's shapes speak of; None if no shape given tells."""

    @abstractmethod
    def measure(self, mixer: Mixer) -> Measurement:
        """Hankel singular values and whatever `reduce` needs.

        Raises:
            ReductionError: if the mixer cannot be measured; the message names the quantity that is at fault.
        """

    @abstractmethod
    def reduce(
        self,
        mixer: Mixer,
        measurement: Any,
        order: int,
        selection: Selection = "largest",
        generator: torch.Generator | None = None,
    ) -> MixerReduction:
        """New parameters at 1 <= order < N, without touching the mixer.

        Raises:
            ReductionError: if the reduced parameters do not reproduce the reduced system.
        """

    def resized(self, mixer: Mixer, order: int) -> None:
        """Update the mixer's attributes that hold the state size, if it has any."""

    @abstractmethod
    def write_config(self, config: Any, sizes: Sequence[int]) -> None:
        """Write the state sizes of all mixers of this class, in model order, to the model's config."""


@dataclass(frozen=True)
class MixerSite:
    """A compressible mixer's place in a model."""

    name: str
    mixer: nn.Module
    adapter: MixerAdapter

    @property
    def state_size(self) -> int:
        return self.adapter.state_size(self.mixer)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a cut replaces, by name within the mixer."""
        return {name: getattr(self.mixer, name) for name in self.adapter.parameter_shapes(self.mixer, self.state_size)}


_ADAPTERS: dict[type[nn.Module], MixerAdapter] = {}


def register_adapter(adapter: MixerAdapter) -> None:
    """Make mixers of `adapter.mixer_class` compressible. A later adapter for the same class replaces an earlier one."""
    _ADAPTERS[adapter.mixer_class] = adapter


def supported_mixers() -> list[str]:
    """Full names of the mixer classes that have an adapter."""
    return sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in _ADAPTERS)


def find_mixers(model: nn.Module) -> list[MixerSite]:
    """All compressible mixers of a model, in the order of `named_modules`.

    Raises:
        ValueError: if there is none; the message lists what is supported and how to add to it.
    """
    sites = [
        MixerSite(name, module, _ADAPTERS[type(module)])
        for name, module in model.named_modules()
        if type(module) in _ADAPTERS
    ]
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no layer that can be compressed. Supported mixer classes: "
            f"{', '.join(supported_mixers())}. For another class, subclass hf_compressm.surgery.MixerAdapter and "
            "pass an instance to hf_compressm.surgery.register_adapter."
        )
    return sites


def state_sizes(model: nn.Module) -> list[int]:
    """Present number of states of every compressible mixer, in model order, read from the parameters themselves."""
    return [site.state_size for site in find_mixers(model)]


def write_sizes_to_config(model: nn.Module, sites: Sequence[MixerSite]) -> None:
    """Bring `model.config` in line with the live parameters."""
    config = getattr(model, "config", None)
    if config is None:
        return
    for adapter in {id(site.adapter): site.adapter for site in sites}.values():
        adapter.write_config(config, [site.state_size for site in sites if site.adapter is adapter])
