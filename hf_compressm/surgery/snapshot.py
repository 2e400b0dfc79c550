"""Undo a cut: copy a model, its optimizer and its history, and restore the copy."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .adapters.base import find_mixers
from .gradients import set_gradient
from .history import history, set_history
from .optimizer import unwrap_optimizer
from .parameters import outside_inference_mode
from .resize import resize_mixers


@dataclass(frozen=True)
class Snapshot:
    """Everything needed to undo a cut, copied to the CPU. Made of tensors and plain data, so `torch.save` takes it.

    Attributes:
        tensors: the model's state dict.
        sizes: mixer name -> number of states.
        optimizer: the optimizer's state by position of the parameter, as in its state dict; empty without one.
        history: the compression history at the time.
        gradients: by parameter name, of those that had one.
    """

    tensors: dict[str, Tensor]
    sizes: dict[str, int]
    optimizer: dict[int, dict[str, Any]]
    history: list[dict[str, Any]]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    @outside_inference_mode
    def take(cls, model: nn.Module, optimizer: Any = None) -> Snapshot:
        """Copy the present state of a model, its gradients and its optimizer."""
        state = {} if optimizer is None else unwrap_optimizer(optimizer).state_dict()["state"]
        return cls(
            tensors=to_cpu(model.state_dict()),
            sizes={site.name: site.state_size for site in find_mixers(model)},
            optimizer=to_cpu(state),
            history=history(model),
            gradients=to_cpu({name: p.grad for name, p in model.named_parameters() if p.grad is not None}),
        )

    @outside_inference_mode
    def restore(self, model: nn.Module, optimizer: Any = None) -> None:
        """Restore weights, gradients, optimizer state and history. Learning rates and schedules go on."""
        inner = None if optimizer is None else unwrap_optimizer(optimizer)
        resize_mixers(model, self.sizes, inner)
        model.load_state_dict(self.tensors)
        if inner is not None:
            groups = inner.state_dict()["param_groups"]
            inner.load_state_dict({"state": copy.deepcopy(self.optimizer), "param_groups": groups})
        for name, parameter in model.named_parameters():
            set_gradient(parameter, self.gradients.get(name))
        set_history(model, copy.deepcopy(self.history))


def to_cpu(tree: Any) -> Any:
    """A copy of a mapping in which all tensors are copies on the CPU."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), dict(tree))
