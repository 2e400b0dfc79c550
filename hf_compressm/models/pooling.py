"""Masks of padding, and pooling of positions to one vector for each sequence. B batch, L length, H features."""

from __future__ import annotations

import torch
from torch import Tensor

POOLINGS = ("mean", "last")


def mask_of_steps(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """Return the part of a mask that belongs to the present steps; it may also cover cached ones.

    Args:
        attention_mask: (B, L) or, with cached steps, (B, more), nonzero at real positions; None if all are real.
        hidden_states: (B, L, ...).

    Returns:
        (B, L) bool, or None.

    Raises:
        ValueError: if the mask has another shape.
    """
    if attention_mask is None:
        return None
    B, L = hidden_states.shape[:2]
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < L:
        raise ValueError(
            f"attention_mask must have shape (B, L) = {(B, L)}, or more columns for cached positions; got "
            f"{tuple(attention_mask.shape)}"
        )
    return attention_mask[:, -L:].bool()


def padding_of_steps(attention_mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """Return `mask_of_steps` for inputs (B, L) or (B, L, H), or None if all positions are real."""
    mask = mask_of_steps(attention_mask, inputs)
    # Compiled code must not depend on values, and is right with a mask of ones too.
    return None if mask is None or (not torch.compiler.is_compiling() and bool(mask.all())) else mask


def pooled(hidden_states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Pool positions: (B, L, H) -> (B, H).

    Args:
        hidden_states: (B, L, H) floats.
        attention_mask: (B, L), nonzero at real positions, or None if all are real.
        pooling: "mean" over real positions, zero if there is none, or the "last" of them.
    """
    mask = mask_of_steps(attention_mask, hidden_states)
    if pooling == "last":
        if mask is None:
            return hidden_states[:, -1]
        mask = mask.to(hidden_states.device)
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return hidden_states[torch.arange(last.shape[0], device=last.device), last]
    # Half precision loses the small terms of long sums.
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    if mask is None:
        return hidden_states.mean(1, dtype=dtype).to(hidden_states.dtype)
    mask = mask.to(hidden_states.device)
    total = hidden_states.masked_fill(~mask[:, :, None], 0).sum(1, dtype=dtype)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)
