"""MimoSSM: a stack of time-invariant MIMO state-space layers, registered with transformers' Auto classes."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_mimo_ssm import MimoSSMConfig
from .modeling_mimo_ssm import (
    MimoSSMCache,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMForSequencePairClassification,
    MimoSSMModel,
    MimoSSMPreTrainedModel,
)

AutoConfig.register(MimoSSMConfig.model_type, MimoSSMConfig, exist_ok=True)
AutoModel.register(MimoSSMConfig, MimoSSMModel, exist_ok=True)
# Of several classes transformers takes the one that the config's `architectures` names, or else the first.
CLASSIFIERS: Any = (MimoSSMForSequenceClassification, MimoSSMForSequencePairClassification)
AutoModelForSequenceClassification.register(MimoSSMConfig, CLASSIFIERS, exist_ok=True)
AutoModelForCausalLM.register(MimoSSMConfig, MimoSSMForCausalLM, exist_ok=True)

__all__ = [
    "MimoSSMCache",
    "MimoSSMConfig",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMForSequencePairClassification",
    "MimoSSMModel",
    "MimoSSMPreTrainedModel",
]
