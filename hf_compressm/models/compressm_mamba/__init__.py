"""CompreSSMMamba: Mamba with a state size for each layer."""

from .configuration_compressm_mamba import *  # noqa: F403
from .modeling_compressm_mamba import *  # noqa: F403
