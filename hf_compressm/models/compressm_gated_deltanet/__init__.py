"""CompreSSMGatedDeltaNet: Gated DeltaNet, or a hybrid with attention, with a state size for each layer."""

from .configuration_compressm_gated_deltanet import *  # noqa: F403
from .modeling_compressm_gated_deltanet import *  # noqa: F403
