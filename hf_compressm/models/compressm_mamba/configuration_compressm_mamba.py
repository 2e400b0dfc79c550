"""Configuration of this package's Mamba models."""

from __future__ import annotations

from typing import Any

from transformers import MambaConfig

from ..remote_code import CarriesCode
from ..selective import check_fields, checked_sizes


class CompreSSMMambaConfig(CarriesCode, MambaConfig):
    """transformers' `MambaConfig` with a state size for each layer.

    Args:
        state_sizes: states N >= 1 of every layer; one number stands for all, None for `state_size`.
        num_channels: channels of continuous input, for models that read `input_values` (B, L, num_channels) in place of
            token ids; None for token ids.
        pooling: what a classifier reads, the "mean" over real positions or the "last" of them.
        compression_history: what was cut when, written by the compression code.
        **kwargs: fields of `MambaConfig`.

    Raises:
        ValueError: if state sizes are not one for each layer, or a name is unknown.
    """

    model_type = "compressm_mamba"
    keys_to_ignore_at_inference = ["cache", "cache_params"]

    state_sizes: Any = None
    num_channels: int | None = None
    pooling: str = "last"
    compression_history: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        self.state_sizes = checked_sizes(self)
        super().__post_init__(**kwargs)


__all__ = ["CompreSSMMambaConfig"]
