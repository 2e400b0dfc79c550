"""What this package's Mamba and Mamba-2 models share. B batch, L length, H features.

The classes are mixins of transformers' own: blocks, stacks of blocks, and their initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..compatibility import one_cache
from ..layers.plain import innermost
from ..moved import old_names
from .embeddings import check_one_input, embed_values, make_embeddings
from .known_by_name import KnownModel
from .loading import SizesFromConfig
from .pooling import padding_of_steps


class SelectiveBlock:
    """Mixin of transformers' blocks, x + mixer(norm(x)), that builds this package's mixer."""

    norm_class: Any
    mixer: Any
    make_mixer: Callable[[Any, int], nn.Module]

    def __init__(self, config: Any, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)  # type: ignore[arg-type]
        self.config = config
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = self.norm_class(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = self.make_mixer(config, layer_idx)


class SelectivePreTrained(SizesFromConfig):
    """Mixin of PreTrainedModels: initialisation of layers as in transformers, with state sizes of their own."""

    config: Any
    mixer_class: Any

    def __init__(self, config: Any) -> None:
        # Not that of the stock model, which would build its own blocks first.
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, self.mixer_class):
            for name, value in self._initial_values(module).items():
                init.copy_(module.get_parameter(name), value)
            _initialise_convolution_and_output(module, self.config)

    def _initial_values(self, mixer: Any) -> dict[str, Tensor]:
        return mixer.initial_values()


class SelectiveModel(KnownModel):
    """Mixin of transformers' stacks of blocks, which also read `input_values` if the config has `num_channels`.

    `stock_forward` is the forward of the transformers class, which takes a cache by each of its names.
    """

    block_class: Any
    embeddings: Any
    stock_forward: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.embeddings = make_embeddings(config)
        self.layers = nn.ModuleList([self.block_class(config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.norm_f = self.block_class.norm_class(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the features (B, L, H) of every position, as transformers' model does, with exact padding.

        Args:
            input_ids: (B, L) integers, or inputs_embeds (B, L, H).
            cache_params, cache: one of the two, by the names that versions of transformers use.
            attention_mask: (B, L), zero at padding; of a longer one the last L columns count. Padding, wherever it
                is, leaves no trace in other positions or the cache.
            input_values: (B, L, num_channels) floats, if the config has `num_channels`.
            use_cache, output_hidden_states, return_dict, **kwargs: as in transformers.

        Raises:
            ValueError: if not exactly one input is given, or one that the config does not provide for, or a mask of
                another shape.
            TypeError: if two different caches are given.
        """
        if input_values is not None:
            if inputs_embeds is not None or isinstance(innermost(self.embeddings), nn.Embedding):
                raise ValueError(
                    "input_values are for models with config.num_channels, in place of input_ids and inputs_embeds"
                )
            inputs_embeds = embed_values(self.embeddings, input_values)
        check_one_input(self, (input_ids is not None) + (inputs_embeds is not None))
        inputs: Any = inputs_embeds if input_ids is None else input_ids
        attention_mask = padding_of_steps(attention_mask, inputs)
        cache = one_cache(self, cache=cache, cache_params=cache_params)
        return self._run_stock(
            cache,
            attention_mask,
            use_cache,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )

    def _run_stock(self, cache: Any, mask: Tensor | None, use_cache: bool | None, **inputs: Any) -> Any:
        return self.stock_forward(cache=cache, attention_mask=mask, use_cache=use_cache, **inputs)


def _initialise_convolution_and_output(module: Any, config: Any) -> None:
    """As transformers initialises the convolution and the output projection of Mamba and Mamba-2."""
    init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
    if module.conv1d.bias is not None:
        init.zeros_(module.conv1d.bias)
    init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
    if config.rescale_prenorm_residual:
        init.copy_(module.out_proj.weight, module.out_proj.weight / math.sqrt(config.num_hidden_layers))


@contextmanager
def rows_of_padding_kept(cache: Any, mask: Tensor | None) -> Iterator[None]:
    """Let rows of padding leave a cache as it was during a single step; transformers' Mamba-2 drops the mask of one.

    Args:
        cache: of transformers, or None.
        mask: bool (B, L), False at padding, or None if there is none. Nothing happens if L > 1.
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


__getattr__ = old_names(__name__)
