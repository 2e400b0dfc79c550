"""The gated delta rule on the CPU."""

from .chunks import backward, forward, kept_shapes

__all__ = ["backward", "forward", "kept_shapes"]
