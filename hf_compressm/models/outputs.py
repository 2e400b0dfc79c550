"""Outputs of models, as objects or tuples."""

from __future__ import annotations

from typing import Any


def in_form(output: Any, return_dict: bool | None, config: Any) -> Any:
    """Return the output object, or its values as a tuple if `return_dict`, by default the config's, is False."""
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()
