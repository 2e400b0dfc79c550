"""Registers custom ops whose arguments are the fields of NamedTuples, so that a long signature is written once.

A differentiable op is two custom ops: one for the forward pass, and one that computes the gradients of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "SymInt", float: "float", str: "str"}


def custom_op(name: str, *groups: type, returns: int, fake: Callable) -> Callable[[Callable], Any]:
    """Decorator that registers a function as the custom op `hf_compressm::<name>`.

    The function takes one NamedTuple of each group; the op takes the fields of all of them, one after the other.

    Args:
        name: of the op.
        groups: NamedTuple classes with fields of the types Tensor, Tensor | None, bool, int, float and str.
        returns: number of tensors that the function returns, >= 1: as a tuple if there are several.
        fake: function with the same arguments that returns empty tensors with the shapes and dtypes of the results.

    Returns:
        The decorator, which returns the op.
    """
    fields = [(field, _SCHEMA_TYPES[kind]) for group in groups for field, kind in get_type_hints(group).items()]
    arguments = ", ".join(f"{kind} {field}" for field, kind in fields)
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * returns)})"
    sizes = [len(get_type_hints(group)) for group in groups]

    def flat(function: Callable) -> Callable:
        def call(*values: Any) -> Any:
            parts = []
            for group, size in zip(groups, sizes, strict=True):
                parts.append(group(*values[:size]))
                values = values[size:]
            return function(*parts)

        return call

    def register(function: Callable) -> Any:
        op = torch.library.custom_op(f"hf_compressm::{name}", flat(function), mutates_args=(), schema=schema)
        op.register_fake(flat(fake))
        return op

    return register


def register_gradient(op: Any, backward: Any, arguments: type, saved: Callable, outputs: int) -> None:
    """Make a custom op differentiable by another one.

    `backward` takes the gradients of the op's first `outputs` outputs, each None if nothing flows back through it, and
    then the values that `saved` returns. It returns a gradient for each tensor argument of the op, in their order.

    Args:
        op: what `custom_op` returned for the forward pass.
        backward: what it returned for the backward pass.
        arguments: the NamedTuple class of the op's arguments, tensors first.
        saved: function of (an instance of `arguments`, the tuple of outputs) that returns what the backward pass needs:
            first tensors or None, then settings.
        outputs: how many outputs have a gradient.
    """

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        found = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*found[outputs:])
        ctx.set_materialize_grads(False)
        kept = saved(arguments(*inputs), found)
        tensors = [value for value in kept if value is None or isinstance(value, Tensor)]
        ctx.settings = tuple(kept[len(tensors) :])
        ctx.dtypes = [value.dtype if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors)

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple:
        found = backward(*gradients[:outputs], *ctx.saved_tensors, *ctx.settings)
        each = zip(found, ctx.dtypes, ctx.needs_input_grad, strict=False)
        wanted = [gradient.to(dtype) if needed else None for gradient, dtype, needed in each]
        return (*wanted, *[None] * (len(ctx.dtypes) - len(wanted)))

    op.register_autograd(differentiate, setup_context=save)


def empty_gradients(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """New tensors of the shapes and dtypes of others, of any shape, contiguous; without entries in place of None.

    This is the fake of `fitted_gradients`. The first tensor must not be None.
    """
    spare = tensors[0]
    assert spare is not None
    return tuple(spare.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in tensors)


def fitted_gradients(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Gradients of tensors in the tensors' dtypes, contiguous; a tensor without entries in place of None.

    Args:
        gradients: each of the shape of its tensor; anything where the tensor is None.
        tensors: of any shape, the first of them not None.
    """
    spare = tensors[0]
    assert spare is not None
    return tuple(
        spare.new_empty(0) if tensor is None or gradient is None else gradient.to(tensor.dtype).contiguous()
        for gradient, tensor in zip(gradients, tensors, strict=True)
    )
