"""Small causal language models of every stock family with selective layers: name -> config."""

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
