"""What differs between versions of transformers, accelerate, peft, torch and datasets; every other module asks here.

It imports nothing of this package, and these libraries only where a function needs them. What models need of it travels
with saved models, so that their code runs on versions that nobody has pinned.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_KEYWORDS = ("cache", "cache_params", "past_key_values")
"""How transformers names a cache: `cache` from 5.24 on; before that `cache_params` in Mamba's kin, or the third."""

PACKED_KEYWORDS = ("seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
"""What separates sequences that are packed into one."""

HARMLESS_KEYWORDS = frozenset(
    {
        *("output_hidden_states", "output_attentions", "output_router_logits", "return_dict", "use_cache"),
        *("num_items_in_batch", "logits_to_keep", "is_causal", "max_length_q", "max_length_k"),
        *("position_ids", "cache_position", "position_embeddings", "token_type_ids", "mm_token_type_ids"),
    }
)
"""What models hand down to all their layers alike, and what says nothing to a recurrent one."""


def one_cache(owner: Any, **caches: Any) -> Any:
    """The cache among those given under different names; None if there is none.

    Raises:
        TypeError: if two different ones are given.
    """
    given = {name: cache for name, cache in caches.items() if cache is not None}
    first = next(iter(given.values()), None)
    if any(cache is not first for cache in given.values()):
        raise TypeError(f"{type(owner).__name__} was given a cache as {' and another as '.join(given)}; give one")
    return first


def check_keywords(owner: Any, keywords: Mapping[str, Any], remedy: str = "") -> None:
    """Refuse keyword arguments that a recurrent layer would otherwise pass over; None means nothing.

    Args:
        owner: the module that was given them.
        remedy: what else the reader of the message about packed sequences can do.

    Raises:
        ValueError: if they separate sequences that are packed into one.
        TypeError: if there are others than models hand down to all their layers.
    """
    given = [name for name, value in keywords.items() if value is not None and name not in HARMLESS_KEYWORDS]
    if any(name in PACKED_KEYWORDS for name in given):
        raise ValueError(
            f"sequences packed into one are not kept apart by this package's ops ({', '.join(given)}); pass them one "
            f"by one{remedy}"
        )
    if given:
        raise TypeError(
            f"{type(owner).__name__} does not know the keyword {', '.join(given)}, and passing over it could change "
            f"what is computed; leave it out{remedy}"
        )


def cache_keyword(taker: Callable) -> str:
    """The name by which a function of transformers, or a class of outputs, takes a cache.

    Raises:
        RuntimeError: if it takes none by a name that is known here.
    """
    names = inspect.signature(inspect.unwrap(taker)).parameters
    for name in CACHE_KEYWORDS:
        if name in names:
            return name
    raise RuntimeError(f"{taker.__qualname__} takes no cache by any of the names {', '.join(CACHE_KEYWORDS)}")


def takes_any_cache_name(forward: Callable) -> Callable:
    """A forward of transformers that takes a cache by each of its names; with the same signature."""
    keyword = cache_keyword(forward)

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in CACHE_KEYWORDS if name in kwargs}
        if given:
            kwargs[keyword] = one_cache(self, **given)
        return forward(self, *args, **kwargs)

    return renamed
