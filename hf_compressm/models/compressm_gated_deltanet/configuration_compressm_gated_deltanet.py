"""Configuration of this package's Gated DeltaNet models."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3_5TextConfig

from ..hybrid_config import FULL, LINEAR, check_layers, check_multiple, check_sizes, types_at_interval
from ..remote_code import CarriesCode
from ..selective_config import check_fields, checked_sizes


class CompreSSMGatedDeltaNetConfig(CarriesCode, Qwen3_5TextConfig):
    """transformers' `Qwen3_5TextConfig` with a state size for each linear-attention layer.

    Args:
        state_sizes: rows r <= linear_key_head_dim of the states of each linear-attention layer; one number stands for
            all, None for linear_key_head_dim. Layers with fewer carry a read-in and a read-out matrix
            (r, linear_key_head_dim) for each key head.
        full_attention_interval: every how many layers softmax attention stands in place of linear attention; 0 for
            nowhere. It counts only where `layer_types` is not given.
        num_channels: channels of continuous input, for models that read `input_values` (B, L, num_channels) in place of
            token ids; None for token ids.
        pooling: what a classifier reads, the "mean" over real positions or the "last" of them.
        time_step_min, time_step_max, time_step_floor: range of the time steps of a new model, and their least value.
        compression_history: which states were removed when, written by the compression code.
        **kwargs: fields of `Qwen3_5TextConfig`.

    Raises:
        ValueError: if state sizes are not one for each linear-attention layer, or exceed linear_key_head_dim; if
            there is no such layer, or one of another type; if numbers of heads do not divide; if a name is unknown.
    """

    model_type = "compressm_gated_deltanet"
    base_config_key = ""
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    state_sizes: Any = None
    full_attention_interval: int = 4
    num_channels: int | None = None
    pooling: str = "last"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    compression_history: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        if self.layer_types is None:
            self.layer_types = types_at_interval(self.num_hidden_layers, self.full_attention_interval)
        check_layers(self)
        check_multiple(self, "linear_num_value_heads", "linear_num_key_heads")
        if FULL in self.layer_types:
            check_multiple(self, "num_attention_heads", "num_key_value_heads")
        linear = self.layer_types.count(LINEAR)
        self.state_sizes = checked_sizes(self.state_sizes, self.linear_key_head_dim, linear, "linear-attention layers")
        check_sizes(self, "linear_key_head_dim")
        super().__post_init__(**kwargs)


__all__ = ["CompreSSMGatedDeltaNetConfig"]
