"""The interface of adapters, their registry, and the search for the mixers of a model.

To support a new architecture, subclass `MixerAdapter` for its mixer class and call `register_adapter` with an
instance. Nothing else in the library needs to know. Source: arXiv 2510.02823 for cuts while training.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...models.fast_ops import mixer_class
from ...reduction import Selection
from ..changes import ParameterChange
from ..peft.lora import changes_with_lora, mixer_without_lora
from ..peft.tuners import has_tuners, place, with_followers
from ..wrappers import class_name, plain_name

Mixer = TypeVar("Mixer", bound=nn.Module)


class ReductionError(RuntimeError):
    """A layer could not be measured or reduced: NaN or infinite weights, an unstable pole, a result off its target."""


class Measurement(Protocol):
    """Result of measuring one mixer. Only its adapter knows more of it than these methods."""

    def spectrum(self) -> Tensor:
        """Hankel singular values of all N states, float64 (N,), descending."""
        ...

    def agreement(self, previous: Any, depth: int) -> float:
        """Agreement of the ranking of the `depth` leading states with an earlier measurement, in [0, 1]."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of any shape from which the adapter's `load_measurement` makes an equal measurement."""
        ...


class Statistics(Protocol):
    """Statistics of one mixer, gathered while calibration batches pass through the model.

    They are sums over tokens in accumulators of fixed size, so that memory does not grow with the number of batches.
    """

    tokens: int

    def observe(self, mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> None:
        """Add one batch of a mixer's inputs: (B, L, H), and a mask (B, L) with 0 for padding."""
        ...

    def sum_with(self, all_reduce: Callable[[Tensor], Any]) -> None:
        """Sum everything over processes, in place. `all_reduce` does so for one tensor of any shape."""
        ...


@dataclass(frozen=True)
class MixerReduction:
    """A mixer's parameters at a smaller order.

    Attributes:
        changes: by parameter name within the mixer.
        bound: H-infinity bound on the change of the mixer's input-output map, or None where no bound is known.
        residual: estimated share of the read-out's energy that is lost, >= 0, or None where a bound is known instead.
    """

    changes: dict[str, ParameterChange]
    bound: float | None = None
    residual: float | None = None


class MixerAdapter(ABC, Generic[Mixer]):
    """Measures and reduces mixers of one class. Stateless: one instance serves all mixers of its class.

    Attributes:
        mixer_class: the class, or its full name "module.Class", so that its module need not be imported.
        size_field: name of the config's field that holds the state sizes.
        uniform: True where one number in that field is the state size of all layers, False where it is a list.
        read_out: name of the linear layer that makes the mixer's output, which a refit solves for in closed form; its
            weight is among the parameters that a cut replaces. None where a refit leaves it alone.
        values: adapter of the mixers' value channels, of which `state_size` is the number; see `compress`, value_size.
            None where values have no size of their own.
        dynamics: names of parameters that want a learning rate of their own and no weight decay; see
            `training.create_optimizer`.
    """

    mixer_class: type[Mixer] | str
    size_field: str = "state_sizes"
    uniform: bool = False
    read_out: str | None = None
    values: MixerAdapter | None = None
    dynamics: tuple[str, ...] = ()

    @abstractmethod
    def state_size(self, mixer: Mixer) -> int:
        """Present number of states N."""

    @abstractmethod
    def parameter_shapes(self, mixer: Mixer, order: int) -> dict[str, torch.Size]:
        """Shape of every parameter that a cut replaces, by name within the mixer, for N = order >= 1.

        A parameter that exists at some orders only is named at those.
        """

    @abstractmethod
    def order_of(self, mixer: Mixer, shapes: Mapping[str, torch.Size]) -> int | None:
        """The number of states that follows from a checkpoint's shapes, by name within the mixer; None if none does."""

    def statistics(self, mixer: Mixer) -> Statistics | None:
        """An empty accumulator for statistics over calibration batches; None if `measure` needs the weights only."""
        return None

    @abstractmethod
    def measure(self, mixer: Mixer, statistics: Any = None) -> Measurement:
        """Hankel singular values and whatever `reduce` needs.

        Args:
            mixer: the mixer.
            statistics: what was gathered, where `statistics` asked for it.

        Raises:
            ReductionError: if the mixer cannot be measured; the message names the quantity that is at fault.
        """

    @abstractmethod
    def load_measurement(self, state: Mapping[str, Tensor]) -> Measurement:
        """A measurement from the tensors of its `state_dict`, of the shapes that it gave them."""

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

    def keep(self, mixer: Mixer, kept: Sequence[Sequence[int]]) -> dict[str, ParameterChange]:
        """Changes that keep single states as they are and drop the others, by parameter name within the mixer.

        Needed for cuts by a score, such as `baselines.rival_cut`; `reduce` does without.

        Args:
            mixer: the mixer, which is not changed.
            kept: indices in [0, N) of the states to keep, for each group of channels that has states of its own.

        Raises:
            NotImplementedError: if the adapter does not say how.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot keep single states: give it a method keep(mixer, kept) that returns a "
            "ParameterChange by parameter name; see MambaAdapter.keep"
        )

    def refitted(self, mixer: Mixer) -> dict[str, slice]:
        """Rows of parameters, by parameter name, that a refit on calibration data may change; none by default."""
        return {}

    def update_size_attributes(self, mixer: Mixer, order: int) -> None:
        """Write N = order to the mixer's attributes that depend on it, if any. Its parameters have it already."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "resized" in vars(cls):
            message = f"{cls.__name__}.resized is now update_size_attributes"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            cls.update_size_attributes = vars(cls)["resized"]  # type: ignore[method-assign]

    def size_multiple(self, mixer: Mixer) -> int:
        """State sizes of this mixer are multiples of this, >= 1, where the caller asks for none of their own."""
        return 1

    def check_multiple(self, mixer: Mixer, multiple: int) -> None:
        """Raise ValueError if a smaller size that is a multiple of this, >= 1, cannot be run by kernels or caches."""

    def read_config(self, config: Any) -> list[int]:
        """State sizes that a config names, one where it holds one for all layers; empty if it names none."""
        found = getattr(config, self.size_field, None)
        return list(found) if isinstance(found, list | tuple) else [found] if found else []

    def write_config(self, config: Any, sizes: Sequence[int]) -> None:
        """Write the state sizes of all mixers of this class, in model order, to the config that describes them."""
        setattr(config, self.size_field, sizes[0] if self.uniform else list(sizes))


@dataclass(frozen=True)
class MixerSite:
    """A compressible mixer of a model: its name there, the mixer, and its adapter."""

    name: str
    mixer: nn.Module
    adapter: MixerAdapter

    @property
    def state_size(self) -> int:
        """Present number of states N."""
        return self.adapter.state_size(self.mixer)

    @property
    def frozen_read_out(self) -> str | None:
        """Name of the read-out's weight if it alone was meant to stay: it is frozen, beside parameters that are not.

        A cut as such does not change it, and a refit then leaves it too. A mixer that is frozen as a whole is refitted
        as a whole, and so is one with adapters of PEFT, which freezes on purpose.
        """
        if self.adapter.read_out is None or has_tuners(self.mixer):
            return None
        weight = self.mixer.get_submodule(self.adapter.read_out).weight
        alone = any(parameter.requires_grad for parameter in self.mixer.parameters())
        return f"{self.adapter.read_out}.weight" if alone and not weight.requires_grad else None

    def shapes(self, order: int) -> dict[str, torch.Size]:
        """The adapter's `parameter_shapes`, and the shapes of LoRA's parameters around these that change with them."""
        return with_followers(self.mixer, self.adapter.parameter_shapes(self.mixer, order))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that a cut replaces, LoRA's included, by name within the mixer without PEFT."""
        places = {name: place(self.mixer, name) for name in self.shapes(self.state_size)}
        return {name: owner.get_parameter(attribute) for name, (owner, attribute) in places.items()}

    def without_lora(self) -> MixerSite:
        """The same site with a mixer that computes the same without LoRA; see `mixer_without_lora`."""
        names = self.adapter.parameter_shapes(self.mixer, self.state_size)
        return replace(self, mixer=mixer_without_lora(self.mixer, names))

    def with_lora(self, reduction: MixerReduction) -> MixerReduction:
        """A reduction of `without_lora()` as one of this mixer; see `changes_with_lora`.

        Raises:
            ValueError: if the adapter does not say how rows of a weight with LoRA are mapped.
        """
        try:
            return replace(reduction, changes=changes_with_lora(self.mixer, reduction.changes))
        except ValueError as error:
            raise ValueError(f"{self.name}.{error}") from error


_ADAPTERS: dict[str, MixerAdapter] = {}
_REFUSED: dict[str, str] = {}


def register_adapter(adapter: MixerAdapter) -> None:
    """Make mixers of `adapter.mixer_class` compressible. A later adapter for the same class replaces an earlier one."""
    _ADAPTERS[_full_name(adapter.mixer_class)] = adapter


def register_subclass(mixer_class: type[nn.Module]) -> None:
    """Use the adapter of the nearest supported parent for a mixer class whose parameters mean what the parent's do.

    Raises:
        ValueError: if no parent has an adapter.
    """
    parent = _served_parent(mixer_class)
    if parent is None:
        raise ValueError(
            f"{_full_name(mixer_class)} is a subclass of none of the supported mixer classes: "
            f"{', '.join(supported_mixers())}. Write an adapter for it, and pass it to register_adapter."
        )
    # The same instance, so that a config with one size per layer gets those of both classes in model order.
    _ADAPTERS[_full_name(mixer_class)] = _ADAPTERS[parent]


def register_refusal(mixer_class: type[nn.Module] | str, reason: str) -> None:
    """Give the reason why mixers of a class cannot be compressed. A model with no other mixers is refused with it.

    In a model with other mixers they are not changed.
    """
    _REFUSED[_full_name(mixer_class)] = reason


def supported_mixers() -> list[str]:
    """Full names of the mixer classes that have an adapter."""
    return sorted(_ADAPTERS)


def config_adapter(config: Any) -> MixerAdapter | None:
    """Return the adapter whose field of sizes a config has, that of sizes per layer first; None if it has none."""
    adapters = sorted(_ADAPTERS.values(), key=lambda adapter: adapter.size_field != MixerAdapter.size_field)
    return next((adapter for adapter in adapters if adapter.read_config(config)), None)


def sizes_in_config(config: Any) -> list[int]:
    """State sizes that a config names, a list of sizes per layer before a single number; empty if it names none."""
    adapter = config_adapter(config)
    return [] if adapter is None else adapter.read_config(config)


def refused_mixers() -> dict[str, str]:
    """Why mixers of classes without an adapter cannot be compressed, by full name of the class."""
    return dict(_REFUSED)


def find_mixers(model: nn.Module) -> list[MixerSite]:
    """All compressible mixers of a model, in the order of `named_modules`.

    Raises:
        ValueError: if there is none, or one of a class that no adapter serves but for a parent; the message says why,
            and lists what is supported and how to add to it.
    """
    named = [(plain_name(name), module) for name, module in model.named_modules()]
    modules = [(name, module, _full_name(mixer_class(module))) for name, module in named]
    sites = [MixerSite(name, module, _ADAPTERS[cls]) for name, module, cls in modules if cls in _ADAPTERS]
    _check_subclasses(model)
    if not sites:
        reasons = sorted({f" {cls.rpartition('.')[2]}: {_REFUSED[cls]}" for _, _, cls in modules if cls in _REFUSED})
        raise ValueError(
            f"{class_name(model)} has no layer that can be compressed.{''.join(reasons)} Supported mixer classes: "
            f"{', '.join(supported_mixers())}. For another class, subclass hf_compressm.surgery.MixerAdapter and "
            "pass an instance to hf_compressm.surgery.register_adapter."
        )
    return sites


def _check_subclasses(model: nn.Module) -> None:
    """Raise if a mixer is a subclass of a supported one: it would keep its size while the config gives that of all."""
    for cls in dict.fromkeys(map(mixer_class, model.modules())):
        parent = _served_parent(cls)
        if parent is not None and not {*_ADAPTERS, *_REFUSED} & {_full_name(cls)}:
            raise ValueError(
                f"{class_name(model)} has layers of the class {_full_name(cls)}, a subclass of {parent}. An adapter "
                "serves exactly its class, since a subclass may compute something else. If this one uses its parent's "
                f"parameters as the parent does, call hf_compressm.surgery.register_subclass({cls.__name__}); if not, "
                "pass an adapter of its own to register_adapter, or the reason to leave it alone to register_refusal."
            )


def _served_parent(cls: type) -> str | None:
    """The nearest base class that has an adapter."""
    return next((name for name in map(_full_name, cls.__mro__[1:]) if name in _ADAPTERS), None)


def _full_name(cls: type[nn.Module] | str) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def state_sizes(model: nn.Module) -> list[int]:
    """Present number of states of every compressible mixer, in model order, read from the parameters themselves."""
    return [site.state_size for site in find_mixers(model)]
