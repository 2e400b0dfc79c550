"""Convert transformers' Mamba, Mamba-2, Qwen3.5 and MiniMax to this package's models and back; outputs stay equal."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2Model,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MiniMaxModel,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3_5TextModel,
)

from ..compatibility import mamba2_norm_is_by_group
from .compressm_gated_deltanet import (
    CompreSSMGatedDeltaNetConfig,
    CompreSSMGatedDeltaNetForCausalLM,
    CompreSSMGatedDeltaNetModel,
)
from .compressm_mamba import CompreSSMMambaConfig, CompreSSMMambaForCausalLM, CompreSSMMambaModel
from .compressm_mamba2 import CompreSSMMamba2Config, CompreSSMMamba2ForCausalLM, CompreSSMMamba2Model
from .compressm_minimax import CompreSSMMiniMaxConfig, CompreSSMMiniMaxForCausalLM, CompreSSMMiniMaxModel

Tensors = dict[str, Tensor]

_PAIRS: dict[type, tuple[type, type]] = {
    MambaForCausalLM: (CompreSSMMambaForCausalLM, CompreSSMMambaConfig),
    MambaModel: (CompreSSMMambaModel, CompreSSMMambaConfig),
    Mamba2ForCausalLM: (CompreSSMMamba2ForCausalLM, CompreSSMMamba2Config),
    Mamba2Model: (CompreSSMMamba2Model, CompreSSMMamba2Config),
    Qwen3_5ForCausalLM: (CompreSSMGatedDeltaNetForCausalLM, CompreSSMGatedDeltaNetConfig),
    Qwen3_5TextModel: (CompreSSMGatedDeltaNetModel, CompreSSMGatedDeltaNetConfig),
    MiniMaxForCausalLM: (CompreSSMMiniMaxForCausalLM, CompreSSMMiniMaxConfig),
    MiniMaxModel: (CompreSSMMiniMaxModel, CompreSSMMiniMaxConfig),
}
_CONFIGS = (MambaConfig, Mamba2Config, Qwen3_5TextConfig, MiniMaxConfig)
_MATRICES = (Qwen3_5TextConfig, MiniMaxConfig)
"""Those with a matrix as state, beside which softmax attention may stand."""
_STOCK = {
    own: (stock, next(config for config in _CONFIGS if issubclass(own_config, config)))
    for stock, (own, own_config) in _PAIRS.items()
}
OWN_FIELDS = ("state_sizes", "num_channels", "pooling", "compression_history")
OWN_MATRIX_FIELDS = (*OWN_FIELDS, "full_attention_interval", "time_step_min", "time_step_max", "time_step_floor")
DECAYS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""What stock lightning attention saves besides its weights; it follows from the config."""
DROPPED = ("model_type", "architectures", "transformers_version", "auto_map")


def from_stock(model: PreTrainedModel | str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Build this package's model with the weights of a stock Mamba, Mamba-2, Qwen3.5 or MiniMax, with equal outputs.

    All fields of the config and the settings of generation are copied. Outputs differ in three cases, in which
    transformers' PyTorch code is wrong: a single token after cached ones has its time step clamped to
    `time_step_limit`, as all others have; padding changes neither the cache nor, with `use_bias`, the convolution; and
    beam search of a MiniMax takes the states of lightning attention along with their beams.

    Args:
        model: `MambaForCausalLM`, `MambaModel`, `Mamba2ForCausalLM`, `Mamba2Model`, `Qwen3_5ForCausalLM`,
            `Qwen3_5TextModel`, `MiniMaxForCausalLM` or `MiniMaxModel`, or the folder or hub name of one.
        **kwargs: for `from_pretrained`, if a name is given.

    Returns:
        The model of the corresponding class, on the same device and in the same dtype, with tensors of its own.

    Raises:
        TypeError: if the model is of another class; compress hybrids and other families as they are.
        ValueError: if the named model has another architecture; if the config has other layer types, or an activation
            with parameters; if the model is quantized; if a Mamba-2 has several groups and transformers is older than
            5.23, which normalises them in another way; if a MiniMax has other decays than its config says.
    """
    stock: Any = _load(model, kwargs) if isinstance(model, str | os.PathLike) else model
    if type(stock) not in _PAIRS:
        raise TypeError(
            f"{type(stock).__name__} has no counterpart with a state size per layer; supported are "
            f"{', '.join(cls.__name__ for cls in _PAIRS)}. Other classes are compressed as they are, all layers alike."
        )
    matrices = isinstance(stock.config, _MATRICES)
    if not matrices and (others := sorted(set(stock.config.layer_types) - {"linear_attention"})):
        raise ValueError(f"the model has layers of types {', '.join(others)}; only pure Mamba models can be converted")
    _refuse_quantized(stock)
    _require_equal_norms(stock.config)
    own_class, config_class = _PAIRS[type(stock)]
    tensors = _renamed(stock.state_dict(), "model.", "backbone.") if matrices else stock.state_dict()
    _require_known_decays(stock)
    tensors = {name: value for name, value in tensors.items() if name.rpartition(".")[2] not in DECAYS}
    return _rebuilt(stock, own_class, config_class, _fields(stock.config), tensors)


def to_stock(model: PreTrainedModel, state_size: int | None = None) -> PreTrainedModel:
    """Build a plain transformers Mamba, Mamba-2, Qwen3.5 or MiniMax with the same outputs, which any tool loads.

    Layers of a Mamba or Mamba-2 with fewer states than others get further states with zero input and zero output.

    Args:
        model: this package's Mamba, Mamba-2, Gated DeltaNet or MiniMax, as `ForCausalLM` or without a head.
        state_size: number of states of all layers of the result, at least that of the largest layer, which is the
            default. Multiples of 16 suit GPU kernels.

    Returns:
        The stock model, on the same device and in the same dtype, with tensors of its own.

    Raises:
        TypeError: if the model is of another class; a classifier's head has no stock class.
        ValueError: if `state_size` is too small, or given for a Gated DeltaNet or MiniMax as another one than it has;
            if the model reads continuous values or is quantized; if a layer of a Mamba-2 has a read-in and
            read-out that mix states, or needs further states that its activation would make nonzero; if a Mamba-2 has
            several groups and transformers is older than 5.23; if a layer of a Gated DeltaNet or MiniMax has a read-in
            and read-out at all.
    """
    if type(model) not in _STOCK:
        raise TypeError(
            f"{type(model).__name__} has no stock counterpart; supported are "
            f"{', '.join(cls.__name__ for cls in _STOCK)}. Of a classifier export its `backbone`."
        )
    config: Any = model.config
    if config.num_channels is not None:
        raise ValueError("stock models read token ids; a model with config.num_channels cannot be written as one")
    _refuse_quantized(model)
    _require_equal_norms(config)
    stock_class, config_class = _STOCK[type(model)]
    if issubclass(config_class, _MATRICES):
        _refuse_other_basis(model, state_size)
        fields = {name: value for name, value in _fields(config).items() if name not in OWN_MATRIX_FIELDS}
        return _rebuilt(model, stock_class, config_class, fields, _renamed(model.state_dict(), "backbone.", "model."))
    largest = max(config.state_sizes)
    state_size = largest if state_size is None else state_size
    if state_size < largest:
        raise ValueError(f"state_size must be at least that of the largest layer, {largest}; got {state_size}")
    convert = _mamba2_tensors if issubclass(config_class, Mamba2Config) else _mamba_tensors
    tensors = convert(model, state_size)
    fields = {name: value for name, value in _fields(config).items() if name not in OWN_FIELDS}
    return _rebuilt(model, stock_class, config_class, fields | {"state_size": state_size}, tensors)


def _refuse_other_basis(model: Any, state_size: int | None) -> None:
    """Raise ValueError if a layer with matrices as states was cut, or the states are to be of another size."""
    stock, remedy = (
        ("MiniMax", "")
        if isinstance(model.config, MiniMaxConfig)
        else ("Qwen3.5", ", or compress the stock Qwen3_5ForCausalLM itself")
    )
    size = None
    for name, mixer in model.named_modules():
        if hasattr(mixer, "head_k_dim"):
            size = mixer.head_k_dim
            if mixer.read_in is not None:
                raise ValueError(
                    f"{name} has keys and queries in a basis of their own, read_in and read_out, where a stock {stock} "
                    f"has no such matrices, so it cannot be written as one without loss. Save this package's class "
                    f"instead{remedy}."
                )
    if state_size not in (None, size):
        raise ValueError(f"state_size must be {size}, the size of the model's keys, or None; got {state_size}")


def _require_known_decays(stock: Any) -> None:
    """Raise ValueError if stock lightning attention was loaded with other decays than those of its class."""
    for name, mixer in stock.named_modules():
        if hasattr(mixer, "slope_rate"):
            found, expected = mixer.slope_rate, mixer.get_slope_rate().to(mixer.slope_rate)
            if not torch.allclose(found, expected, rtol=8 * torch.finfo(found.dtype).eps, atol=0):
                raise ValueError(
                    f"{name} has a slope_rate of its own, where this package's class takes the decays that follow from "
                    "num_attention_heads, num_hidden_layers and the layer's place; the model cannot be converted"
                )


def _renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> Tensors:
    """Tensors by names that begin in another way; other names stay."""
    return {new + name.removeprefix(old) if name.startswith(old) else name: value for name, value in tensors.items()}


def _require_equal_norms(config: Any) -> None:
    """Raise ValueError if the installed transformers normalises this Mamba-2 in another way than this package does."""
    if isinstance(config, Mamba2Config) and config.n_groups > 1 and not mamba2_norm_is_by_group():
        raise ValueError(
            f"this Mamba-2 has n_groups={config.n_groups}, which the installed transformers normalises all at once, "
            "and this package, like transformers from 5.23 on, each by itself; outputs would change. Install "
            "transformers 5.23 or newer to convert it."
        )


def _load(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name)
    wanted = (config.architectures or ["none"])[0]
    classes = {cls.__name__: cls for cls in _PAIRS}
    if wanted not in classes:
        raise ValueError(f"{name} holds a model of class {wanted}; supported are {', '.join(classes)}")
    loaded: Any = classes[wanted]
    return loaded.from_pretrained(name, **kwargs)


def _refuse_quantized(model: Any) -> None:
    if (found := getattr(model.config, "quantization_config", None)) is not None:
        method = getattr(found, "quant_method", None) or dict(found).get("quant_method", "unknown")
        raise ValueError(
            f"quantized weights ({getattr(method, 'value', method)}) cannot be taken over; load the model without its "
            "quantization_config, convert it, and quantize the result"
        )


def _fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in DROPPED and name[0] != "_"}


def _rebuilt(model: Any, cls: Any, config_class: Any, fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Build a model of another class with copies of the tensors, each in its own dtype, and tie its tied weights."""
    if issubclass(config_class, Mamba2Config):
        fields = fields | {"time_step_limit": tuple(model.config.time_step_limit)}
    config = config_class(**fields)
    config._experts_implementation = model.config._experts_implementation
    rebuilt = cls(config).to(next(model.parameters()).device)
    for name, parameter in rebuilt.named_parameters():
        parameter.data = parameter.data.to(tensors[name].dtype)
    buffers = {name for name, _ in rebuilt.named_buffers()}
    fixed = {name: value for name, value in rebuilt.state_dict().items() if name in buffers}
    rebuilt.load_state_dict({**fixed, **tensors})
    rebuilt.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        rebuilt.generation_config = copy.deepcopy(model.generation_config)
    return rebuilt.train(model.training)


def _mixers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if name.endswith(".mixer")]


def _mamba_tensors(model: Any, state_size: int) -> Tensors:
    tensors = dict(model.state_dict())
    for name, mixer in _mixers(model):
        missing = state_size - mixer.state_size
        rank, size = mixer.dt_proj.weight.shape[1], mixer.state_size
        step, B, C = mixer.x_proj.weight.detach().split([rank, size, size])
        B, C = (torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) for rows in (B, C))
        tensors[f"{name}.x_proj.weight"] = torch.cat([step, B, C])
        tensors[f"{name}.A_log"] = torch.nn.functional.pad(mixer.A_log.detach(), (0, missing))
    return tensors


def _mamba2_tensors(model: Any, state_size: int) -> Tensors:
    tensors = dict(model.state_dict())
    for name, mixer in _mixers(model):
        kept = _selected(name, mixer)
        if any(len(states) < state_size for states in kept) and mixer.act(torch.zeros(1)).item() != 0:
            raise ValueError(
                f"{name} has fewer than {state_size} states, and with hidden_act={mixer.activation!r} those that would "
                "be added are not zero; save this package's class instead"
            )
        channels, size, groups = mixer.norm.weight.shape[0], mixer.conv_states, mixer.n_groups

        def block(rows: Tensor, kept: list[list[int]] = kept, size: int = size, groups: int = groups) -> Tensor:
            """Take the kept rows of B or C, and add rows of zeros, for which the activation gives zero."""
            parts = []
            for group, states in enumerate(kept):
                found = rows[[group * size + state for state in states]]
                parts.append(torch.cat([found, rows.new_zeros(state_size - len(states), *rows.shape[1:])]))
            return torch.cat(parts)

        for key, lead in {"in_proj.weight": 2, "in_proj.bias": 2, "conv1d.weight": 1, "conv1d.bias": 1}.items():
            if f"{name}.{key}" in tensors:
                old = tensors[f"{name}.{key}"]
                cuts = [lead * channels, groups * size, groups * size]
                head, B, C, tail = old.split([*cuts, len(old) - sum(cuts)])
                tensors[f"{name}.{key}"] = torch.cat([head, block(B), block(C), tail])
        for matrix in ("read_in", "read_out"):
            tensors.pop(f"{name}.{matrix}", None)
    return tensors


def _selected(name: str, mixer: Any) -> list[list[int]]:
    """States of each group that the read-in and read-out select.

    Raises:
        ValueError: if they mix states.
    """
    if mixer.read_in is None:
        return [list(range(mixer.conv_states))] * mixer.n_groups
    chosen = mixer.read_in.argmax(-1)
    rows = torch.nn.functional.one_hot(chosen, mixer.conv_states).to(mixer.read_in)
    if not (torch.equal(rows, mixer.read_in) and torch.equal(rows, mixer.read_out)):
        raise ValueError(
            f"{name} mixes its states in read_in and read_out, behind the convolution and SiLU where a stock Mamba-2 "
            "has no such matrices, so it cannot be written as one without loss. Save this package's class instead, or "
            "compress the stock Mamba2ForCausalLM itself."
        )
    return chosen.tolist()
