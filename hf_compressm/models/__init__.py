"""Model classes for the Hugging Face stack; importing this package registers them with the Auto classes."""

from .mimo_ssm import (
    MimoSSMCache,
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
    MimoSSMPreTrainedModel,
)

__all__ = [
    "MimoSSMCache",
    "MimoSSMConfig",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMModel",
    "MimoSSMPreTrainedModel",
]
