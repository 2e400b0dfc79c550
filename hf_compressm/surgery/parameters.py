"""Check that a cut can replace parameters, and make the new parameters with the attributes of the old ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from .adapters.base import MixerSite, find_mixers
from .optimizer import unwrap_optimizer
from .peft.lora import check_adapters
from .peft.tuners import has_tuners, place
from .shards import Place, is_sharded, reshard, sharded_entries
from .wrappers import plain_name

Function = TypeVar("Function", bound=Callable[..., Any])

_WHOLE = "Load the model whole and unquantised, compress it then, and offload or quantise the result."
_COMPUTED = {
    "_g": "weight_norm computes it; call torch.nn.utils.remove_weight_norm first",
    "_u": "spectral_norm computes it; call torch.nn.utils.remove_spectral_norm first",
    "_orig": "pruning computes it from a mask; call torch.nn.utils.prune.remove first",
}
"""By what is added to a parameter's name where its value is made anew for each call, and kept otherwise."""


_OF_TENSORS = {"_is_param"}
"""Attributes with which torch marks what a tensor is, not what its user has put there."""


def outside_inference_mode(function: Function) -> Function:
    """Decorate a function so that its results can be trained even where it is called in `torch.inference_mode`."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def successor(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Make the parameter that replaces another: of its dtype, device and requires_grad, with its attributes and hooks.

    Hooks get the new gradient; handles of these hooks still remove them. The value is (new shape).
    """
    new = nn.Parameter(value.to(old, copy=True), requires_grad=old.requires_grad)
    inherit(new, old)
    return new


def inherit(new: nn.Parameter, old: nn.Parameter) -> None:
    """Give a parameter (any shape) the attributes and hooks of another, and its gradient's dtype."""
    vars(new).update({name: value for name, value in vars(old).items() if name not in _OF_TENSORS})
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks, None):
            setattr(new, hooks, getattr(old, hooks))
    if getattr(old, "grad_dtype", old.dtype) != old.dtype:
        new.grad_dtype = old.grad_dtype


def check_parameters(model: nn.Module, optimizer: Any = None, sites: Sequence[MixerSite] | None = None) -> None:
    """Raise if a cut could not replace every reference to a parameter.

    Args:
        model: the model.
        optimizer: its optimizer, or None.
        sites: the mixers with the adapters that cut them; by default those of `find_mixers`.

    Raises:
        ValueError: if a parameter of a mixer is shared with another module or, when there is an optimizer, is frozen
            (unless PEFT trains the model, which freezes on purpose; see also `MixerSite.frozen_read_out`) or missing
            from it; if an adapter of PEFT around a parameter cannot follow a cut; if a parameter is offloaded,
            quantised or of a class of its own. The message names the parameter.
        TypeError: if the optimizer's state cannot be carried.
    """
    reshard(model)  # what is gathered is not what the optimizer holds
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(plain_name(name))
    held, adapted = None, has_tuners(model)
    if optimizer is not None:
        groups = unwrap_optimizer(optimizer).param_groups
        held = {id(parameter) for group in groups for parameter in group["params"]}
    for site in find_mixers(model) if sites is None else sites:
        check_replaceable(model, site, trained=optimizer is not None)
        for name, parameter in site.parameters().items():
            path = f"{site.name}.{name}"
            if len(names := owners[id(parameter)]) > 1:
                raise ValueError(
                    f"{path} is shared by {', '.join(names)}; a shared state-space parameter cannot be cut. "
                    "Give each layer its own parameter."
                )
            left_alone = adapted or name == site.frozen_read_out
            if held is not None and not parameter.requires_grad and not left_alone:
                raise ValueError(
                    f"{path} is frozen (requires_grad=False), and training a cut of it would change what was meant "
                    "to stay. Unfreeze it, or compress the model before or after training."
                )
            if held is not None and parameter.requires_grad and id(parameter) not in held:
                raise ValueError(f"{path} is trainable but in no parameter group of the optimizer")


def unloaded(like: Tensor, shape: torch.Size) -> Tensor:
    """The value (shape) of a parameter that is still to be loaded: NaN in every entry, dtype and device of `like`.

    A parameter that is never loaded cannot be taken for a trained one; `is_unloaded` finds it.
    """
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)  # not a DTensor where `like` is one


def is_unloaded(parameter: Tensor) -> bool:
    """Whether a parameter (any shape) still has the value that `unloaded` gave it."""
    return bool(parameter.isnan().all())


def check_replaceable(model: nn.Module, site: MixerSite, trained: bool) -> None:
    """Raise unless the parameters that a cut of a mixer replaces are plain tensors whose rows can be removed.

    Args:
        model: the model.
        site: a mixer in it.
        trained: whether an optimizer is to go on training it.

    Raises:
        ValueError: naming what is offloaded, quantised, computed from others or of a class of its own, and why that
            cannot be cut; and as `check_adapters`.
    """
    for name, tensor in (*site.mixer.named_parameters(), *site.mixer.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(
                f"{site.name}.{name} is on the meta device and holds no values: it was never loaded, or accelerate "
                "keeps it elsewhere (device_map, cpu_offload, disk_offload) and brings it in for a call only, where a "
                f"cut does not reach it. {_WHOLE}"
            )
    try:
        places = {name: place(site.mixer, name) for name in site.adapter.parameter_shapes(site.mixer, site.state_size)}
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"{site.name} has a layer without a plain weight ({error}), as quantisation and sharding leave it, so its "
            f"rows cannot be removed. {_WHOLE}"
        ) from error
    check_adapters(model, site.name, places)
    entries = sharded_entries(model) if is_sharded(model) else None
    for name, at in places.items():
        _check(f"{site.name}.{name}", *at, trained, entries)


def _check(path: str, owner: Any, attribute: str, trained: bool, entries: Mapping[Place, Any] | None) -> None:
    parameter = owner._parameters.get(attribute)
    if parameter is None:
        if (reason := _origin(owner, attribute)) is not None:
            raise ValueError(f"{path} is no parameter but computed for every call, so a cut would be undone: {reason}.")
        raise ValueError(
            f"{path} is no parameter of its layer, a {type(owner).__module__}.{type(owner).__qualname__}, as "
            f"quantisation makes them: its rows cannot be removed. {_WHOLE}"
        )
    if not parameter.is_floating_point() or parameter.element_size() == 1:
        raise ValueError(
            f"{path} is a quantised weight ({parameter.dtype}), a {type(parameter).__name__}: its rows cannot be "
            f"removed or mixed. {_WHOLE} Or leave this layer out of the quantisation."
        )
    if entries is not None or isinstance(parameter, DTensor):
        _check_shard(path, parameter, (entries or {}).get((owner, attribute)))
    elif type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        raise ValueError(
            f"{path} is a {type(parameter).__module__}.{type(parameter).__qualname__}, no plain nn.Parameter: what "
            f"quantisation, sharding or a class of its own keep in it would be lost. {_WHOLE}"
        )
    if trained and parameter.is_inference():
        raise ValueError(
            f"{path} was made in torch.inference_mode, so it cannot be trained. Build or load the model outside of it."
        )
    if hasattr(parameter, "_in_backward_optimizers"):
        raise ValueError(
            f"{path} has an optimizer of its own that steps in the backward pass and knows the parameter that a cut "
            "replaces. Use one optimizer for the model, or compress before or after training."
        )
    for name, value in vars(parameter).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
            raise ValueError(
                f"{path} has the attribute {name!r}, a tensor with an entry for each of its own, which cannot follow a "
                "cut. Delete it before the cut, and set it anew afterwards."
            )


def _check_shard(path: str, parameter: Tensor, found: Any) -> None:
    """Raise unless a parameter of a sharded model is one that fully_shard, and nothing else, shards by rows."""
    if found is None:
        reason = (
            "is a DTensor of something other than fully_shard, such as tensor parallelism, whose rows lie on several "
            "ranks for good"
            if isinstance(parameter, DTensor)
            else "is not among the parameters that fully_shard shards (ignored_params), so nothing reduces its gradient"
        )
        raise ValueError(f"{path} {reason}. Shard the layers that are cut by fully_shard alone (FSDP2).")
    entry = found[1]
    if entry.is_dtensor:
        raise ValueError(
            f"{path} is sharded by tensor parallelism and by fully_shard. Leave the layers that are cut out of the "
            "tensor-parallel plan."
        )
    if entry.fsdp_placement.dim != 0:
        raise ValueError(
            f"{path} is sharded along dimension {entry.fsdp_placement.dim}, which must stay a multiple of the number "
            "of shards. Shard it along dimension 0 (no shard_placement_fn for it)."
        )
    if entry.offload_to_cpu:
        raise ValueError(
            f"{path} is offloaded to the CPU by FSDP (fsdp_offload_params, CPUOffloadPolicy), and cuts of offloaded "
            "shards are not supported. Train without offloading, or compress before or after training."
        )


def _origin(owner: nn.Module, attribute: str) -> str | None:
    """What computes a tensor that is no parameter, and how to end that; None if nothing known does."""
    if parametrize.is_parametrized(owner, attribute):
        return "a parametrisation computes it; call torch.nn.utils.parametrize.remove_parametrizations first"
    return next((reason for ending, reason in _COMPUTED.items() if hasattr(owner, attribute + ending)), None)
