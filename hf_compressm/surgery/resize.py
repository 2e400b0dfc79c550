"""Give mixers another number of states without regard to their values: for loading checkpoints and undoing cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import MixerSite, find_mixers, write_sizes_to_config
from .optimizer import State, swap_parameters


def replace_parameters(
    sites: Sequence[MixerSite],
    values: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
    states: Mapping[str, Mapping[str, State]] | None = None,
) -> None:
    """Replace parameters of mixers by new ones, in the modules and in the optimizer.

    Args:
        sites: the mixers, all or some.
        values: by site name, then parameter name: the new value, of any shape. dtype, device and requires_grad are
            those of the parameter replaced.
        optimizer: an unwrapped optimizer that holds the old parameters, or None.
        states: by site name, then parameter name: optimizer state of the new parameter. Without an entry it starts
            afresh.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    new_states: dict[nn.Parameter, State] = {}
    by_site: dict[str, dict[str, nn.Parameter]] = {}
    for site in sites:
        by_site[site.name] = {}
        for name, value in values.get(site.name, {}).items():
            old = getattr(site.mixer, name)
            new = nn.Parameter(value.to(old), requires_grad=old.requires_grad)
            replaced[old] = by_site[site.name][name] = new
            new_states[new] = dict((states or {}).get(site.name, {}).get(name, {}))
    if optimizer is not None:
        swap_parameters(optimizer, {old: new for old, new in replaced.items() if old.requires_grad}, new_states)
    for site in sites:
        for name, parameter in by_site[site.name].items():
            setattr(site.mixer, name, parameter)
        if by_site[site.name]:
            site.adapter.resized(site.mixer, site.state_size)


def resize_mixers(model: nn.Module, sizes: Mapping[str, int], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give the named mixers a number of states each, with values still to be loaded, and tell the model's config.

    Args:
        model: any model with supported mixers.
        sizes: mixer name -> number of states. Mixers that have it already are left alone.
        optimizer: an unwrapped optimizer that holds the parameters, or None.
    """
    sites = find_mixers(model)
    values = {
        site.name: {
            name: site.parameters()[name].new_zeros(shape)
            for name, shape in site.adapter.parameter_shapes(site.mixer, sizes[site.name]).items()
        }
        for site in sites
        if sizes.get(site.name, site.state_size) != site.state_size
    }
    if values:
        replace_parameters(sites, values, optimizer)
        write_sizes_to_config(model, sites)


def sizes_in_state_dict(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """State sizes that a checkpoint's tensors have, by mixer name; mixers that it does not speak of are left out.

    Raises:
        ValueError: if tensors of one mixer disagree with each other; the message names them.
    """
    sizes = {}
    for site in find_mixers(model):
        start = f"{prefix}{site.name}." if site.name else prefix
        shapes = {name: state_dict[start + name].shape for name in site.parameters() if start + name in state_dict}
        order = site.adapter.order_of(shapes)
        if order is None:
            continue
        expected = site.adapter.parameter_shapes(site.mixer, order)
        wrong = [
            f"{start}{name} has shape {tuple(shape)}, expected {tuple(expected[name])}"
            for name, shape in shapes.items()
            if shape != expected[name]
        ]
        if wrong:
            raise ValueError(f"the checkpoint's tensors disagree about a state size of {order}: {'; '.join(wrong)}")
        sizes[site.name] = order
    return sizes
