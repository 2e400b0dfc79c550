"""Finds whether a layer has hooks or adapters, so that its weight may be used without calling it."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of the module computes only what `cls` computes from the module's weight and bias.

    False for layers of PEFT, quantised or parametrised layers, and layers with hooks or with another `forward`, which
    accelerate sets. Such modules must be called.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is cls and "forward" not in vars(module) and not any(hooks)


def innermost(module: nn.Module) -> Any:
    """The layer inside the wrappers of PEFT; the module itself if it has none."""
    for name in ("base_layer", "original_module"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return innermost(inner)
    return module
