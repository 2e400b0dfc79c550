"""Configuration of this package's Mamba-2 models."""

from __future__ import annotations

from typing import Any

from transformers import Mamba2Config

from ..selective_config import SelectiveConfig


class CompreSSMMamba2Config(SelectiveConfig, Mamba2Config):
    """transformers' `Mamba2Config` with a state size for each layer.

    Args:
        state_size: N, states that the projections and convolutions of all layers provide.
        state_sizes: states r <= N of each layer's scan; one number stands for all, None for N. Layers with fewer than N
            carry a read-in and a read-out matrix (r, N) for each group.
        num_channels: channels of continuous input, for models that read `input_values` (B, L, num_channels) in place of
            token ids; None for token ids.
        pooling: what a classifier reads, the "mean" over real positions or the "last" of them.
        compression_history: which states were removed when, written by the compression code.
        **kwargs: fields of `Mamba2Config`.

    Raises:
        ValueError: if state sizes are not one for each layer, or exceed `state_size`; if a name is unknown.
    """

    model_type = "compressm_mamba2"

    state_sizes: Any = None
    num_channels: int | None = None
    pooling: str = "last"
    compression_history: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if max(self.state_sizes) > self.state_size:
            raise ValueError(
                f"state_sizes must not exceed state_size, which the convolution provides; got {self.state_sizes} for "
                f"state_size={self.state_size}"
            )


__all__ = ["CompreSSMMamba2Config"]
