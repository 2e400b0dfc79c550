"""Every field of the stock configs: values to try beside the default, or why the mixers do not depend on it."""

ACTIVATIONS = ("relu", "sigmoid", "swish")
NO_LIMIT = (0.0, float("inf"))

ELSEWHERE = "read by attention, experts, MLPs, norms or embeddings, which stay transformers' own"
MODEL = "read by the model's forward or by generation, which stay transformers' own"
START = "read only where fresh weights are drawn, which stays transformers' own"
UNREAD = "read by no module"
SHAPE = "seen in the shapes of parameters, which the mixers go by"

EVERY_CONFIG = {
    "architectures": UNREAD,
    "chunk_size_feed_forward": UNREAD,
    "dtype": "that of the parameters",
    "id2label": MODEL,
    "is_encoder_decoder": MODEL,
    "label2id": MODEL,
    "output_hidden_states": MODEL,
    "problem_type": MODEL,
    "return_dict": MODEL,
    "transformers_version": UNREAD,
}

_TOKENS = {
    **dict.fromkeys(("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"), ELSEWHERE),
    **dict.fromkeys(("use_cache", "num_logits_to_keep"), MODEL),
    "initializer_range": START,
}


def _words(text):
    return text.split()


_ATTENTION = dict.fromkeys(
    _words(
        "intermediate_size num_attention_heads num_key_value_heads max_position_embeddings attention_dropout "
        "attention_bias mlp_bias rope_parameters head_dim sliding_window mlp_hidden_act hidden_dropout "
        "attention_in_multiplier attention_out_multiplier key_multiplier mlp_multipliers embedding_multiplier "
        "lm_head_multiplier attention_multiplier residual_multiplier logits_scaling position_embedding_type "
        "use_mem_rope use_long_context num_mem_blocks use_shared_attention_adapter adapter_rank ssm_out_multiplier "
        "num_experts num_experts_per_tok num_local_experts expert_layer_period expert_layer_offset "
        "output_router_logits router_aux_loss_coef shared_intermediate_size z_loss_coefficient n_routed_experts "
        "n_shared_experts moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size "
        "moe_shared_expert_overlap routed_scaling_factor n_group topk_group norm_topk_prob num_nextn_predict_layers "
        "mtp_layers_block_type"
    ),
    ELSEWHERE,
)
_LAYERS = dict.fromkeys(
    _words(
        "hidden_size num_hidden_layers layer_types layers_block_type attn_layer_period attn_layer_offset "
        "attn_layer_indices"
    ),
    SHAPE,
)
_HYBRID = _TOKENS | _ATTENTION | _LAYERS

_START_OF_STEPS = dict.fromkeys(
    ("time_step_scale", "time_step_max", "time_step_init_scheme", "time_step_floor", "rescale_prenorm_residual"), START
)
_IMPLEMENTATION = dict.fromkeys(
    ("use_mambapy", "use_associative_scan", "use_mamba_kernels", "use_mem_eff_path", "mamba_ssm_cache_dtype"),
    "chooses among implementations of the same function",
)

_PURE = {
    **_TOKENS,
    **_LAYERS,
    **_START_OF_STEPS,
    **_IMPLEMENTATION,
    "time_step_min": START,
    "state_size": (5,),
    "layer_norm_epsilon": (0.5,),
    "conv_kernel": (1, 6),
    "use_bias": (True,),
    "use_conv_bias": (False,),
    "hidden_act": ACTIVATIONS,
    "residual_in_fp32": (False,),
    "time_step_rank": (5,),
}
_HEADS = {
    "mamba_d_state": (5,),
    "mamba_d_conv": (1, 6),
    "mamba_conv_bias": (False,),
    "mamba_proj_bias": (True,),
    "rms_norm_eps": (0.5,),
    "hidden_act": ACTIVATIONS,
    "mamba_n_groups": (4,),
    "mamba_chunk_size": (5,),
    "time_step_limit": ((0.05, 0.5),),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_expand", "mamba_d_ssm"), SHAPE),
}
_REJECTED_HEADS = ("time_step_limit", "mamba_n_groups", "mamba_chunk_size", "mamba_n_heads", "mamba_d_head")

FIELDS = {
    "mamba": _PURE | {"expand": (3,)},
    "falcon_mamba": _PURE | {"expand": (3,), "mixer_rms_eps": (0.5,)},
    "mamba2": _PURE
    | {
        "n_groups": (1, 4),
        "chunk_size": (5,),
        "time_step_limit": ((0.05, 0.5), (0.0, 0.01)),
        "time_step_rank": UNREAD,
        **dict.fromkeys(("num_heads", "head_dim", "expand"), SHAPE),
    },
    "jamba": _HYBRID
    | _IMPLEMENTATION
    | {name: value for name, value in _HEADS.items() if name not in _REJECTED_HEADS}
    | {"mamba_dt_rank": (5,), "mamba_expand": (4,)},
    "bamba": _HYBRID | _HEADS,
    "falcon_h1": _HYBRID
    | _HEADS
    | {
        "mamba_rms_norm": (True, False),
        "mamba_norm_before_gate": (False,),
        "projectors_bias": (True,),
        "ssm_multipliers": ([1.0, 2.0, 3.0, 0.5, 0.7],),
        "ssm_in_multiplier": (0.3,),
    },
    "granitemoehybrid": _HYBRID | _HEADS,
    "zamba2": _HYBRID
    | _IMPLEMENTATION
    | {
        "mamba_d_state": (5,),
        "mamba_d_conv": (1, 6),
        "mamba_ngroups": (2,),
        "use_conv_bias": (False,),
        "add_bias_linear": (True,),
        "chunk_size": (5,),
        "time_step_min": (0.05,),
        "rms_norm_eps": (0.5,),
        "hidden_act": ("relu",),
        **dict.fromkeys(("mamba_expand", "n_mamba_heads"), SHAPE),
        **dict.fromkeys(("time_step_max", "time_step_floor"), UNREAD),
    },
    "nemotron_h": _HYBRID
    | _START_OF_STEPS
    | _IMPLEMENTATION
    | {
        "ssm_state_size": (5,),
        "conv_kernel": (1, 6),
        "use_conv_bias": (False,),
        "use_bias": (True,),
        "mamba_hidden_act": ACTIVATIONS,
        "n_groups": (1,),
        "chunk_size": (5,),
        "layer_norm_epsilon": (0.5,),
        "time_step_min": (0.05,),
        "residual_in_fp32": (True,),
        "time_step_limit": ((0.05, 0.5),),
        "mamba_proj_bias": (True,),
        **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "expand"), SHAPE),
    },
}
"""Family -> field -> values to try, or the reason why none are."""

OWN = {
    "vocab_size": (37,),
    "pad_token_id": (3, None),
    "bos_token_id": (4,),
    "eos_token_id": (7, [7, 8]),
    "tie_word_embeddings": (True, False),
    "use_cache": (True, False),
    "initializer_range": (0.5,),
    "state_size": (5,),
    "num_hidden_layers": (2, 1),
    "layer_norm_epsilon": (0.5,),
    "conv_kernel": (1, 6),
    "use_bias": (True,),
    "use_conv_bias": (False,),
    "hidden_act": (*ACTIVATIONS, "gelu", "relu2"),
    "residual_in_fp32": (False,),
    "time_step_rank": (5,),
    "time_step_min": (0.01,),
    "time_step_max": (0.5,),
    "time_step_floor": (0.05,),
    "rescale_prenorm_residual": (True,),
    "id2label": ({0: "a", 1: "b", 2: "c"},),
    "output_hidden_states": (True,),
    "problem_type": ("regression",),
    "return_dict": (False,),
    "chunk_size_feed_forward": (3,),
    "is_encoder_decoder": "decided by the class",
    "architectures": "the class's own",
    "transformers_version": "that which is installed",
    "label2id": "follows id2label",
    "dtype": "that of the parameters",
}
OWN_FIELDS = {
    "mamba": OWN
    | {
        "hidden_size": (48,),
        "expand": (3,),
        "time_step_scale": (3.0,),
        "time_step_init_scheme": ("constant",),
        "use_mambapy": (True,),
        "use_associative_scan": (False,),
    },
    "mamba2": OWN
    | {
        "n_groups": (1, 4),
        "chunk_size": (5,),
        "time_step_limit": ((0.05, 0.5), [0.0, 0.1], NO_LIMIT),
        **dict.fromkeys(("hidden_size", "expand", "num_heads", "head_dim"), "bound to each other"),
    },
}
"""Fields of `MambaConfig` and `Mamba2Config` that a conversion to this package's classes and back carries."""
