"""Let Accelerate shard by FSDP2 over CPUs, which it grants to accelerators only, so that any machine can run it.

    torchrun --nproc_per_node 2 scripts/benchmarks/cpu_fsdp.py scripts/pretrain.py CONFIG --use_cpu true \\
        --fsdp true --fsdp_config '{"fsdp_version": 2}'

runs a script, unchanged, with its arguments.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

FORMATS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
"""Of the checkpoints of FSDP2."""


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


def launched(processes: int, script: str, fsdp: str | None = None) -> list[str]:
    """The first words of a command that runs a script on CPU processes, sharded in a format of checkpoints or not.

    Args:
        processes: how many; torchrun starts them if they are several.
        script: the script, whose arguments come next.
        fsdp: FULL_STATE_DICT or SHARDED_STATE_DICT; None for DDP.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    sharded = [] if fsdp is None else [__file__]
    return [sys.executable, *(torchrun if processes > 1 or fsdp else []), *sharded, script]


def sharding(fsdp: str | None) -> list[str]:
    """The options of scripts/pretrain.py for it."""
    settings = f'{{"fsdp_version": 2, "fsdp_state_dict_type": "{fsdp}"}}'
    return [] if fsdp is None else ["--fsdp", "true", "--fsdp_config", settings]


if __name__ == "__main__":
    grant_fsdp()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
