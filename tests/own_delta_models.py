"""Small Gated DeltaNet models, stock and own, that several tests share."""

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from hf_compressm import CompreSSMGatedDeltaNetConfig, CompreSSMGatedDeltaNetForCausalLM

KEYS = 8
FIELDS = {
    **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": KEYS, "linear_value_head_dim": 8},
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 8},
    **{"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
}
PURE = {"layer_types": ["linear_attention"] * 3}
IDS = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(1))


def config(**fields):
    return CompreSSMGatedDeltaNetConfig(**(FIELDS | fields))


def own(seed=0, **fields):
    """A model in evaluation mode, with weights that do something."""
    torch.manual_seed(seed)
    return lively(CompreSSMGatedDeltaNetForCausalLM(config(**fields))).eval()


def stock(alive=False, **fields):
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**(FIELDS | fields))).eval()
    return lively(model) if alive else model


@torch.no_grad()
def lively(model):
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "read_" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model
