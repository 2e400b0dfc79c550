"""CompreSSMMamba: Mamba with a state size for each layer, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_compressm_mamba import CompreSSMMambaConfig
from .modeling_compressm_mamba import (
    CompreSSMMambaForCausalLM,
    CompreSSMMambaForSequenceClassification,
    CompreSSMMambaModel,
    CompreSSMMambaPreTrainedModel,
)

AutoConfig.register(CompreSSMMambaConfig.model_type, CompreSSMMambaConfig, exist_ok=True)
AutoModel.register(CompreSSMMambaConfig, CompreSSMMambaModel, exist_ok=True)
AutoModelForCausalLM.register(CompreSSMMambaConfig, CompreSSMMambaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    CompreSSMMambaConfig, CompreSSMMambaForSequenceClassification, exist_ok=True
)

__all__ = [
    "CompreSSMMambaConfig",
    "CompreSSMMambaForCausalLM",
    "CompreSSMMambaForSequenceClassification",
    "CompreSSMMambaModel",
    "CompreSSMMambaPreTrainedModel",
]
