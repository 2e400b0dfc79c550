"""State-space layers of transformers that cannot be compressed, and why."""

from .base import register_refusal

_DELTA = (
    "its keys are L2-normalised and its delta rule lets every key channel act on all others, so channels cannot be "
    "removed without changing what the rest computes."
)
_REASONS = {
    "zamba.modeling_zamba.ZambaMambaMixer": (
        "each of its heads projects to its own time step, B and C with its own weights, for which there is no adapter; "
        "Zamba2 is supported."
    ),
    "recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock": (
        "it has one state per channel, so there is no state to remove but with its channel."
    ),
    "rwkv.modeling_rwkv.RwkvSelfAttention": (
        "it has one state per channel, so there is no state to remove but with its channel."
    ),
    "lfm2.modeling_lfm2.Lfm2ShortConv": "it is a short convolution and has no recurrent state.",
    "kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention": _DELTA,
    "bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention": _DELTA,
    "glm5_next.modeling_glm5_next.Glm5NextTextLinearAttention": _DELTA,
    "minimax.modeling_minimax.MiniMaxLightningAttention": (
        "its queries and keys serve as the read-out and read-in of a head each, for which there is no adapter."
    ),
}
for _class, _reason in _REASONS.items():
    register_refusal(f"transformers.models.{_class}", _reason)
