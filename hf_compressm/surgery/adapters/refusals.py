"""Recurrent layers of transformers that cannot be compressed, and the reasons.

Source: the modelling code of transformers.
"""

from .base import register_refusal

_TIED = (
    "its config holds one number for the size of keys and values{more}, so keys cannot become smaller by themselves in "
    "this class."
)
_KIMI = _TIED.format(more=" and for the ranks of two gate projections")
_SHORT_CONVOLUTION = "it is a short convolution and has no recurrent state."
_ONE_STATE = "it has one state per channel, so there is no state to remove but with its channel."
_REASONS = {
    "zamba.modeling_zamba.ZambaMambaMixer": (
        "each of its heads projects to its own time step, B and C with its own weights, for which there is no adapter; "
        "Zamba2 is supported."
    ),
    "recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock": _ONE_STATE,
    "rwkv.modeling_rwkv.RwkvSelfAttention": _ONE_STATE,
    "lfm2.modeling_lfm2.Lfm2ShortConv": _SHORT_CONVOLUTION,
    "lfm2_moe.modeling_lfm2_moe.Lfm2MoeShortConv": _SHORT_CONVOLUTION,
    "lfm3.modeling_lfm3.Lfm3ShortConv": _SHORT_CONVOLUTION,
    "zaya.modeling_zaya.ZayaCCAProjection": _SHORT_CONVOLUTION,
    "kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention": _KIMI,
    "bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention": _TIED.format(more=""),
    "glm5_next.modeling_glm5_next.Glm5NextTextLinearAttention": _KIMI,
    "minimax.modeling_minimax.MiniMaxLightningAttention": (
        "its config holds one head size for this layer and for softmax attention, so keys cannot become smaller by "
        "themselves in this class. CompreSSMMiniMaxForCausalLM has a state size for each layer: "
        "hf_compressm.from_stock(model) makes one with equal outputs."
    ),
}
for _class, _reason in _REASONS.items():
    register_refusal(f"transformers.models.{_class}", _reason)
