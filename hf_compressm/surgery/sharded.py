"""Cut parameters that torch's `fully_shard` (FSDP2) has sharded: gather those of one mixer, replace, shard them again.

FSDP2 keeps each parameter as a DTensor of its own and an `FSDPParam` that gathers and reduces it. A parameter that is
replaced without its `FSDPParam` is undone by the next forward pass, without an error. So a cut exchanges both, in
place, and whoever holds the model, the optimizer or its groups goes on using them. Everything here is collective.

Source: torch.distributed.fsdp of torch 2.13; see `shards.PRIVATE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .adapters.base import MixerSite
from .optimizer import swap_parameters
from .parameters import inherit
from .peft.tuners import place
from .shards import Place, reshard, sharded_entries
from .wrappers import uncompiled


def whole_site(site: MixerSite) -> MixerSite:
    """The site with a copy of its mixer that has whole, plain parameters and no hooks of FSDP. The model is unchanged.

    Modules of the copy share all else with those of the model. Values have the parameters' own dtype, not that of a
    mixed-precision policy.
    """
    return replace(site, mixer=_whole(site.mixer, {}))


def whole_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with whole, plain parameters and no hooks of FSDP, on every rank. The model is unchanged.

    It needs the memory of the whole model on each; what is shared, such as tied weights, stays so.
    """
    reshard(model)
    return _whole(model, {})


def _whole(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    """The copy, after a look among those that are `known` by the identity of their originals."""
    module = uncompiled(module)
    if id(module) in known:
        return known[id(module)]
    attributes, state = vars(module), None
    cls: Any = type(module)
    if isinstance(module, FSDPModule):
        cls, state = cls.__mro__[cls._orig_cls_mro_index], module._get_fsdp_state()
    view: nn.Module = cls.__new__(cls)
    known[id(module)] = view
    vars(view).update({name: value for name, value in attributes.items() if not _holds(value, state)})
    view._parameters = {name: None if p is None else _plain(p, known) for name, p in module._parameters.items()}
    view._modules = {name: None if child is None else _whole(child, known) for name, child in module._modules.items()}
    view._compiled_call_impl = None  # made by module.compile(), it runs the original
    if state is not None:
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = attributes[kind]
            kept = (item for item in hooks.items() if getattr(item[1], "__self__", None) is not state)
            setattr(view, kind, type(hooks)(kept))
    return view


def _holds(value: Any, state: Any) -> bool:
    """Whether an attribute is torch's record that `fully_shard` was applied; with it the copy could not be copied."""
    return state is not None and isinstance(value, dict) and any(held is state for held in value.values())


def _plain(parameter: nn.Parameter, known: dict[int, Any]) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    if id(parameter) not in known:
        known[id(parameter)] = nn.Parameter(_to_plain(parameter.detach()), requires_grad=parameter.requires_grad)
    return known[id(parameter)]


@contextmanager
def opened(model: nn.Module, site: MixerSite, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Within the block the parameters of a mixer that a cut replaces are whole and plain, and so are their moments.

    They may be replaced there by parameters of other shapes, added and removed, in the model and in the optimizer.
    Afterwards, also after an error, what is there is sharded as it was before. No other parameter is gathered.

    Args:
        model: the model, between two optimizer steps.
        site: one of its mixers.
        optimizer: its unwrapped optimizer, or None.

    Raises:
        ValueError: if gradients of a step wait to be reduced.
    """
    reshard(model)
    entries = sharded_entries(model)
    taken = {at: entries[at] for at in _places(site) if at in entries}
    for (_, name), near in taken.items():
        if _waits(*near):
            raise ValueError(
                f"{site.name}: gradients of {name} are accumulated without being reduced "
                "(set_requires_gradient_sync(False)). Cut after the optimizer step, when they have been reduced."
            )
    for (owner, name), (_, entry) in taken.items():
        _exchange(owner, name, _gathered(entry.sharded_param), optimizer, _to_plain)
    sibling = _sibling(site, entries)
    try:
        yield
    finally:
        present = _places(site)
        for at, (group, entry) in taken.items():
            if at not in present:
                entry._post_load_hook_handle.remove()
                group.fsdp_params.remove(entry)
        for at in present:
            if (near := taken.get(at, sibling)) is not None:
                _shard(at, near, optimizer, replaces=at in taken)


def _waits(group: Any, entry: Any) -> bool:
    """Whether a gradient of this rank's batches has not been reduced, or not over all replicas."""
    gathered = getattr(entry, "_unsharded_param", None)  # made by the first forward pass
    waiting = (entry.unsharded_accumulated_grad, getattr(gathered, "grad", None), group._partial_reduce_output)
    return any(gradient is not None for gradient in waiting)


def _places(site: MixerSite) -> list[Place]:
    places = [place(site.mixer, name) for name in site.shapes(site.state_size)]
    return [(owner, name) for owner, name in places if owner._parameters.get(name) is not None]


def _sibling(site: MixerSite, entries: Mapping[Place, Any]) -> Any:
    """Group and entry of a matrix of the mixer, which a new one joins; None if the mixer is not sharded."""
    own = {id(module) for module in site.mixer.modules()}
    found = (near for (owner, _), near in entries.items() if id(owner) in own and near[1].sharded_param.ndim > 1)
    return next(found, None)


def _gathered(shard: nn.Parameter) -> nn.Parameter:
    whole = nn.Parameter(_to_plain(shard.detach()), requires_grad=shard.requires_grad)
    inherit(whole, shard)
    if shard.grad is not None:
        whole.grad = _to_plain(shard.grad)
    return whole


def _to_plain(value: Any) -> Any:
    return value.full_tensor().clone() if isinstance(value, DTensor) else value


def _shard(at: Place, near: tuple[Any, Any], optimizer: torch.optim.Optimizer | None, replaces: bool) -> None:
    """Give a plain parameter to FSDP, in the group and the manner of another, whose place it takes or not."""
    (owner, name), (group, like) = at, near
    whole: Any = owner._parameters[name]
    kept = nn.Parameter(whole.detach().contiguous(), requires_grad=whole.requires_grad)
    info = type(like._module_info)(owner, name)
    mesh = (like.mesh_info, like.post_forward_mesh_info)
    entry = type(like)(kept, info, *mesh, group.device, None, group.mp_policy, group.offload_policy)
    entry.init_dtype_attrs(group.mp_policy)
    if replaces:
        entry._param_fqn = like._param_fqn
        like._post_load_hook_handle.remove()
        group.fsdp_params[group.fsdp_params.index(like)] = entry
    else:
        group.fsdp_params.append(entry)
    shard = entry.sharded_param

    def to_shard(value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == shard.shape and value.ndim:
            return distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None)
        return value

    inherit(shard, whole)
    if whole.grad is not None:
        shard.grad = to_shard(whole.grad)
    owner._parameters[name] = whole
    _exchange(owner, name, shard, optimizer, to_shard)


def _exchange(owner: nn.Module, name: str, new: nn.Parameter, optimizer: Any, convert: Any) -> None:
    """Put a parameter in the place of another, in its module and in the optimizer, with its state converted."""
    old: Any = owner._parameters[name]
    owner._parameters[name] = new
    if optimizer is not None and any(old is held for group in optimizer.param_groups for held in group["params"]):
        state = {key: convert(value) for key, value in optimizer.state.get(old, {}).items()}
        swap_parameters(optimizer, {old: new}, {new: state})
