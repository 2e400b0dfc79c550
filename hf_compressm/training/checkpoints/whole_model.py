"""Save a whole model, whatever the format in which FSDP2 writes checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.fsdp import StateDictType
from transformers import Trainer


@contextmanager
def whole_model(trainer: Trainer) -> Iterator[None]:
    """A block in which `trainer.save_model()` and `trainer.push_to_hub()` write weights and config in any format.

    Under FSDP2 with SHARDED_STATE_DICT they write neither, and say nothing. Within the block weights are gathered
    tensor by tensor, from all ranks, into the main memory of rank 0, which writes them. Enter it on all ranks.
    """
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    before = getattr(plugin, "state_dict_type", None)
    if before != StateDictType.SHARDED_STATE_DICT:
        yield
        return
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before
