"""Small causal language models of every stock family with selective layers, and what their mixers give the scan."""

import sys

import torch
from torch.nn import functional as F
from transformers import (
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    Zamba2Config,
)

from hf_compressm.surgery import find_mixers

_TOKENS = {"vocab_size": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_PURE = _TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 16}
_HYBRID = _TOKENS | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_HEADS = {"mamba_d_state": 16, "mamba_chunk_size": 8}

CONFIGS = {
    "mamba": lambda: MambaConfig(**_PURE),
    "falcon_mamba": lambda: FalconMambaConfig(**_PURE),
    "mamba2": lambda: Mamba2Config(**_PURE, num_heads=4, head_dim=16, n_groups=2, chunk_size=8, use_bias=True),
    "jamba": lambda: JambaConfig(
        **_HYBRID,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=16,
    ),
    "bamba": lambda: BambaConfig(
        **_HYBRID, **_HEADS, num_hidden_layers=3, attn_layer_indices=[1], mamba_n_heads=8, mamba_n_groups=2
    ),
    "zamba2": lambda: Zamba2Config(
        **(_HYBRID | {"num_key_value_heads": 4}),
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=16,
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_expand=2,
        chunk_size=8,
        num_mem_blocks=1,
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **_HYBRID,
        layers_block_type=["mamba", "attention", "mamba", "mlp"],
        head_dim=8,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
    ),
    "falcon_h1": lambda: FalconH1Config(
        **_HYBRID,
        **_HEADS,
        num_hidden_layers=2,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        ssm_multipliers=[0.9, 0.8, 0.7, 1.2, 1.1],
        ssm_in_multiplier=1.3,
    ),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **_HYBRID,
        **_HEADS,
        shared_intermediate_size=32,
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        num_local_experts=0,
        num_experts_per_tok=0,
    ),
}
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
