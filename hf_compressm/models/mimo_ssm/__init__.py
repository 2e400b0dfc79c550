"""MimoSSM: a stack of time-invariant MIMO state-space layers, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_mimo_ssm import MimoSSMConfig
from .modeling_mimo_ssm import (
    MimoSSMCache,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
    MimoSSMPreTrainedModel,
)

AutoConfig.register(MimoSSMConfig.model_type, MimoSSMConfig, exist_ok=True)
AutoModel.register(MimoSSMConfig, MimoSSMModel, exist_ok=True)
AutoModelForSequenceClassification.register(MimoSSMConfig, MimoSSMForSequenceClassification, exist_ok=True)
AutoModelForCausalLM.register(MimoSSMConfig, MimoSSMForCausalLM, exist_ok=True)

__all__ = [
    "MimoSSMCache",
    "MimoSSMConfig",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMModel",
    "MimoSSMPreTrainedModel",
]
