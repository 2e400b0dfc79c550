"""What this package's Mamba and Mamba-2 models share: checks of their configs, inputs, pooling, loading."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from ..layers.plain import innermost

POOLINGS = ("mean", "last")


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


def pooled(hidden_states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(B, L, H) -> (B, H): the mean over real positions, or the last of them."""
    if attention_mask is None:
        return hidden_states[:, -1] if pooling == "last" else hidden_states.mean(1)
    mask = attention_mask.to(hidden_states.device).bool()
    if pooling == "last":
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return hidden_states[torch.arange(len(last), device=last.device), last]
    total = hidden_states.masked_fill(~mask[:, :, None], 0).sum(1, dtype=torch.float32)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


def initialise_convolution_and_output(module: Any, config: Any) -> None:
    """As transformers initialises the convolution and the output projection of Mamba and Mamba-2."""
    init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
    if module.conv1d.bias is not None:
        init.zeros_(module.conv1d.bias)
    init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
    if config.rescale_prenorm_residual:
        init.copy_(module.out_proj.weight, module.out_proj.weight / math.sqrt(config.num_hidden_layers))


class SizesFromConfig:
    """Mixin: `from_pretrained` refuses tensors of other sizes than the config says, instead of drawing new ones."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but an error about tensors of another size names them.

        Raises:
            RuntimeError: if tensors of the checkpoint do not have the sizes that the config says, or state matrices
                are missing, unless `ignore_mismatched_sizes`.
        """
        loaded: Any = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        model, info = loaded
        wrong = [
            f"{name} is {tuple(stored)} in the checkpoint, {tuple(expected)} in the model"
            for name, stored, expected in sorted(info["mismatched_keys"])
        ]
        matrices = ("read_in", "read_out")
        wrong += [f"{name} is missing" for name in sorted(info["missing_keys"]) if name.endswith(matrices)]
        wrong += [f"{name} has no place" for name in sorted(info["unexpected_keys"]) if name.endswith(matrices)]
        if wrong and not ignore_mismatched_sizes:
            raise RuntimeError(
                f"the checkpoint {pretrained_model_name_or_path} does not fit its config, whose state_sizes are "
                f"{model.config.state_sizes}: {'; '.join(wrong)}"
            )
        return (model, info) if output_loading_info else model


class SequenceClassification:
    """Mixin: a classifier's forward, over `self.backbone` and `self.score`."""

    config: Any
    backbone: nn.Module
    score: nn.Module
    loss_function: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (B, num_labels) of whole sequences.

        Args:
            input_ids: (B, L), or inputs_embeds (B, L, H), or input_values (B, L, channels).
            attention_mask: (B, L), 1 at real positions, 0 at padding on either side.
            labels: (B,) class indices, (B, num_labels) 0.0 or 1.0 for several labels at once, or floats for
                regression; see `config.problem_type`.
            **kwargs: for the loss.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(pooled(outputs.last_hidden_state, attention_mask, self.config.pooling)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
