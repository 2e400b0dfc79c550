"""Build small stock models of every family with selective layers, at any hidden size, with two layers of states.

The tests build theirs from here too, with changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 256
Fields = dict[str, Any]
_TOKENS: Fields = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def _pure(hidden: int, states: int) -> Fields:
    return _TOKENS | {"hidden_size": hidden, "num_hidden_layers": 2, "state_size": states}


def _hybrid(hidden: int) -> Fields:
    attention = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return _TOKENS | attention | {"hidden_size": hidden, "intermediate_size": 2 * hidden}


def _width(hidden: int) -> int:
    return 16 if hidden < 256 else 32 if hidden < 1024 else 64


def _mamba2(hidden: int, states: int) -> Fields:
    width = _width(hidden)
    heads = {"num_heads": 2 * hidden // width, "head_dim": width, "n_groups": 1, "chunk_size": 64}
    return {**_pure(hidden, states), **heads}


def _jamba(hidden: int, states: int) -> Fields:
    layers = {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1}
    return {**_hybrid(hidden), **layers, "num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": states}


def _bamba(hidden: int, states: int) -> Fields:
    heads = {"mamba_n_heads": 2 * hidden // _width(hidden), "mamba_d_head": _width(hidden), "mamba_n_groups": 1}
    sizes = {"mamba_d_state": states, "mamba_chunk_size": 64, "num_hidden_layers": 3, "attn_layer_indices": [1]}
    return {**_hybrid(hidden), **heads, **sizes}


def _zamba2(hidden: int, states: int) -> Fields:
    sizes = {"mamba_d_state": states, "mamba_ngroups": 1, "mamba_expand": 2, "chunk_size": 64, "num_mem_blocks": 1}
    layers = {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]}
    return {**_hybrid(hidden), **sizes, **layers, "n_mamba_heads": 2 * hidden // _width(hidden)}


def _nemotron_h(hidden: int, states: int) -> Fields:
    heads = {"mamba_num_heads": 2 * hidden // _width(hidden), "mamba_head_dim": _width(hidden), "n_groups": 1}
    layers = {"layers_block_type": ["mamba", "attention", "mamba", "mlp"], "head_dim": hidden // 4, "chunk_size": 64}
    return {**_hybrid(hidden), **heads, **layers, "ssm_state_size": states}


def _falcon_h1(hidden: int, states: int) -> Fields:
    heads = {"mamba_n_heads": 2 * hidden // _width(hidden), "mamba_d_head": _width(hidden), "mamba_n_groups": 1}
    sizes = {"mamba_d_state": states, "mamba_d_ssm": 2 * hidden, "mamba_chunk_size": 64, "num_hidden_layers": 2}
    return {**_hybrid(hidden), **heads, **sizes}


def _granite(hidden: int, states: int) -> Fields:
    heads = {"mamba_n_heads": 2 * hidden // _width(hidden), "mamba_d_head": _width(hidden), "mamba_n_groups": 1}
    layers = {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "mamba_chunk_size": 64}
    experts = {"shared_intermediate_size": 2 * hidden, "num_local_experts": 0, "num_experts_per_tok": 0}
    return {**_hybrid(hidden), **heads, **layers, **experts, "mamba_d_state": states}


FAMILIES: dict[str, Callable[[int, int], Fields]] = {
    "mamba": _pure,
    "falcon_mamba": _pure,
    "jamba": _jamba,
    "mamba2": _mamba2,
    "bamba": _bamba,
    "zamba2": _zamba2,
    "nemotron_h": _nemotron_h,
    "falcon_h1": _falcon_h1,
    "granitemoehybrid": _granite,
}
"""Model type of each family -> fields of its config for a hidden size (a multiple of 32) and a number of states."""
BY_SELECTIVE_SCAN = ("mamba", "falcon_mamba", "jamba")
"""Families of Mamba's kind; the others are of Mamba-2's."""


def stock_config(family: str, hidden: int, states: int, **changes: Any) -> Any:
    """Make the config of a model with two layers of states, or more by `changes`, other values of its fields."""
    return AutoConfig.for_model(family, **FAMILIES[family](hidden, states) | changes)


def stock_model(family: str, hidden: int, states: int) -> Any:
    """Make a model with two layers of states, in training mode, the same at every call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(stock_config(family, hidden, states)).train()
