"""Configuration of this package's Mamba models."""

from __future__ import annotations

from typing import Any

from transformers import MambaConfig

from ..selective_config import SelectiveConfig


class CompreSSMMambaConfig(SelectiveConfig, MambaConfig):
    """transformers' `MambaConfig` with a state size for each layer.

    Args:
        state_sizes: states N >= 1 of every layer; one number stands for all, None for `state_size`.
        num_channels: channels of continuous input, for models that read `input_values` (B, L, num_channels) in place of
            token ids; None for token ids.
        pooling: what a classifier reads, the "mean" over real positions or the "last" of them.
        compression_history: which states were removed when, written by the compression code.
        **kwargs: fields of `MambaConfig`.

    Raises:
        ValueError: if state sizes are not one for each layer, or a name is unknown.
    """

    model_type = "compressm_mamba"

    state_sizes: Any = None
    num_channels: int | None = None
    pooling: str = "last"
    compression_history: Any = None


__all__ = ["CompreSSMMambaConfig"]
