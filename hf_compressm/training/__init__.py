"""Training with the Hugging Face Trainer: the callback, its settings, checkpoints across cuts."""

from .callback import CompreSSMCallback
from .checkpoints.durable import DurableCheckpoints, newest_checkpoint, verify_manifest, verify_sealed, write_manifest
from .checkpoints.resume import resize_to_checkpoint
from .checkpoints.verification import verify_checkpoint
from .checkpoints.whole_model import whole_model
from .config import CompressionConfig
from .ddp import rebuild_reducer
from .groups import create_optimizer
from .replicas import verify_replicas
from .stability import StabilityTracker

__all__ = [
    "CompreSSMCallback",
    "CompressionConfig",
    "DurableCheckpoints",
    "StabilityTracker",
    "create_optimizer",
    "newest_checkpoint",
    "resize_to_checkpoint",
    "rebuild_reducer",
    "verify_checkpoint",
    "verify_manifest",
    "verify_replicas",
    "verify_sealed",
    "whole_model",
    "write_manifest",
]
