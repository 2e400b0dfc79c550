"""State-space models that shrink while they train, with the Hugging Face Trainer."""

from .models import (
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
)
from .reduction import SizeConstraints
from .surgery import Energy, Fraction, MixerAdapter, Target, compress, register_adapter, state_sizes
from .training import CompressionConfig, CompreSSMCallback

__version__ = "0.1.0"

__all__ = [
    "CompreSSMCallback",
    "CompressionConfig",
    "Energy",
    "Fraction",
    "MimoSSMConfig",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMModel",
    "MixerAdapter",
    "SizeConstraints",
    "Target",
    "compress",
    "register_adapter",
    "state_sizes",
]
