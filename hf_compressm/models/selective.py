"""What this package's Mamba and Mamba-2 models share: checks of their configs, inputs, initial values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..layers.plain import innermost
from .pooling import POOLINGS

SCHEMES = ("random", "constant")


def checked_sizes(config: Any) -> list[int]:
    """`config.state_sizes` as one integer per layer; None stands for `state_size` everywhere.

    Raises:
        ValueError: if it is not one integer >= 1 for each layer, or `pooling` is unknown.
    """
    sizes, layers = config.state_sizes, config.num_hidden_layers
    sizes = config.state_size if sizes is None else sizes
    sizes = [sizes] * layers if isinstance(sizes, int) else list(sizes)
    if len(sizes) != layers or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(
            f"state_sizes must be one integer >= 1, or a list of one per layer; got {sizes!r} for "
            f"num_hidden_layers={layers}"
        )
    if config.pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {config.pooling!r}")
    return sizes


def check_fields(config: Any) -> None:
    """Raise ValueError if a config's activation or, where it has one, its initialisation scheme is not known."""
    if config.hidden_act not in ACT2FN or has_parameters(config.hidden_act):
        plain = [name for name in sorted(ACT2FN) if not has_parameters(name)]
        raise ValueError(
            f"hidden_act must be an activation without parameters, which transformers' own Mamba would not train: "
            f"{', '.join(plain)}; got {config.hidden_act!r}"
        )
    scheme = getattr(config, "time_step_init_scheme", SCHEMES[0])
    if scheme not in SCHEMES:
        raise ValueError(f"time_step_init_scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")


def has_parameters(activation: str) -> bool:
    """Whether an activation, by transformers' name, has parameters of its own."""
    return activation in ("prelu", "xielu")


def make_embeddings(config: Any) -> nn.Module:
    """Token embeddings, or a linear map of `num_channels` continuous channels."""
    if config.num_channels is None:
        return nn.Embedding(config.vocab_size, config.hidden_size)
    return nn.Linear(config.num_channels, config.hidden_size)


def embedded(embeddings: nn.Module, input_values: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
    """Embeddings (B, L, H) of continuous values (B, L, channels), if there are any.

    Raises:
        ValueError: if the model reads token ids instead, or both kinds of input are given.
    """
    if input_values is None:
        return inputs_embeds
    inner = innermost(embeddings)
    if inputs_embeds is not None or isinstance(inner, nn.Embedding):
        raise ValueError(
            "input_values are for models with config.num_channels, in place of input_ids and inputs_embeds"
        )
    weight = inner.weight  # of integers if it is quantised
    return embeddings(input_values.to(weight.dtype) if weight.is_floating_point() else input_values)


def initialise_convolution_and_output(module: Any, config: Any) -> None:
    """As transformers initialises the convolution and the output projection of Mamba and Mamba-2."""
    init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
    if module.conv1d.bias is not None:
        init.zeros_(module.conv1d.bias)
    init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
    if config.rescale_prenorm_residual:
        init.copy_(module.out_proj.weight, module.out_proj.weight / math.sqrt(config.num_hidden_layers))


@contextmanager
def rows_of_padding_kept(cache: Any, mask: Tensor | None) -> Iterator[None]:
    """A single step in which rows of padding leave a cache as it was; transformers' Mamba-2 drops the mask of one.

    Args:
        cache: of transformers, or None.
        mask: bool (B, L), False at padding, or None if there is none.
    """
    if cache is None or mask is None or mask.shape[1] > 1:
        yield
        return
    layers = [(layer.conv_states, layer.recurrent_states) for layer in cache.layers]
    before = [[None if states[0] is None else states[0].clone() for states in both] for both in layers]
    yield
    padding = ~mask[:, 0]
    for both, kept in zip(layers, before, strict=True):
        for states, old in zip(both, kept, strict=True):
            states[0][padding] = 0 if old is None else old[padding]
