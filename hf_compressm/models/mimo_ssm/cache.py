"""What the MimoSSM models remember of a sequence. B batch, N states of a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache


class MimoSSMCache(Cache):
    """The state of every layer after the tokens seen so far: (B, N) complex per layer, whatever their number.

    The library's own cache for recurrent layers cannot serve: it counts no tokens, and it takes a state for
    present only after a convolution has written its own.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.states: list[Tensor | None] = [None] * num_layers
        self.seen_tokens = 0

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self)}, seen_tokens={self.seen_tokens})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that the states have seen, padding included."""
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.seen_tokens > 0

    @property
    def is_initialized(self) -> bool:
        return self.seen_tokens > 0

    @property
    def batch_size(self) -> int:
        """Batch size B, or -1 before the first token."""
        return -1 if self.states[0] is None else self.states[0].shape[0]

    def reset(self) -> None:
        """Forget everything."""
        self.states = [None] * len(self.states)
        self.seen_tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from the state of row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in the given order."""
        self.states = [
            None if state is None else state.index_select(0, indices.to(state.device)) for state in self.states
        ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.states = [None if state is None else state.repeat_interleave(repeats, dim=0) for state in self.states]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raise RuntimeError: a state does not remember the states before it."""
        raise RuntimeError("a recurrent state cannot be rolled back; keep a copy.deepcopy of the cache instead")
