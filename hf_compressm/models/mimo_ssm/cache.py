"""Cache of the MimoSSM models: the state of each layer. B batch, N states of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin


class MimoSSMCacheLayer(LinearAttentionCacheLayerMixin):
    """One layer's state, (B, N) complex, after the tokens seen so far; None before the first."""

    is_compileable = False
    is_croppable = False
    dtype: Any
    device: Any

    @property
    def state(self) -> Tensor | None:
        """The state (B, N) complex, or None before the first token."""
        return self.recurrent_states[0]

    @state.setter
    def state(self, value: Tensor | None) -> None:
        # Assigned, not copied in place, so that tensors returned earlier, and their gradients, stay as they were.
        self.recurrent_states[0] = value
        self.is_recurrent_states_initialized[0] = self.has_previous_state[0] = value is not None
        if value is not None:
            self.dtype, self.device = value.dtype, value.device

    @property
    def batch_size(self) -> int:
        """Batch size B, or -1 before the first token."""
        return -1 if self.state is None else self.state.shape[0]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the first update makes the state."""

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Set the state, (B, N) complex, and return it."""
        self.state = recurrent_states
        return recurrent_states

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Refuse: there is no convolution.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a MimoSSM layer has no convolution whose inputs could be cached")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: there are no keys and values.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a MimoSSM layer has a state in place of keys and values")

    def reset(self) -> None:
        """Forget the state."""
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the state of row beam_idx[i]; beam_idx (B,) integers in [0, B)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in the given order; indices (B',) integers in [0, B)."""
        if self.state is not None:
            self.state = self.state[indices.to(self.state.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)

    def activate_past_recording(self) -> None:
        """Do nothing: earlier states are not kept, and `is_croppable` is False."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove no token; a state does not hold the states before it.

        Raises:
            RuntimeError: if tokens are to be removed.
        """
        if tokens_to_remove != 0:
            raise RuntimeError("a recurrent state cannot be rolled back; keep a copy.deepcopy of the cache instead")


class MimoSSMCache(Cache):
    """The state of every layer after the tokens seen so far: (B, N) complex per layer, whatever their number.

    transformers' own cache for recurrent layers does not fit: it counts no tokens, and it regards a state as present
    only after a convolution has written its own.

    Attributes:
        seen_tokens: number of tokens that the states have seen, padding included.
        scaling: location and scale (B, 1, K) by which a model that forecasts has scaled the context; else None.
    """

    layers: Any

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[MimoSSMCacheLayer() for _ in range(num_layers)])
        self.seen_tokens = 0
        self.scaling: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self)}, seen_tokens={self.seen_tokens})"

    @property
    def states(self) -> list[Tensor | None]:
        """The state of every layer, None before the first token."""
        return [layer.state for layer in self.layers]

    @states.setter
    def states(self, states: list[Tensor | None]) -> None:
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that the states have seen, padding included."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length of a mask over all tokens seen and `query_length` new ones, and its offset, 0."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def is_initialized(self) -> bool:
        """Whether the states have seen a token."""
        return self.seen_tokens > 0

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: `generate` skips seen tokens only with caches that are not all linear."""
        return [False] * len(self)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen_tokens, self.scaling = 0, None

    def reorder_cache(self, beam_idx: Any) -> None:
        """Give row i the state of row beam_idx[i]; beam_idx (B,) integers in [0, B)."""
        super().reorder_cache(beam_idx)
        self._change_scaling(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in the given order; indices (B',) integers in [0, B)."""
        super().batch_select_indices(indices)
        self._change_scaling(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._change_scaling(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def _change_scaling(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.scaling is not None:
            location, scale = self.scaling
            self.scaling = change(location), change(scale)
