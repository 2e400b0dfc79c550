"""Embeddings of token ids or of continuous values. B batch, L length, H features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..layers.plain import innermost


def make_embeddings(config: Any) -> nn.Module:
    """Return token embeddings, or a linear map from `config.num_channels` continuous channels to H features."""
    if config.num_channels is None:
        return nn.Embedding(config.vocab_size, config.hidden_size)
    return nn.Linear(config.num_channels, config.hidden_size)


def embed_values(embeddings: nn.Module, values: Tensor) -> Tensor:
    """Map continuous values (B, L, num_channels) to (B, L, H), in the dtype of the layer's weight.

    With one channel (B, L) is taken as (B, L, 1).
    """
    layer = innermost(embeddings)
    weight = layer.weight
    if values.ndim == 2 and layer.in_features == 1:
        values = values[:, :, None]
    # A quantised weight holds integers; its layer converts the input itself.
    return embeddings(values.to(weight.dtype) if weight.is_floating_point() else values)


def check_one_input(model: Any, given: int) -> None:
    """Check that exactly one input is given.

    Raises:
        ValueError: if not.
    """
    if given != 1:
        none = ", not none. A Trainer drops columns of the data whose names forward does not take"
        raise ValueError(
            f"give exactly one of {model.main_input_name} and inputs_embeds{none if given == 0 else ', not several'}"
        )
