"""Configuration of this package's MiniMax models."""

from __future__ import annotations

from typing import Any

from transformers import MiniMaxConfig

from ..hybrid_config import LINEAR, check_layers, check_multiple, check_sizes, types_at_interval
from ..remote_code import CarriesCode
from ..selective_config import check_fields, checked_sizes


class CompreSSMMiniMaxConfig(CarriesCode, MiniMaxConfig):
    """transformers' `MiniMaxConfig` with a state size for each layer of lightning attention.

    Args:
        state_sizes: rows r <= head_dim of the states of each linear-attention layer; one number stands for all, None
            for head_dim. Layers with fewer carry a read-in and a read-out matrix (r, head_dim) for each head.
        full_attention_interval: every how many layers softmax attention stands in place of lightning attention; 0 for
            nowhere. It counts only where `layer_types` is not given.
        num_channels: channels of continuous input, for models that read `input_values` (B, L, num_channels) in place of
            token ids; None for token ids.
        pooling: what a classifier reads, the "mean" over real positions or the "last" of them.
        compression_history: which states were removed when, written by the compression code.
        **kwargs: fields of `MiniMaxConfig`; `head_dim` is hidden_size // num_attention_heads by default.

    Raises:
        ValueError: if state sizes are not one for each linear-attention layer, or exceed head_dim; if there is no such
            layer, or one of another type; if numbers of heads do not divide; if a name is unknown.
    """

    model_type = "compressm_minimax"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    state_sizes: Any = None
    full_attention_interval: int = 8
    num_channels: int | None = None
    pooling: str = "last"
    compression_history: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        if self.layer_types is None:
            self.layer_types = types_at_interval(self.num_hidden_layers, self.full_attention_interval)
        check_layers(self)
        check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        linear = self.layer_types.count(LINEAR)
        self.state_sizes = checked_sizes(self.state_sizes, self.head_dim, linear, "linear-attention layers")
        check_sizes(self, "head_dim")
        super().__post_init__(**kwargs)


__all__ = ["CompreSSMMiniMaxConfig"]
