"""Configuration of the MimoSSM models."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..forecasting_config import check_forecasting
from ..pooling import POOLINGS
from ..remote_code import CarriesCode

NORMS = ("layer", "batch")


class MimoSSMConfig(CarriesCode, PreTrainedConfig):
    """Sizes and settings of a stack of time-invariant MIMO state-space layers.

    To build a model, exactly one of `vocab_size` and `num_channels` must be set.

    Args:
        vocab_size: number of token ids, for models that read `input_ids`.
        num_channels: channels of continuous input, for models that read `input_values` (B, L, num_channels).
        hidden_size: features H >= 1 between layers.
        num_hidden_layers: layers >= 1.
        state_sizes: states N >= 1 of every layer; one number stands for all layers.
        r_min, r_max: least and greatest |lambda| of the poles at initialisation, 0 <= r_min < r_max <= 1.
        max_phase: their greatest phase in radians, in (0, 2 pi].
        norm: "layer", or "batch" with statistics over all real positions of a batch.
        prenorm: normalise before each layer, and once at the end; otherwise after each layer's residual sum.
        dropout: probability in [0, 1).
        hidden_act: activation between the state-space layer and the gated linear unit, by transformers' name.
        pooling: what a classifier reads, the "mean" over real positions or the "last" of them.
        layer_norm_eps: added to variances, > 0, for either norm.
        initializer_range: standard deviation of token embeddings and of the language model's head, > 0. Other
            linear layers start with variance 1 / fan_in, state-space layers as `LRU` says.
        use_cache: whether models return their states by default when they are not training.
        tie_word_embeddings: whether the language model's head is the embedding matrix.
        pad_token_id, bos_token_id, eos_token_id: special token ids; `attention_mask` alone tells padding.
        compression_history: which states were removed when, written by the compression code.
        prediction_length: steps P >= 1 that a model which forecasts predicts at once, from each position.
        prediction_channel_indices: channels that it predicts, in this order; None for all.
        quantiles: what it predicts of each, in increasing order within (0, 1); the mean if None.
        scaling: what the forecast channels of a series are divided by: "mean", the mean absolute value of the context;
            "std", its standard deviation, after its mean is taken off; None for nothing. Forecasts are in the
            unit of the input either way.
        **kwargs: what every transformers config takes: `num_labels`, `id2label`, `problem_type`, ...

    Raises:
        ValueError: if a value is out of its range.
    """

    model_type = "mimo_ssm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        vocab_size: int | None = None,
        num_channels: int | None = None,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        state_sizes: int | list[int] = 256,
        r_min: float = 0.0,
        r_max: float = 0.99,
        max_phase: float = 2 * math.pi,
        norm: str = "layer",
        prenorm: bool = True,
        dropout: float = 0.1,
        hidden_act: str = "gelu",
        pooling: str = "mean",
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        compression_history: list[dict[str, Any]] | None = None,
        prediction_length: int = 1,
        prediction_channel_indices: list[int] | None = None,
        quantiles: list[float] | None = None,
        scaling: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.num_channels = vocab_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.state_sizes = [state_sizes] * num_hidden_layers if isinstance(state_sizes, int) else list(state_sizes)
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.norm, self.prenorm, self.layer_norm_eps = norm, prenorm, layer_norm_eps
        self.dropout, self.hidden_act, self.pooling = dropout, hidden_act, pooling
        self.prediction_length, self.quantiles, self.scaling = prediction_length, quantiles, scaling
        self.prediction_channel_indices = prediction_channel_indices
        self.initializer_range, self.use_cache = initializer_range, use_cache
        self.compression_history = compression_history
        self.check()
        # Arguments of the base class in early releases of transformers 5, plain attributes in later ones.
        common: dict[str, Any] = {
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**common, **kwargs)
        # Auto classes look into this list where they have several model classes for a config, as they have here.
        self.architectures = self.architectures or []

    def check(self) -> None:
        """Check all fields. Models call it again, since fields may have been set.

        Raises:
            ValueError: if a value is out of its range.
        """
        if self.vocab_size is not None and self.num_channels is not None:
            raise ValueError(
                "set vocab_size for token ids or num_channels for continuous input, not both; got "
                f"vocab_size={self.vocab_size} and num_channels={self.num_channels}"
            )
        for name in ("vocab_size", "num_channels", "hidden_size", "num_hidden_layers"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        sizes = self.state_sizes
        if len(sizes) != self.num_hidden_layers or not all(_is_count(size) for size in sizes):
            raise ValueError(
                f"state_sizes must be one integer >= 1, or a list of one per layer; got {sizes!r} for "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(f"0 <= r_min < r_max <= 1 must hold, got r_min={self.r_min} and r_max={self.r_max}")
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase must be in (0, 2 pi], got {self.max_phase}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {self.pooling!r}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}; got {self.hidden_act!r}")
        for name in ("layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        check_forecasting(self)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


__all__ = ["MimoSSMConfig"]
