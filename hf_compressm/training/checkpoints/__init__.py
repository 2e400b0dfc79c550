"""Checkpoints across cuts: what the callback saves, crash-safe writing, verification, and loading at other sizes."""
