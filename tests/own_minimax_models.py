"""Small MiniMax models, stock and own, that several tests share."""

import torch
from own_delta_models import IDS, PURE, lively
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from hf_compressm import CompreSSMMiniMaxConfig, CompreSSMMiniMaxForCausalLM

__all__ = ["FIELDS", "IDS", "KEYS", "PURE", "config", "own", "stock"]
KEYS = 8
FIELDS = {
    **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    # All experts for every token, so that rounding cannot choose another one.
    **{"head_dim": KEYS, "intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 2, "block_size": 4},
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    # That of transformers' default does not run in float64.
    **{"experts_implementation": "eager", "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
}


def config(**fields):
    return CompreSSMMiniMaxConfig(**(FIELDS | fields))


def own(seed=0, **fields):
    """A model in evaluation mode, with weights that do something."""
    torch.manual_seed(seed)
    return lively(CompreSSMMiniMaxForCausalLM(config(**fields))).eval()


def stock(**fields):
    torch.manual_seed(0)
    return lively(MiniMaxForCausalLM(MiniMaxConfig(**(FIELDS | fields)))).eval()
