"""The public names of the package: `import hf_compressm` offers them, and registers its models with transformers."""

from . import compatibility as compatibility  # stops at once where the installed transformers does not fit
from .models import (
    CompreSSMMamba2Config,
    CompreSSMMamba2ForCausalLM,
    CompreSSMMamba2ForSequenceClassification,
    CompreSSMMamba2Model,
    CompreSSMMambaConfig,
    CompreSSMMambaForCausalLM,
    CompreSSMMambaForSequenceClassification,
    CompreSSMMambaModel,
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMForSequencePairClassification,
    MimoSSMModel,
    from_stock,
    to_stock,
    use_fast_ops,
)
from .reduction import SizeConstraints
from .surgery import Energy, Fraction, MixerAdapter, Target, compress, register_adapter, save_base_model, state_sizes
from .training import CompressionConfig, CompreSSMCallback

__all__ = [
    "CompreSSMCallback",
    "CompreSSMMamba2Config",
    "CompreSSMMamba2ForCausalLM",
    "CompreSSMMamba2ForSequenceClassification",
    "CompreSSMMamba2Model",
    "CompreSSMMambaConfig",
    "CompreSSMMambaForCausalLM",
    "CompreSSMMambaForSequenceClassification",
    "CompreSSMMambaModel",
    "CompressionConfig",
    "Energy",
    "Fraction",
    "MimoSSMConfig",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMForSequencePairClassification",
    "MimoSSMModel",
    "MixerAdapter",
    "SizeConstraints",
    "Target",
    "compress",
    "from_stock",
    "register_adapter",
    "save_base_model",
    "state_sizes",
    "to_stock",
    "use_fast_ops",
]
