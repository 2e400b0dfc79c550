"""From features of positions to features of sequences. B batch, L length, H features."""

from __future__ import annotations

import torch
from torch import Tensor

POOLINGS = ("mean", "last")


def mask_of_steps(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """(B, L) bool for the present steps from a mask that may reach back over cached ones.

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
    """`mask_of_steps` for inputs (B, L) or (B, L, H), and None where all positions are real."""
    mask = mask_of_steps(attention_mask, inputs)
    # Compiled code must not depend on values, and is right with a mask of ones too.
    return None if mask is None or (not torch.compiler.is_compiling() and bool(mask.all())) else mask


def pooled(hidden_states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(B, L, H) -> (B, H): the "mean" over real positions, zero for none, or the "last" of them."""
    mask = mask_of_steps(attention_mask, hidden_states)
    if pooling == "last":
        if mask is None:
            return hidden_states[:, -1]
        mask = mask.to(hidden_states.device)
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return hidden_states[torch.arange(len(last), device=last.device), last]
    # Half precision loses the small terms of long sums.
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    if mask is None:
        return hidden_states.mean(1, dtype=dtype).to(hidden_states.dtype)
    mask = mask.to(hidden_states.device)
    total = hidden_states.masked_fill(~mask[:, :, None], 0).sum(1, dtype=dtype)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)
