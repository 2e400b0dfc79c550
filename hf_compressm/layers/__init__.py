"""Sequence layers: `nn.Module`s built on the ops."""

from .lru import LRU

__all__ = ["LRU"]
