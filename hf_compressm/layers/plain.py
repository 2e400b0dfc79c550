"""Whether a layer is nothing but itself, so that its weight may be used without calling it, and what is within it."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call computes what `cls` does with the module's weight and bias, and nothing else.

    False for a layer of PEFT's, a quantised or parametrised one, and one with hooks or with another `forward`, as
    accelerate gives it: whatever they do is done by calling the module.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is cls and "forward" not in vars(module) and not any(hooks)


def innermost(module: nn.Module) -> Any:
    """The layer within those that PEFT has put around it; the module itself without any."""
    for name in ("base_layer", "original_module"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return innermost(inner)
    return module
