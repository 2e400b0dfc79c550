"""LoRA around weights that a cut replaces: the weights that a mixer computes with, and how LoRA's matrices change.

A reduction maps the rows of a weight, W' = M W: it picks some, and mixes others where removed states are folded into
the read-out. With LoRA the layer computes with V = W + sum_a s_a B_a A_a, and V' = M V asks for B' = M B and W' = M W
for every adapter a, active or not. DoRA computes with diag(g) V, where g = m / |V| by rows, so that rows of unequal g
must be mixed as diag(1/c) M diag(g), which M diag(g) V = diag(c) V' makes exact; c is the root mean square of the g
that are mixed, which leaves rows that are only picked as they were. A refit adds to V', and the base weight takes it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...models.fast_ops import uncalled_layers
from ..changes import ParameterChange, Term
from .tuners import followers, is_copy_wrapper, is_lora_linear, is_tuner, lora_layers

_REASONS = {
    "ia3": "(IA)^3 has a factor for each output (or input), and rows that a cut mixes have no common one",
    "vera": "VeRA shares its matrices among layers, which then lose different rows",
    "loha": "LoHa multiplies two matrices entry by entry, which does not stay so when rows are mixed",
    "lokr": "LoKr is a Kronecker product, which does not stay one when rows are removed",
    "adalora": "AdaLoRA changes its ranks while it trains and remembers the importance of every old entry",
}
_ADVICE = (
    "Use LoRA, DoRA or rsLoRA there, leave it out of the adapter's modules, or merge the adapter before the cut "
    "(merge_and_unload)."
)


def check_adapters(model: nn.Module, path: str, names: Iterable[str]) -> None:
    """Raise if an adapter that PEFT put on a mixer cannot follow a cut, or has no effect.

    Args:
        model: the model.
        path: the mixer's name in it.
        names: parameters that a cut replaces, by name within the mixer without PEFT.

    Raises:
        ValueError: naming the layer, the method and the reason.
    """
    mixer, names = model.get_submodule(path), list(names)
    for name in uncalled_layers(mixer):
        if is_tuner(getattr(mixer, name)):
            raise ValueError(
                f"{path}.{name} has an adapter on it without effect: transformers' own code takes the weight of "
                f"{name} without calling the layer. Take {name} out of target_modules, or call "
                "hf_compressm.use_fast_ops(model), which calls it."
            )
    parts = path.split(".")
    for depth in range(len(parts)):
        around: Any = model.get_submodule(".".join(parts[:depth]))
        if is_copy_wrapper(around):
            _refuse(path, "modules_to_save", "it is kept twice, as it was and as it is trained")
        if is_tuner(around) and (name := getattr(around, "parameter_name", None)) in names:
            _refuse(f"{path}.{name}", "LoRA of target_parameters", "it is added to a parameter without a layer")
    for inner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        _check_layer(f"{path}.{inner}", mixer.get_submodule(inner))


def _check_layer(path: str, layer: Any) -> None:
    if is_copy_wrapper(layer):
        _refuse(path, "modules_to_save", "it is kept twice, as it was and as it is trained")
    if is_lora_linear(layer):
        _check_lora(path, layer)
    elif is_tuner(layer):
        method = type(layer).__module__.partition("peft.tuners.")[2].partition(".")[0]
        reason = _REASONS.get(method, "only LoRA around a plain linear layer can follow a cut")
        if method == "lora" and not hasattr(layer, "parameter_name"):
            reason = "the layer in it is quantised or not linear, so its rows cannot be mixed"
        _refuse(path, f"{type(layer).__module__}.{type(layer).__qualname__}", reason)


def _check_lora(path: str, layer: Any) -> None:
    dora = list(layer.lora_magnitude_vector)
    others = {name: type(v).__name__ for name, v in layer.lora_variant.items() if name not in dora}
    if others:
        name, variant = next(iter(others.items()))
        _refuse(path, f"the adapter {name!r} ({variant})", "this variant of LoRA does more than add to the weight")
    if biased := next((name for name, linear in layer.lora_B.items() if linear.bias is not None), None):
        _refuse(path, f"the adapter {biased!r} with lora_bias", "a bias that the layer itself may lack is not followed")
    if layer.fan_in_fan_out:
        _refuse(path, "an adapter with fan_in_fan_out", "its weight is stored the other way round")
    reason = "DoRA's magnitudes are computed together with the weight of the layer in it, which"
    if dora and len(layer.lora_B) > 1:
        _refuse(path, f"DoRA ({dora[0]!r}) beside other adapters", f"{reason} all of them share")
    if dora and (layer.merged or layer.disable_adapters or dora[0] not in layer.active_adapters):
        _refuse(path, f"DoRA ({dora[0]!r}) that is merged, disabled or inactive", f"{reason} is used without it now")


def _refuse(path: str, method: str, reason: str) -> None:
    raise ValueError(f"{path} is changed by a cut, and has {method} on it, which cannot follow: {reason}. {_ADVICE}")


def mixer_without_lora(live: nn.Module, names: Iterable[str]) -> nn.Module:
    """A mixer with plain linear layers that compute what those with LoRA do, for a mixer adapter that knows no PEFT.

    Everything else is shared with the live mixer, which is not changed. Without LoRA it is the live mixer itself.

    Args:
        live: the mixer.
        names: weights that may have LoRA around them, by name within the mixer without PEFT.
    """
    layers = list(lora_layers(live, names))
    if not layers:
        return live
    mixer = _view(live)
    for name, layer in layers:
        *parents, child = name.split(".")[:-1]
        owner = mixer
        for part in parents:
            owner._modules[part] = _view(owner.get_submodule(part))
            owner = owner.get_submodule(part)
        plain, base = _view(layer.get_base_layer()), layer.get_base_layer().weight
        gains = _gains(layer)
        weight = _direction(layer) if gains is None else gains[:, None] * _direction(layer)
        dtype = torch.promote_types(base.dtype, torch.float32)
        plain._parameters["weight"] = nn.Parameter(weight.to(base.device, dtype), requires_grad=base.requires_grad)
        owner._modules[child] = plain
    return mixer


def changes_with_lora(mixer: nn.Module, changes: Mapping[str, ParameterChange]) -> dict[str, ParameterChange]:
    """Changes of `mixer_without_lora` as changes of the live mixer, with those of its LoRA matrices.

    Args:
        mixer: the live mixer.
        changes: by parameter name within the mixer without PEFT.

    Raises:
        ValueError: if a change does not say how rows are mapped; the message names the parameter.
    """
    found = dict(changes)
    for name, layer in lora_layers(mixer, changes):
        if changes[name].rows is None:
            raise ValueError(
                f"{name} has LoRA on it, but its ParameterChange has no `rows`, which says how the weight's rows are "
                "mapped. Merge the adapter before the cut, or let MixerAdapter.reduce give `rows`."
            )
        found |= _changes(name, layer, changes[name])
    return found


def _changes(name: str, layer: Any, change: ParameterChange) -> dict[str, ParameterChange]:
    """The change of an adapted weight, and those of what follows it."""
    assert change.rows is not None
    target, gains = _double(change.value), _gains(layer)
    if gains is None:
        gains = target.new_ones(len(layer.get_base_layer().weight))
    mixed = (change.rows.squared(gains.square()) / change.rows.squared(torch.ones_like(gains))).sqrt()
    similar = None if not layer.lora_magnitude_vector else _unit(target) @ _unit(_direction(layer)).T
    base, found = target / mixed[:, None], {}
    for follower, parameter in followers(name, layer).items():
        adapter, is_magnitude = follower.split(".")[-2], ".lora_B." not in follower
        value, factors = target.norm(dim=1), similar
        if not is_magnitude:
            value, factors = change.rows(gains[:, None] * _double(parameter)) / mixed[:, None], mixed[:, None] / gains
            if adapter in _active(layer):
                base = base - layer.scaling[adapter] * value @ _double(layer.lora_A[adapter].weight)
        terms = (_scaled(term, follower, factors) for term in change.gradient if term.source == name)
        found[follower] = ParameterChange(value, tuple(terms))
    return {name: replace(change, value=base)} | found


def _scaled(term: Term, source: str, factors: Tensor | None) -> Term:
    """The term for another source, its matrix multiplied by factors (new rows, old rows); a picked row has factor 1."""
    if term.left is None or factors is None:
        return replace(term, source=source)
    factors = factors if term.rows is None else factors[:, term.rows]
    return replace(term, source=source, left=term.left * factors)


def _active(layer: Any) -> Iterable[str]:
    """Adapters that the layer adds to its base weight at each call."""
    if layer.disable_adapters or layer.merged:
        return ()
    return [name for name in layer.active_adapters if name in layer.lora_B]


def _direction(layer: Any) -> Tensor:
    """W + sum_a s_a B_a A_a over the active adapters, float64."""
    total = _double(layer.get_base_layer().weight)
    for name in _active(layer):
        total = total + layer.scaling[name] * _double(layer.lora_B[name].weight) @ _double(layer.lora_A[name].weight)
    return total


def _gains(layer: Any) -> Tensor | None:
    """DoRA's m / |V| by rows, float64; None without DoRA."""
    dora = [name for name in layer.lora_magnitude_vector if name in _active(layer)]
    if not dora:
        return None
    return _double(layer.lora_magnitude_vector[dora[0]].weight) / _direction(layer).norm(dim=1)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _view(module: nn.Module) -> nn.Module:
    """A module with the same parameters and children, whose registers can be changed on their own."""
    view = copy.copy(module)
    view._parameters, view._modules = dict(module._parameters), dict(module._modules)
    return view
