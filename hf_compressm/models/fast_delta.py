"""Run stock gated delta-rule mixers by this package's recurrence: transformers' forward with two functions exchanged.

Shapes: batch B, length L, G key heads of size K, H value heads of size V.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import accelerate

from ..compatibility import cache_keyword
from ..layers.gated_delta import unit_vectors
from ..layers.mixer import recurrent_state
from ..ops.gated_delta_scan import gated_delta_scan, gated_delta_step


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **ignored: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gated delta rule with the signature of transformers' functions, which ignore other keywords too.

    What separates packed sequences does not come here: the mixer's forward has refused it.

    Args:
        query, key: (B, L, G, K).
        value: (B, L, H, V).
        g, beta: (B, L, H), log decay <= 0 and write strength.
        initial_state: (B, H, K, V), or None for zero. It is updated in place by a single token without gradients.
        output_final_state: whether the state is wanted.
        use_qk_l2norm_in_kernel: whether queries and keys are divided by their lengths here.

    Returns:
        (B, L, H, V) in value's dtype, and (B, H, K, V) or None.

    Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464.
    """
    if use_qk_l2norm_in_kernel:
        query, key = unit_vectors(query), unit_vectors(key)
    tensors = (query, key, value, g, beta)
    if initial_state is not None and value.shape[1] == 1 and not torch.is_grad_enabled():
        q, k, v, decay, strength = (part[:, 0] for part in tensors)
        output = gated_delta_step(q, k, v, decay, strength, initial_state)[:, None]
        return output.to(value.dtype), initial_state if output_final_state else None
    output, state = gated_delta_scan(*tensors, initial_state=initial_state)
    return output, state if output_final_state else None


FUNCTIONS = {"torch_chunk_gated_delta_rule": delta_rule, "torch_recurrent_gated_delta_rule": delta_rule}
"""Functions in a modeling module of transformers, and what takes their place."""


def missing_functions(stock: type) -> list[str]:
    """Name what a stock mixer's module lacks of the functions that are exchanged."""
    module = sys.modules[stock.__module__]
    return [f"{stock.__module__}.{name}" for name in FUNCTIONS if not hasattr(module, name)]


def delta_forward(used: list[str], stock: type) -> Callable:
    """Build a stock mixer's forward with this package's recurrence in place of transformers'.

    Args:
        used: names of layers whose weights it uses without calling them; accelerate may have offloaded these.
        stock: the transformers class.
    """
    original: Any = inspect.unwrap(stock.forward)  # type: ignore[attr-defined]
    exchanged = FunctionType(
        original.__code__, {**original.__globals__, **FUNCTIONS}, original.__name__, original.__defaults__,
        original.__closure__,
    )  # fmt: skip
    exchanged.__kwdefaults__ = original.__kwdefaults__
    keyword = cache_keyword(original)
    position = list(inspect.signature(original).parameters).index(keyword) - 2  # behind self and hidden_states

    @functools.wraps(original)
    def checked(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_cache(self, args[position] if len(args) > position else kwargs.get(keyword))
        return exchanged(self, hidden_states, *args, **kwargs)

    return accelerate.force_accelerate_hooks(used)(checked)


def check_cache(mixer: Any, cache: Any) -> None:
    """Check that a cache is not from before a cut.

    Raises:
        ValueError: if its states (B, H, K, V) have another K or V than the mixer.
    """
    state, sizes = recurrent_state(cache, mixer.layer_idx), (mixer.head_k_dim, mixer.head_v_dim)
    if state is not None and state.shape[-2:] != sizes:
        raise ValueError(
            f"the cached states of {type(mixer).__name__} have {state.shape[-2]} key and {state.shape[-1]} value "
            f"channels, and the layer has {sizes[0]} and {sizes[1]}. A cache from before a cut does not fit the model "
            "after it; begin with a new one."
        )
