"""Optimizer surgery: swap parameters in place, and carry their moments through the reduction.

Parameters keep their position in their group, so optimizer checkpoints and schedulers stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import transformers.optimization
from torch import Tensor, nn

from .changes import ParameterChange

State = dict[str, Any]
Carry = Callable[[ParameterChange, Mapping[str, State], State], State]


def _first(key: str) -> Carry:
    def carry(change: ParameterChange, sources: Mapping[str, State], own: State) -> State:
        if own.get(key) is None:
            return {}
        return {key: change.map_first(_moments(sources, key, own[key]))}

    return carry


def _second(key: str) -> Carry:
    def carry(change: ParameterChange, sources: Mapping[str, State], own: State) -> State:
        if own.get(key) is None:
            return {}
        return {key: change.map_second(_moments(sources, key, own[key]))}

    return carry


def _factored(row: str, column: str, full: str, keepdim: bool) -> Carry:
    """Adafactor: second moments of matrices as row and column means, of vectors in full."""

    def expand(state: State) -> Tensor | None:
        if state.get(row) is None:
            return state.get(full)
        rows = state[row] if keepdim else state[row].unsqueeze(-1)
        columns = state[column] if keepdim else state[column].unsqueeze(-2)
        mean = rows.mean(dim=-2, keepdim=True)
        return rows * columns / mean.clamp(min=torch.finfo(mean.dtype).tiny)

    def carry(change: ParameterChange, sources: Mapping[str, State], own: State) -> State:
        second = {name: expanded for name, state in sources.items() if (expanded := expand(state)) is not None}
        if not second:
            return {}
        moment = change.map_second(second)
        if own.get(row) is None:
            return {full: moment}
        return {row: moment.mean(dim=-1, keepdim=keepdim), column: moment.mean(dim=-2, keepdim=keepdim)}

    return carry


def _moments(sources: Mapping[str, State], key: str, like: Tensor) -> dict[str, Tensor]:
    _check_moments(sources, key)
    return {name: state[key].to(like.device) for name, state in sources.items()}


def _check_moments(sources: Mapping[str, State], key: str) -> None:
    missing = [name for name, state in sources.items() if state.get(key) is None]
    if missing:
        raise ValueError(f"the optimizer has {key} for some parameters of a layer but not for {', '.join(missing)}")


def _check_held(wanted: Collection[nn.Parameter], held: Collection[int]) -> None:
    if absent := sum(id(parameter) not in held for parameter in wanted):
        raise ValueError(f"{absent} of {len(wanted)} parameters to be replaced are not in the optimizer")


_ADAM = (_first("exp_avg"), _second("exp_avg_sq"), _second("max_exp_avg_sq"))
_RULES: dict[type[torch.optim.Optimizer], tuple[Carry, ...]] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.SGD: (_first("momentum_buffer"),),
    transformers.optimization.Adafactor: (
        _first("exp_avg"),
        _factored("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", keepdim=False),
    ),
    torch.optim.Adafactor: (_factored("row_var", "col_var", "variance", keepdim=True),),
}
_MOMENTS: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.Adam: {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    torch.optim.AdamW: {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    torch.optim.SGD: {"momentum_buffer"},
    transformers.optimization.Adafactor: {"exp_avg"},
    torch.optim.Adafactor: set(),
}
"""Keys of moments that a parameter has only if all from which it is computed have them."""


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's, which keep it as `.optimizer`.

    Raises:
        TypeError: if its moments cannot be carried through a reduction; see `check_optimizer_class`.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    check_optimizer_class(type(optimizer))
    return optimizer


def check_optimizer_class(cls: type) -> None:
    """Raise for an optimizer whose state cannot be carried through a reduction.

    Quantised (8-bit), projected (GaLore, APOLLO), layer-wise, sharded and fused-backward optimizers hold their state in
    forms that a linear map of gradients does not act on.

    Raises:
        TypeError: naming the class and the supported ones.
    """
    if cls not in _RULES:
        supported = ", ".join(f"{known.__module__.split('.')[0]}.{known.__name__}" for known in _RULES)
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__} keeps its state in a form that cannot be carried through a change of "
            f"state size. Supported optimizers: {supported}. With the Trainer choose one by optim='adamw_torch', "
            "'adamw_torch_fused', 'sgd' or 'adafactor'."
        )


def carried_state(change: ParameterChange, sources: Mapping[str, State], own: State, optimizer_class: type) -> State:
    """Optimizer state of a replaced parameter: moments of its new shape, with everything else copied.

    First moments go through the change's map of gradients, second moments through its squared entries.

    Args:
        change: the parameter's change.
        sources: old optimizer state of the mixer's parameters, by name; empty dicts before the first step.
        own: old optimizer state of the parameter itself.
        optimizer_class: class of the unwrapped optimizer.

    Raises:
        ValueError: if the optimizer has a moment for some parameters of the layer only.
    """
    if not own:
        return {}
    needed = {term.source: sources[term.source] for term in change.gradient}
    state = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in own.items()
        if not isinstance(value, Tensor) or value.ndim == 0
    }
    for rule in _RULES[optimizer_class]:
        state |= {key: moment.to(own[key].dtype).contiguous() for key, moment in rule(change, needed, own).items()}
    return state


def check_carried(
    changes: Mapping[str, ParameterChange], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Raise what `carried_state` and `swap_parameters` would raise for a mixer, before anything is changed.

    Args:
        changes: by parameter name.
        parameters: the mixer's, by the same names; sharded or not.
        optimizer: an unwrapped optimizer.

    Raises:
        ValueError: if the optimizer has a moment for some parameters of the layer only, or lacks a parameter.
    """
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    for name, change in changes.items():
        for key in _MOMENTS[type(optimizer)] & {
            key for key, value in states.get(name, {}).items() if value is not None
        }:
            _check_moments({term.source: states[term.source] for term in change.gradient}, key)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    _check_held([p for name, p in parameters.items() if name in changes and p.requires_grad], held)


def swap_parameters(
    optimizer: torch.optim.Optimizer,
    replaced: Mapping[nn.Parameter, nn.Parameter],
    states: Mapping[nn.Parameter, State],
) -> None:
    """Replace parameters, of any shapes, at the same positions of their groups, with the given states.

    Args:
        optimizer: an unwrapped optimizer.
        replaced: old parameter -> new parameter.
        states: new parameter -> its optimizer state; a parameter without an entry starts afresh.

    Raises:
        ValueError: if an old parameter is not in the optimizer; nothing is changed then.
    """
    _check_held(replaced, {id(parameter) for group in optimizer.param_groups for parameter in group["params"]})
    by_id = {id(old): new for old, new in replaced.items()}
    for group in optimizer.param_groups:
        group["params"] = [by_id.get(id(parameter), parameter) for parameter in group["params"]]
    for old, new in replaced.items():
        optimizer.state.pop(old, None)
        if state := states.get(new):
            optimizer.state[new] = state


def insert_parameter(optimizer: torch.optim.Optimizer, mixer: nn.Module, new: nn.Parameter) -> None:
    """Add a new matrix to the optimizer group of the mixer's other matrices.

    Its position among them is the one that it has in `mixer.parameters()`, where a new optimizer would put it, so that
    optimizer checkpoints fit after a resume.

    Raises:
        ValueError: if no matrix of the mixer is in the optimizer.
    """
    siblings = list(mixer.parameters())
    place = next(index for index, sibling in enumerate(siblings) if sibling is new)
    matrices = {id(sibling) for sibling in siblings if sibling.ndim >= 2 and sibling is not new}
    for group in optimizer.param_groups:
        held = [id(parameter) for parameter in group["params"]]
        if not matrices & set(held):
            continue
        before = [held.index(id(sibling)) for sibling in siblings[:place] if id(sibling) in held]
        after = [held.index(id(sibling)) for sibling in siblings[place + 1 :] if id(sibling) in held]
        group["params"].insert(max(before) + 1 if before else min(after), new)
        return
    raise ValueError(f"no matrix of {type(mixer).__name__} is in the optimizer, so a new one has no group to join")


def remove_parameters(optimizer: torch.optim.Optimizer, removed: list[nn.Parameter]) -> None:
    """Remove parameters, of any shapes, and their state from the optimizer."""
    gone = {id(parameter) for parameter in removed}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in removed:
        optimizer.state.pop(parameter, None)
