"""Find the parameters of a model that torch's `fully_shard` (FSDP2) has sharded, and what FSDP keeps for each of them.

Source: torch.distributed.fsdp of torch 2.13, whose private names in `PRIVATE` the package uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

PRIVATE = {
    "FSDPState": ("_fsdp_param_groups",),
    "FSDPParamGroup": (
        *("fsdp_params", "device", "mp_policy", "offload_policy", "_partial_reduce_output", "_reset_sharded_params"),
    ),
    "FSDPParam": (
        *("sharded_param", "_module_info", "mesh_info", "post_forward_mesh_info", "fsdp_placement"),
        *("is_dtensor", "offload_to_cpu"),
        *(
            "unsharded_accumulated_grad",
            "_unsharded_param",
            "_post_load_hook_handle",
            "_param_fqn",
            "init_dtype_attrs",
            "reset_sharded_param",
        ),
    ),
}
"""What the package uses of torch beyond its public interface, by class."""

Place = tuple[nn.Module, str]
"""A module and the name of a parameter that it holds."""


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to a model or to a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_torch(model: nn.Module) -> None:
    """Raise if the installed torch lacks a private name that cuts of sharded parameters need.

    Raises:
        RuntimeError: naming what is missing.
    """
    for state in fsdp_states(model):
        found: dict[str, list[Any]] = {"FSDPState": [state]}
        found["FSDPParamGroup"] = list(getattr(state, "_fsdp_param_groups", []))
        found["FSDPParam"] = [entry for group in found["FSDPParamGroup"] for entry in getattr(group, "fsdp_params", [])]
        for kind, names in PRIVATE.items():
            for thing in found[kind][:1]:
                known = dir(thing) + list(getattr(type(thing), "__annotations__", ()))
                if missing := [name for name in names if name not in known]:
                    raise RuntimeError(
                        f"torch {torch.__version__} has no {kind}.{', '.join(missing)}, which a cut of sharded "
                        "parameters needs. Install a version of torch that this package is tested with, or train "
                        "with DDP."
                    )


def sharded_entries(model: nn.Module) -> dict[Place, tuple[Any, Any]]:
    """FSDP's groups and entries (`FSDPParamGroup`, `FSDPParam`) by the places of their parameters."""
    found = {}
    for state in fsdp_states(model):
        for group in state._fsdp_param_groups:
            for entry in group.fsdp_params:
                at = entry._module_info.module, entry._module_info.param_name
                # Loading may put in others before the first forward pass, in which FSDP would take them.
                if not group._reset_sharded_params and isinstance(at[0]._parameters.get(at[1]), DTensor):
                    entry.reset_sharded_param()
                found[at] = (group, entry)
    return found


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, if there are any; an evaluation leaves those of the outermost module gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fsdp_states(model: nn.Module) -> list[Any]:
    """FSDP's state of each call of `fully_shard` on a model or a part of it, in the order of `modules()`."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return list(dict.fromkeys(module._get_fsdp_state() for module in modules))
