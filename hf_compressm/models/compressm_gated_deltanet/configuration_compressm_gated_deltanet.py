"""Configuration of this package's Gated DeltaNet models."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3_5TextConfig

from ..remote_code import CarriesCode
from ..selective_config import check_fields, checked_sizes

LINEAR = "linear_attention"
FULL = "full_attention"


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
            self.layer_types = _types_at_interval(self.num_hidden_layers, self.full_attention_interval)
        _check_layers(self)
        linear = self.layer_types.count(LINEAR)
        self.state_sizes = checked_sizes(self.state_sizes, self.linear_key_head_dim, linear, "linear-attention layers")
        if max(self.state_sizes) > self.linear_key_head_dim:
            raise ValueError(
                f"state_sizes must not exceed linear_key_head_dim, which keys and queries have; got {self.state_sizes} "
                f"for linear_key_head_dim={self.linear_key_head_dim}"
            )
        super().__post_init__(**kwargs)


def _types_at_interval(layers: int, interval: int) -> list[str]:
    """Types of so many layers, softmax attention last among every `interval` of them.

    Raises:
        ValueError: if the interval is negative.
    """
    if interval < 0:
        raise ValueError(f"full_attention_interval must be >= 0, with 0 for no softmax attention; got {interval}")
    return [FULL if interval and (layer + 1) % interval == 0 else LINEAR for layer in range(layers)]


def _check_layers(config: Any) -> None:
    """Check the types of layers and the numbers of heads.

    Raises:
        ValueError: if they do not fit.
    """
    types = config.layer_types
    if len(types) != config.num_hidden_layers or not {*types} <= {LINEAR, FULL} or LINEAR not in types:
        raise ValueError(
            f"layer_types must name {LINEAR} or {FULL} for each of num_hidden_layers={config.num_hidden_layers} "
            f"layers, the former at least once; got {types} (full_attention_interval={config.full_attention_interval})"
        )
    pairs = [("linear_num_value_heads", "linear_num_key_heads")]
    if FULL in types:
        pairs.append(("num_attention_heads", "num_key_value_heads"))
    for many, few in pairs:
        if getattr(config, few) < 1 or getattr(config, many) < 1 or getattr(config, many) % getattr(config, few):
            raise ValueError(
                f"{many} must be a multiple of {few}, both >= 1; got {getattr(config, many)} and {getattr(config, few)}"
            )


__all__ = ["CompreSSMGatedDeltaNetConfig"]
