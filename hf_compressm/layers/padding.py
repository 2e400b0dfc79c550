"""Reorders sequences with padding anywhere so that the real tokens of each come first, and back.

Shapes: batch B, length L, features H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RealFirst:
    """An order of tokens for each sequence of a batch.

    Attributes:
        real: bool (B, L), True where a token in the new order is real: the first ones of each sequence.
        counts: (B,), the number of real tokens.
        order, back: (B, L), at which old place each new token is, and the reverse.
    """

    real: Tensor
    counts: Tensor
    order: Tensor
    back: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor | None, hidden_states: Tensor) -> RealFirst | None:
        """The order for hidden states (B, L, H); None without a mask.

        Args:
            attention_mask: (B, L) or longer, of which the last L columns count; zero at padding.
        """
        if attention_mask is None:
            return None
        batch, length = hidden_states.shape[:2]
        padding = (attention_mask[:, -length:].to(hidden_states.device) == 0).expand(batch, -1)
        counts, places = (~padding).sum(1), torch.arange(length, device=padding.device)
        real = places < counts[:, None]
        if torch.compiler.is_exporting():  # ONNX has no stable sort
            back = torch.where(padding, counts[:, None] + padding.cumsum(1), (~padding).cumsum(1)) - 1
            return cls(real, counts, torch.zeros_like(back).scatter(1, back, places.expand(batch, -1)), back)
        order = padding.int().argsort(dim=1, stable=True)
        return cls(real, counts, order, order.argsort(dim=1))

    def bring(self, x: Tensor) -> Tensor:
        """Reorder x (B, L, H) so that real tokens come first, with zeros at padding."""
        return self.clear(_take(x, self.order))

    def take_back(self, x: Tensor) -> Tensor:
        """Put x (B, L, H) back into the old order."""
        return _take(x, self.back)

    def to_end(self, x: Tensor) -> Tensor:
        """Reorder x (B, L, H), in the new order, so that real tokens come last."""
        places = torch.arange(x.shape[1], device=x.device) + self.counts[:, None]
        # Not by %, which ONNX has for fixed lengths only.
        return _take(x, torch.where(places < x.shape[1], places, places - x.shape[1]))

    def from_end(self, x: Tensor) -> Tensor:
        """Undo `to_end`, for x (B, L, H)."""
        places = torch.arange(x.shape[1], device=x.device) - self.counts[:, None]
        return _take(x, torch.where(places < 0, places + x.shape[1], places))

    def clear(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Set x (B, L, H), in the new order, to a value at padding, where it then has no gradient."""
        return x.masked_fill(~self.real[..., None], value)


def _take(x: Tensor, places: Tensor) -> Tensor:
    starts = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (places + starts).flatten()).view(x.shape)


def is_scattered(real: Tensor) -> bool:
    """Whether a bool mask (B, L) has padding between real tokens; True while compiling, which reads no values."""
    return torch.compiler.is_compiling() or bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any())
