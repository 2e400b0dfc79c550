"""Small causal language models of every stock family with selective layers, and what their mixers give the scan."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from hf_compressm.surgery import find_mixers

PLACE = Path(__file__).resolve().parents[1] / "scripts/benchmarks/stock_families.py"
SPEC = importlib.util.spec_from_file_location("stock_families", PLACE)
FAMILIES = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(FAMILIES)

_TOKENS = {"vocab_size": 64, "pad_token_id": None}
_HYBRID = _TOKENS | {"num_key_value_heads": 2}
_FINE = {"mamba_chunk_size": 8}
CHANGES = {
    "mamba": _TOKENS,
    "falcon_mamba": _TOKENS,
    "mamba2": _TOKENS | {"n_groups": 2, "chunk_size": 8, "use_bias": True},
    "jamba": _HYBRID
    | {"num_hidden_layers": 4, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"num_experts": 2, "num_experts_per_tok": 2},
    "bamba": _HYBRID | _FINE | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2},
    "zamba2": _TOKENS
    | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "chunk_size": 8},
    "nemotron_h": _HYBRID | {"n_groups": 2, "chunk_size": 8},
    "falcon_h1": _HYBRID | _FINE | {"ssm_multipliers": [0.9, 0.8, 0.7, 1.2, 1.1], "ssm_in_multiplier": 1.3},
    "granitemoehybrid": _HYBRID | _FINE | {"shared_intermediate_size": 32},
}
"""What differs from the benchmarks' models: a smaller vocabulary, more groups and layers, experts, biases."""

CONFIGS = {name: partial(FAMILIES.stock_config, name, 32, 16, **changes) for name, changes in CHANGES.items()}
"""Name -> config."""


def lively(model, seed=2):
    """The model with weights of its mixers that make the state-space path count beside the others."""
    generator = torch.Generator().manual_seed(seed)
    for site in find_mixers(model):
        for name, parameter in site.mixer.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.data.normal_(std=1.5 * parameter[0].numel() ** -0.5, generator=generator)
            elif "A_log" not in name:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def given_to_scan(model, mixer, ids, mask):
    """What a mixer gets, hidden states and mask, and the names and values of what transformers' code scans."""
    module, seen, inputs = sys.modules[type(mixer).__module__], [], []
    name = "mamba_selective_scan" if hasattr(module, "mamba_selective_scan") else "mamba2_chunk_scan"
    scan = getattr(module, name)

    def spy(*args, **kwargs):
        seen.append((args[:5], kwargs))
        return scan(*args, **kwargs)

    keep = lambda mixer, args, kwargs: inputs.append((args, kwargs))  # noqa: E731
    handle = mixer.register_forward_pre_hook(keep, with_kwargs=True)
    setattr(module, name, spy)
    try:
        model(ids, attention_mask=mask, use_cache=False)
    finally:
        setattr(module, name, scan)
        handle.remove()
    (u, dt, A, B, C), options = seen[0]
    if name == "mamba_selective_scan":
        dt = F.softplus(dt + options["delta_bias"][..., None]).transpose(1, 2)
        u, B, C = u.transpose(1, 2), B.transpose(1, 2)[:, :, None], C.transpose(1, 2)[:, :, None]
    else:
        width = u.shape[3]
        dt = F.softplus(dt + options["dt_bias"]).clamp(*options["dt_limit"])
        u, dt, A = u.flatten(2), dt.repeat_interleave(width, 2), A.repeat_interleave(width)[:, None]
    args, kwargs = inputs[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden, kwargs.get("attention_mask"), {"u": u, "dt": dt, "A": A, "B": B, "C": C}
