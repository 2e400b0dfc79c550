"""Small selective models, stock and own, that several tests share."""

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm import (
    CompreSSMMamba2Config,
    CompreSSMMamba2ForCausalLM,
    CompreSSMMambaConfig,
    CompreSSMMambaForCausalLM,
)
from hf_compressm.compatibility import mamba2_norm_is_by_group

COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEADS = {"num_heads": 8, "head_dim": 8, "n_groups": 2 if mamba2_norm_is_by_group() else 1, "chunk_size": 8}
STOCK = {"mamba": (MambaForCausalLM, MambaConfig, {}), "mamba2": (Mamba2ForCausalLM, Mamba2Config, HEADS)}
OWN = {
    "mamba": (CompreSSMMambaForCausalLM, CompreSSMMambaConfig, {}),
    "mamba2": (CompreSSMMamba2ForCausalLM, CompreSSMMamba2Config, HEADS),
}
IDS = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(1))


def make(table, kind, seed=0, **fields):
    torch.manual_seed(seed)
    cls, config, extra = table[kind]
    return cls(config(**(COMMON | extra | fields))).eval()


def own(kind, **fields):
    return make(OWN, kind, **({"state_sizes": [3, 8, 5]} | fields))
