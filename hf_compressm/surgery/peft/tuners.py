"""Find the parameters of a mixer by the names that they have without PEFT, wherever PEFT has put them.

PEFT wraps a linear layer: `x_proj.weight` becomes `x_proj.base_layer.weight`, beside `x_proj.lora_A.NAME.weight`,
`x_proj.lora_B.NAME.weight` and, in DoRA, `x_proj.lora_magnitude_vector.NAME.weight`. Rows of the base weight, of lora_B
and of the magnitudes are outputs of the layer, so they come and go together: the latter two follow the first.

peft is optional, and imported by nobody here: where it was not imported, there is nothing of it to find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...compatibility import peft_class

_BASE = ".base_layer."
_FOLLOWING = ("lora_B", "lora_magnitude_vector")


def is_tuner(module: Any) -> bool:
    """Whether a module is a layer that PEFT has put around another."""
    return _is(module, "tuners.tuners_utils", "BaseTunerLayer")


def is_copy_wrapper(module: Any) -> bool:
    """Whether a module is PEFT's holder of trainable copies, as `modules_to_save` makes it."""
    return _is(module, "utils.other", "AuxiliaryTrainingWrapper")


def is_lora_linear(module: Any) -> bool:
    """Whether a module is LoRA around a plain linear layer, not around a quantised or another one."""
    cls = peft_class("tuners.lora.layer", "Linear")
    return cls is not None and type(module) is cls


def has_tuners(model: nn.Module) -> bool:
    """Whether PEFT has put layers into a model."""
    return any(is_tuner(module) for module in model.modules())


def place(mixer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name there."""
    path, _, attribute = name.rpartition(".")
    owner: Any = mixer.get_submodule(path)
    return (owner.get_base_layer() if is_tuner(owner) else owner), attribute


def lora_layers(mixer: nn.Module, names: Any) -> Iterator[tuple[str, Any]]:
    """Names among the given ones of weights with LoRA around them, and the LoRA layers."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        if attribute == "weight" and is_lora_linear(layer := mixer.get_submodule(path)):
            yield name, layer


def followers(name: str, layer: Any) -> dict[str, nn.Parameter]:
    """Parameters whose rows go with those of a weight with LoRA around it, by name within the mixer."""
    path = name.rpartition(".")[0]
    return {
        f"{path}.{kind}.{adapter}.weight": module.weight
        for kind in _FOLLOWING
        for adapter, module in getattr(layer, kind).items()
    }


def with_followers(mixer: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """The shapes, and those that the parameters which follow them have then."""
    found = dict(shapes)
    for name, layer in lora_layers(mixer, shapes):
        for follower, parameter in followers(name, layer).items():
            found[follower] = torch.Size([shapes[name][0], *parameter.shape[1:]])
    return found


def plain_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """A checkpoint's shapes by the names that parameters have without PEFT.

    A checkpoint of adapters lacks the weights that they are around; of these the number of rows is known.
    """
    found = {name.replace(_BASE, "."): shape for name, shape in shapes.items()}
    for name, shape in shapes.items():
        path, kind, rest = name.partition(".lora_B.")
        if kind and rest.endswith(".weight"):
            column = shapes.get(f"{path}.lora_A.{rest}", torch.Size([0, 0]))[-1]
            found.setdefault(f"{path}.weight", torch.Size([shape[0], column]))
    return found


def fit_features(mixer: nn.Module) -> None:
    """Bring the sizes that PEFT's layers and the linear layers in them speak of in line with their weights."""
    for layer in mixer.modules():
        if is_lora_linear(layer):
            lora: Any = layer
            linears = [lora.get_base_layer(), *lora.lora_B.values()]
            for linear in linears:
                linear.out_features = linear.weight.shape[0]
            lora.out_features = linears[0].out_features
            for magnitude in lora.lora_magnitude_vector.values():
                magnitude._cache_clear()


def _is(module: Any, path: str, name: str) -> bool:
    cls = peft_class(path, name)
    return cls is not None and isinstance(module, cls)
