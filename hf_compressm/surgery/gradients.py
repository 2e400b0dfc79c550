"""Carry gradients through a cut, so that an accumulation that is under way may go on after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .changes import ParameterChange

logger = logging.get_logger(__name__)


def carried_gradients(
    changes: Mapping[str, ParameterChange], old: Mapping[str, nn.Parameter]
) -> dict[str, Tensor | None]:
    """Gradients (new shape) of replaced parameters in the reduced mixer, by name; None where there was none.

    Args:
        changes: by parameter name within the mixer.
        old: the parameters before the cut, by the same names. A parameter without a gradient counts as one that the
            loss did not depend on.
    """
    return {name: _carried(change, old, old[name]) for name, change in changes.items() if name in old}


def _carried(change: ParameterChange, old: Mapping[str, nn.Parameter], own: nn.Parameter) -> Tensor | None:
    sources = {term.source: old[term.source] for term in change.gradient}
    found = {name: parameter.grad for name, parameter in sources.items() if parameter.grad is not None}
    if not found or not own.requires_grad:
        return None
    like = next(iter(found.values())) if own.grad is None else own.grad
    dtype = torch.promote_types(like.dtype, torch.float32)
    full = {name: torch.zeros_like(parameter, dtype=dtype) for name, parameter in sources.items()}
    full |= {name: gradient.to_dense().to(dtype) for name, gradient in found.items()}
    return change.map_first(full).to(like.dtype).contiguous()


def warn_of_added(path: str, changes: Mapping[str, ParameterChange], present: Iterable[nn.Parameter]) -> None:
    """Warn which parameters are new, and so start without a gradient, if others have gradients (any shape)."""
    added = [name for name, change in changes.items() if not change.gradient]
    if added and any(p.grad is not None and bool(p.grad.to_dense().any()) for p in present):
        logger.warning(
            f"{path} has gradients, and this cut adds {', '.join(added)}, whose gradients nothing on record tells; all "
            "others are carried. In the middle of accumulating a step, cut before its first batch instead; after a "
            "step, ignore this, or call optimizer.zero_grad() first."
        )


def set_gradient(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    """Set a parameter's gradient: (shape of the parameter), of any dtype; or None."""
    if gradient is not None and gradient.dtype != parameter.dtype:
        parameter.grad_dtype = gradient.dtype
    parameter.grad = None if gradient is None else gradient.to(parameter.device)


def drop_gradients(model: nn.Module) -> None:
    """Remove all gradients: those of weights that are gone belong to no other weights."""
    for parameter in model.parameters():
        parameter.grad = None
