"""CompreSSMMamba2: Mamba-2 with a state size for each layer."""

from .configuration_compressm_mamba2 import *  # noqa: F403
from .modeling_compressm_mamba2 import *  # noqa: F403
