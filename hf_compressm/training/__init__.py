"""Training with the Hugging Face Trainer: the callback, its settings, checkpoints across cuts."""

from .callback import CompreSSMCallback
from .checkpoint import verify_checkpoint
from .config import CompressionConfig
from .groups import create_optimizer
from .stability import StabilityTracker

__all__ = [
    "CompreSSMCallback",
    "CompressionConfig",
    "StabilityTracker",
    "create_optimizer",
    "verify_checkpoint",
]
