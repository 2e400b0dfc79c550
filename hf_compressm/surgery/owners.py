"""Find the config that describes each mixer: it holds the state size and the history of cuts.

A mixer belongs to the nearest module with a config: its model, or the language model within a larger one. A config that
several modules share, or of which an outer config holds a copy, is one owner. A mixer with no config above it remembers
by itself.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.runtimes import runtime_sizes
from ..reduction import SizeConstraints
from .adapters.base import MixerAdapter, MixerSite, find_mixers
from .wrappers import plain_name, uncompiled


@dataclass(frozen=True)
class Owner:
    """Mixers whose sizes and history are kept in one place.

    Attributes:
        path: name of the module that names of mixers in the history are relative to; "" for the model itself.
        module: that module.
        configs: what holds the sizes: a config, and copies of it elsewhere in the model; empty without a config.
        towers: the mixers in model order, by the module with the config: several modules may share one.
    """

    path: str
    module: nn.Module
    configs: tuple[Any, ...]
    towers: tuple[tuple[MixerSite, ...], ...]

    @property
    def sites(self) -> list[MixerSite]:
        """All mixers, in model order."""
        return [site for tower in self.towers for site in tower]

    @property
    def keepers(self) -> list[Any]:
        """Objects with an attribute `compression_history`: configs that are saved with a model, or else the module."""
        return [config for config in self.configs if isinstance(config, PreTrainedConfig)] or [self.module]

    def name(self, site: MixerSite) -> str:
        """A mixer's name within the module."""
        return site.name[len(self.path) :].lstrip(".") if self.path else site.name

    def write_sizes(self) -> None:
        """Write the sizes of the live parameters to the configs."""
        for adapter, towers in self._by_adapter():
            shared = adapter.uniform or self._one_list(adapter, towers)
            sizes = [site.state_size for tower in (towers[:1] if shared else towers) for site in tower]
            for config in self.configs:
                if isinstance(config, PreTrainedConfig):
                    adapter.write_config(config, sizes)
                else:
                    with suppress(AttributeError, TypeError):  # frozen; nothing is built from it but by its own user
                        adapter.write_config(config, sizes)

    def ties(self) -> tuple[list[list[str]], list[list[str]]]:
        """Names of mixers that share one number in the config, and of those that share an entry of a list there.

        Raises:
            ValueError: if a list in the config is of another length than there are mixers.
        """
        numbers, entries = [], []
        for adapter, towers in self._by_adapter() if self.configs else ():
            names = [[site.name for site in tower] for tower in towers]
            if adapter.uniform:
                numbers.append(sum(names, []))
            elif self._one_list(adapter, towers):
                entries += [list(group) for group in zip(*names, strict=True)]
            elif type(adapter).write_config is MixerAdapter.write_config:
                self._check_count(adapter, sum(names, []))
        return numbers, entries

    def _by_adapter(self) -> Iterator[tuple[MixerAdapter, list[list[MixerSite]]]]:
        for adapter in {id(site.adapter): site.adapter for site in self.sites}.values():
            towers = [[site for site in tower if site.adapter is adapter] for tower in self.towers]
            yield adapter, [tower for tower in towers if tower]

    def _listed(self, adapter: MixerAdapter) -> int | None:
        """How many layers the config has a size for, if it has a list of them."""
        found = [getattr(config, adapter.size_field, None) for config in self.configs]
        return next((len(sizes) for sizes in found if isinstance(sizes, list | tuple)), None)

    def _one_list(self, adapter: MixerAdapter, towers: Sequence[Sequence[MixerSite]]) -> bool:
        """Whether several modules share a config, whose list is that of each of them."""
        return len(towers) > 1 and {len(tower) for tower in towers} == {self._listed(adapter)}

    def _check_count(self, adapter: MixerAdapter, names: Sequence[str]) -> None:
        listed = self._listed(adapter)
        if listed is not None and listed != len(names):
            raise ValueError(
                f"{type(self.configs[0]).__name__}.{adapter.size_field} has sizes of {listed} layers, and it speaks of "
                f"{len(names)} here: {', '.join(names)}. Pass the whole model that it describes, or give the adapter "
                "a write_config of its own."
            )


def find_owners(model: nn.Module, sites: Sequence[MixerSite] | None = None) -> list[Owner]:
    """Owners of all compressible mixers of a model, in the order of their first mixers.

    Raises:
        ValueError: as `find_mixers`, if no mixers are given.
    """
    sites = find_mixers(model) if sites is None else sites
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        holders.setdefault(id(getattr(module, "config", None)), []).append(plain_name(name))
    groups: dict[Any, list[tuple[MixerSite, list[Any]]]] = {}
    for site in sites:
        chain = _configs(model, site, holders)
        groups.setdefault(id(chain[-1]) if chain else site.name, []).append((site, chain))
    return [_owner(model, members) for members in groups.values()]


def write_sizes(model: nn.Module, sites: Sequence[MixerSite]) -> None:
    """Write the sizes of the live parameters to all configs."""
    for owner in find_owners(model, sites):
        owner.write_sizes()


def with_ties(model: nn.Module, constraints: SizeConstraints) -> SizeConstraints:
    """The constraints, with the multiple that the mixers prefer, and those of configs with one size for several mixers.

    Where a runtime is named, the sizes that it takes of these models are filled in.

    Raises:
        ValueError: if uniform=False contradicts a config, a list in a config is of another length than there are
            mixers, or kernels or caches could not run the multiples that are asked for; if the runtime or what it
            takes of this architecture is unknown.
    """
    sites = find_mixers(model)
    if constraints.sizes_for is not None:
        constraints = dataclasses.replace(constraints, allowed=_runtime_sizes(model, sites, constraints.sizes_for))
    if constraints.multiple_of is None:
        preferred = math.lcm(*(site.adapter.size_multiple(site.mixer) for site in sites))
        constraints = dataclasses.replace(constraints, multiple_of=preferred)
    for site in sites:
        site.adapter.check_multiple(site.mixer, constraints.multiple_of or 1)
    index = {site.name: position for position, site in enumerate(sites)}
    for owner in find_owners(model, sites):
        numbers, entries = ([[index[name] for name in group] for group in groups] for groups in owner.ties())
        constraints = constraints.for_uniform_layers(numbers)
        constraints = dataclasses.replace(constraints, tied=(*constraints.tied, *map(tuple, entries)))
    return constraints


def _runtime_sizes(model: nn.Module, sites: Sequence[MixerSite], runtime: str) -> tuple[int, ...]:
    """Sizes up to the largest layer's that a runtime takes of all parts of a model, ascending."""
    limit = max(site.state_size for site in sites)
    configs = [config for owner in find_owners(model, sites) for config in owner.configs]
    if not configs:
        raise ValueError(f"sizes_for={runtime!r} needs a model with a config, which says what its architecture is")
    taken = [set(runtime_sizes(runtime, config).up_to(limit)) for config in configs]
    return tuple(sorted(set.intersection(*taken)))


def _owner(model: nn.Module, members: Sequence[tuple[MixerSite, list[Any]]]) -> Owner:
    configs = list({id(config): config for _, chain in members for config in chain}.values())
    if not configs:
        ((site, _),) = members
        return Owner(site.name, site.mixer, (), ((site,),))
    towers: dict[str, list[MixerSite]] = {}
    for site, _ in members:
        towers.setdefault(_root(model, site, configs), []).append(site)
    path = os.path.commonprefix([[*root.split("."), ""] if root else [""] for root in towers])
    common = ".".join(part for part in path if part)
    return Owner(common, uncompiled(model.get_submodule(common)), tuple(configs), tuple(map(tuple, towers.values())))


def _root(model: nn.Module, site: MixerSite, configs: Sequence[Any]) -> str:
    """The outermost module around a mixer that has one of the configs, a model of transformers if there is one."""
    around = [
        (path, module)
        for path, module in _around(model, site.name)
        if any(getattr(module, "config", None) is config for config in configs)
    ]
    models = [path for path, module in around if isinstance(module, PreTrainedModel)]
    if around:
        return models[-1] if models else around[-1][0]
    return next(path for path, module in _around(model, site.name) if _config(module, site) is not None)


def _configs(model: nn.Module, site: MixerSite, holders: Mapping[int, Sequence[str]]) -> list[Any]:
    """Configs that hold a mixer's size, the nearest first. Mixers with the same last config have the same owner."""
    chain: list[Any] = []
    for _, module in _around(model, site.name):
        config, known = _config(module, site), {id(found) for found in chain}
        saved = any(isinstance(found, PreTrainedConfig) for found in chain)
        if config is None or (chain and not isinstance(config, PreTrainedConfig)):
            continue
        if not saved:
            chain.append(_describing(config, site, holders))
        elif not any(id(part) in known for _, part in _tree(config)):
            chain += _copies(config, chain[-1], site, holders)
    return chain


def _config(module: nn.Module, site: MixerSite) -> Any:
    """A module's config, if it is one of transformers or another object, not a mapping, with the field for the size."""
    config = getattr(module, "config", None)
    if isinstance(config, PreTrainedConfig):
        return config
    return config if hasattr(config, site.adapter.size_field) and not isinstance(config, Mapping) else None


def _describing(config: Any, site: MixerSite, holders: Mapping[int, Sequence[str]]) -> Any:
    """The config itself, or where that lacks the field the one config in it that has it and is no other module's."""
    field = site.adapter.size_field
    if hasattr(config, field):
        return config
    inner = [part for _, part in _tree(config) if hasattr(part, field) and id(part) not in holders]
    return inner[0] if len(inner) == 1 else config


def _copies(config: Any, original: Any, site: MixerSite, holders: Mapping[int, Sequence[str]]) -> list[Any]:
    """The part of a config that is a copy of another: the outer model is built from it when it is loaded."""
    field, names = site.adapter.size_field, site.name.split(".")
    copies = [
        (key, part)
        for key, part in _tree(config)
        if type(part) is type(original)
        and getattr(part, field, None) == getattr(original, field, None)
        and all(f"{site.name}.".startswith(f"{path}.") or not path for path in holders.get(id(part), ()))
    ]
    if len(copies) > 1:
        copies = [(key, part) for key, part in copies if key.removesuffix("_config") in names]
    return [part for _, part in copies] if len(copies) == 1 else []


def _tree(config: Any, key: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """A config and all configs in it, with the names of the fields that hold them."""
    if isinstance(config, PreTrainedConfig) and id(config) not in seen:
        yield key, config
        for name, value in vars(config).items():
            yield from _tree(value, name, seen | {id(config)})


def _around(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and those around it, from the inside out."""
    while name:
        yield name, uncompiled(model.get_submodule(name))
        name = name.rpartition(".")[0]
    yield "", uncompiled(model)
