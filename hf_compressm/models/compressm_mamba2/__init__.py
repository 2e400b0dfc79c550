"""CompreSSMMamba2: Mamba-2 with a state size for each layer, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_compressm_mamba2 import CompreSSMMamba2Config
from .modeling_compressm_mamba2 import (
    CompreSSMMamba2ForCausalLM,
    CompreSSMMamba2ForSequenceClassification,
    CompreSSMMamba2Model,
    CompreSSMMamba2PreTrainedModel,
)

AutoConfig.register(CompreSSMMamba2Config.model_type, CompreSSMMamba2Config, exist_ok=True)
AutoModel.register(CompreSSMMamba2Config, CompreSSMMamba2Model, exist_ok=True)
AutoModelForCausalLM.register(CompreSSMMamba2Config, CompreSSMMamba2ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    CompreSSMMamba2Config, CompreSSMMamba2ForSequenceClassification, exist_ok=True
)

__all__ = [
    "CompreSSMMamba2Config",
    "CompreSSMMamba2ForCausalLM",
    "CompreSSMMamba2ForSequenceClassification",
    "CompreSSMMamba2Model",
    "CompreSSMMamba2PreTrainedModel",
]
