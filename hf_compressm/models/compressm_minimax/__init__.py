"""CompreSSMMiniMax: MiniMax with a state size for each layer of lightning attention."""

from .configuration_compressm_minimax import *  # noqa: F403
from .modeling_compressm_minimax import *  # noqa: F403
