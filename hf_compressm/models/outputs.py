"""Outputs of models, as objects or tuples."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

from ..compatibility import cache_keyword

CACHE_FIELD = cache_keyword(BaseModelOutputWithPast)
"""The name of the cache in the outputs of the installed transformers."""


def in_form(output: Any, return_dict: bool | None, config: Any) -> Any:
    """Return the output object, or its values as a tuple if `return_dict`, by default the config's, is False."""
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()
