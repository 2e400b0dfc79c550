"""Small causal language models of every stock family with a gated delta rule, with states that remember something."""

import copy
import math

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    OlmoHybridConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen4ExpTextConfig,
)

from hf_compressm.surgery import find_mixers

KEYS = 16
_COMMON = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": KEYS, "linear_value_head_dim": 8},
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
_EXPERTS = {
    **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}
_INDEXER = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
    **{"indexer_compress_ratio": 2},
}
CONFIGS = {
    "qwen3_5": lambda: Qwen3_5TextConfig(**_COMMON, head_dim=8, intermediate_size=48),
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(**_COMMON, **_EXPERTS, head_dim=8),
    "qwen3_next": lambda: Qwen3NextConfig(**_COMMON, **_EXPERTS, head_dim=8, intermediate_size=48),
    "qwen4_exp": lambda: Qwen4ExpTextConfig(**_COMMON, **_EXPERTS, **_INDEXER, head_dim=8),
    "olmo_hybrid": lambda: OlmoHybridConfig(**_COMMON, intermediate_size=48),
}
"""Name -> config."""


def make(family: str, seed: int = 0, **fields):
    """The model in evaluation mode; time steps between 0.01 and 0.1, so that states outlast some tokens."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.update(fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed + 2)
    for site in find_mixers(model):
        for parameter in site.mixer.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=2 * parameter[0].numel() ** -0.5, generator=generator)
        steps = torch.exp(torch.rand(4, generator=generator) * math.log(10) + math.log(0.01))
        site.mixer.dt_bias.data = steps + torch.log(-torch.expm1(-steps))
    return model


def with_lora(base, *targets):
    """A copy of the model with LoRA around these layers that does something."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model
