"""Let Accelerate shard by FSDP2 over CPUs, which it grants to accelerators only, so that any machine can run it."""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def grant_fsdp() -> None:
    """Patch `AcceleratorState`, in this process: on CPUs a plugin of FSDP is dropped there; all behind it is real."""
    original = AcceleratorState.__init__

    def granted(self, *args, **kwargs):
        first = not AcceleratorState._shared_state
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if first and plugin is None and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            plugin = FullyShardedDataParallelPlugin()
        if first and plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            # Both, as the original does at its end; else the next state that is made, by the optimizer, turns back.
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin

    AcceleratorState.__init__ = granted
