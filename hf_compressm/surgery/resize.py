"""Replace the parameters of mixers, and resize mixers to load a checkpoint or undo a cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapters.base import MixerSite, find_mixers
from .gradients import drop_gradients, set_gradient
from .optimizer import State, insert_parameter, remove_parameters, swap_parameters
from .owners import write_sizes
from .parameters import outside_inference_mode, successor, unloaded
from .peft.tuners import fit_features, place, plain_shapes
from .wrappers import plain_state_dict


@outside_inference_mode
def replace_parameters(
    sites: Sequence[MixerSite],
    values: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
    states: Mapping[str, Mapping[str, State]] | None = None,
    gradients: Mapping[str, Mapping[str, Tensor | None]] | None = None,
) -> None:
    """Replace parameters of mixers by new ones (any shape), in the modules and in the optimizer.

    A name whose attribute is None so far becomes a parameter, and is added to the optimizer. A parameter that a cut
    replaces, but for which there is no new value, is removed.

    Args:
        sites: the mixers, all or some.
        values: by site name, then parameter name: the new value, of any shape. dtype, device and requires_grad are
            those of the parameter replaced. Sites without an entry are left alone.
        optimizer: an unwrapped optimizer that holds the old parameters, or None.
        states: by site name, then parameter name: optimizer state of the new parameter. Without an entry it starts
            afresh.
        gradients: by site name, then parameter name: `.grad` of the new parameter; none without an entry.
    """
    states, gradients = states or {}, gradients or {}
    for site in sites:
        if site.name not in values:
            continue
        old, own = site.parameters(), states.get(site.name, {})
        like = next(p for p in site.mixer.parameters() if p.ndim > 1 and p.is_floating_point())
        new = {
            name: successor(old[name], value)
            if name in old
            else nn.Parameter(value.to(like, copy=True), requires_grad=like.requires_grad)
            for name, value in values[site.name].items()
        }
        for name, parameter in new.items():
            set_gradient(parameter, gradients.get(site.name, {}).get(name))
        swapped = {old[name]: new[name] for name in old if name in new and old[name].requires_grad}
        if optimizer is not None:
            swap_parameters(optimizer, swapped, {new[name]: dict(own.get(name, {})) for name in new})
            remove_parameters(optimizer, [old[name] for name in old if name not in new])
        for name in old | new:
            owner, attribute = place(site.mixer, name)
            setattr(owner, attribute, new.get(name))
        if optimizer is not None:
            for name in new:
                if name not in old and new[name].requires_grad:
                    insert_parameter(optimizer, site.mixer, new[name])
        site.adapter.update_size_attributes(site.mixer, site.state_size)
        fit_features(site.mixer)


class Opens(Protocol):
    """Gives a block in which a mixer's parameters are whole; see `team.Team`."""

    def opened(self, model: nn.Module, site: MixerSite, optimizer: Any = None) -> AbstractContextManager[None]: ...


@outside_inference_mode
def resize_mixers(
    model: nn.Module,
    sizes: Mapping[str, int],
    optimizer: torch.optim.Optimizer | None = None,
    team: Opens | None = None,
) -> None:
    """Resize the named mixers, with values that are `unloaded`, and write the sizes to their configs.

    If anything changes, the gradients of the whole model are dropped: they belong to weights that are gone.

    Args:
        model: any model with supported mixers.
        sizes: mixer name -> number of states. Mixers that have it already are left alone.
        optimizer: an unwrapped optimizer that holds the parameters, or None.
        team: all processes, each of which calls this, if parameters are sharded over them; this one alone by default.
    """
    sites = find_mixers(model)
    resized = [site for site in sites if sizes.get(site.name, site.state_size) != site.state_size]
    if not resized:
        return
    drop_gradients(model)
    for site in resized:
        with nullcontext() if team is None else team.opened(model, site, optimizer):
            like = next(site.mixer.parameters())
            values = {name: unloaded(like, shape) for name, shape in site.shapes(sizes[site.name]).items()}
            replace_parameters([site], {site.name: values}, optimizer)
    write_sizes(model, sites)


def sizes_in_state_dict(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """State sizes that a checkpoint's tensors have, by mixer name; mixers that it does not speak of are left out.

    Raises:
        ValueError: if tensors of one mixer disagree with each other; the message names them.
    """
    sizes = {}
    for site in find_mixers(model):
        start = f"{prefix}{site.name}." if site.name else prefix
        found = {key[len(start) :]: value.shape for key, value in state_dict.items() if key.startswith(start)}
        shapes = plain_shapes(found)
        order = site.adapter.order_of(site.mixer, shapes)
        if order is None:
            continue
        wrong = [
            f"{start}{name} has shape {tuple(shapes[name])}, expected {tuple(shape)}"
            for name, shape in site.shapes(order).items()
            if name in shapes and shapes[name] != shape
        ]
        if wrong:
            raise ValueError(f"the checkpoint's tensors disagree about a state size of {order}: {'; '.join(wrong)}")
        sizes[site.name] = order
    return sizes


def check_fixed_tensors(model: nn.Module, tensors: Mapping[str, Any], prefix: str = "", complete: bool = False) -> None:
    """Raise unless tensors, by name, have the shapes of this model's in everything that a cut leaves alone.

    Raises:
        ValueError: on the first with another shape, or with `complete` on the first that is missing.
    """
    free = {f"{site.name}.{name}" if site.name else name for site in find_mixers(model) for name in site.parameters()}
    for name, own in plain_state_dict(model).items():
        found = tensors.get(prefix + name)
        if name in free or (found is None and not complete):
            continue
        if found is None:
            raise ValueError(f"{prefix}{name} is missing")
        if found.shape != own.shape:
            raise ValueError(f"{prefix}{name} has shape {tuple(found.shape)}, this model wants {tuple(own.shape)}")
