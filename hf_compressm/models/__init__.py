"""Model classes for the Hugging Face stack; importing this package registers them with the Auto classes."""

from .compressm_gated_deltanet import (
    CompreSSMGatedDeltaNetConfig,
    CompreSSMGatedDeltaNetForCausalLM,
    CompreSSMGatedDeltaNetForSequenceClassification,
    CompreSSMGatedDeltaNetForTokenClassification,
    CompreSSMGatedDeltaNetModel,
)
from .compressm_mamba import (
    CompreSSMMambaConfig,
    CompreSSMMambaForCausalLM,
    CompreSSMMambaForSequenceClassification,
    CompreSSMMambaForTokenClassification,
    CompreSSMMambaModel,
)
from .compressm_mamba2 import (
    CompreSSMMamba2Config,
    CompreSSMMamba2ForCausalLM,
    CompreSSMMamba2ForSequenceClassification,
    CompreSSMMamba2ForTokenClassification,
    CompreSSMMamba2Model,
)
from .compressm_minimax import (
    CompreSSMMiniMaxConfig,
    CompreSSMMiniMaxForCausalLM,
    CompreSSMMiniMaxForSequenceClassification,
    CompreSSMMiniMaxForTokenClassification,
    CompreSSMMiniMaxModel,
)
from .convert import from_stock, to_stock
from .fast_ops import use_fast_ops
from .feature_extractor import MimoSSMFeatureExtractor
from .heads import register
from .mimo_ssm import (
    MimoSSMCache,
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForForecasting,
    MimoSSMForSequenceClassification,
    MimoSSMForSequencePairClassification,
    MimoSSMForTokenClassification,
    MimoSSMModel,
    MimoSSMPreTrainedModel,
)

register(
    CompreSSMMambaConfig,
    CompreSSMMambaModel,
    CompreSSMMambaForCausalLM,
    CompreSSMMambaForSequenceClassification,
    of_steps=CompreSSMMambaForTokenClassification,
)
register(
    CompreSSMMamba2Config,
    CompreSSMMamba2Model,
    CompreSSMMamba2ForCausalLM,
    CompreSSMMamba2ForSequenceClassification,
    of_steps=CompreSSMMamba2ForTokenClassification,
)
register(
    CompreSSMGatedDeltaNetConfig,
    CompreSSMGatedDeltaNetModel,
    CompreSSMGatedDeltaNetForCausalLM,
    CompreSSMGatedDeltaNetForSequenceClassification,
    of_steps=CompreSSMGatedDeltaNetForTokenClassification,
)
register(
    CompreSSMMiniMaxConfig,
    CompreSSMMiniMaxModel,
    CompreSSMMiniMaxForCausalLM,
    CompreSSMMiniMaxForSequenceClassification,
    of_steps=CompreSSMMiniMaxForTokenClassification,
)
register(
    MimoSSMConfig,
    MimoSSMModel,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMForSequencePairClassification,
    of_steps=MimoSSMForTokenClassification,
    forecasting=MimoSSMForForecasting,
)

__all__ = [
    "CompreSSMGatedDeltaNetConfig",
    "CompreSSMGatedDeltaNetForCausalLM",
    "CompreSSMGatedDeltaNetForSequenceClassification",
    "CompreSSMGatedDeltaNetForTokenClassification",
    "CompreSSMGatedDeltaNetModel",
    "CompreSSMMamba2Config",
    "CompreSSMMamba2ForCausalLM",
    "CompreSSMMamba2ForSequenceClassification",
    "CompreSSMMamba2ForTokenClassification",
    "CompreSSMMamba2Model",
    "CompreSSMMambaConfig",
    "CompreSSMMambaForCausalLM",
    "CompreSSMMambaForSequenceClassification",
    "CompreSSMMambaForTokenClassification",
    "CompreSSMMambaModel",
    "CompreSSMMiniMaxConfig",
    "CompreSSMMiniMaxForCausalLM",
    "CompreSSMMiniMaxForSequenceClassification",
    "CompreSSMMiniMaxForTokenClassification",
    "CompreSSMMiniMaxModel",
    "MimoSSMCache",
    "MimoSSMConfig",
    "MimoSSMFeatureExtractor",
    "MimoSSMForCausalLM",
    "MimoSSMForForecasting",
    "MimoSSMForSequenceClassification",
    "MimoSSMForSequencePairClassification",
    "MimoSSMForTokenClassification",
    "MimoSSMModel",
    "MimoSSMPreTrainedModel",
    "from_stock",
    "to_stock",
    "use_fast_ops",
]
