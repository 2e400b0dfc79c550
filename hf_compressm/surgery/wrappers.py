"""Names of modules, parameters and classes without what torch's wrappers add to them.

`torch.compile` puts a model, and Accelerate's regional compilation each block, behind a module `_orig_mod`; activation
checkpointing puts a block behind `_checkpoint_wrapped_module`. Both pass on attributes, so that `get_submodule` finds a
module by its name without them, as a saved model has it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_PARTS = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A name from `named_modules`, `named_parameters` or `state_dict` as it is in the model without wrappers."""
    return ".".join(part for part in name.split(".") if part not in _PARTS)


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """The model's `state_dict`, its tensors themselves (not detached), by their names without wrappers."""
    return {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items()}


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile` has wrapped, or the module itself."""
    return module._modules.get("_orig_mod", module) if isinstance(module, nn.Module) else module


def class_name(model: nn.Module) -> str:
    """The name of a model's own class, without what `torch.compile` and `fully_shard` make of it."""
    return type(uncompiled(model)).__name__.removeprefix("FSDP")
