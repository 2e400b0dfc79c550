"""How the parameters of a training lie on its processes: what is refused, who plans together, what follows a cut.

Statistics are summed, rank 0 makes the plan, every rank applies it, and all compare what they have then. Under DDP
(`ddp`) each rank has all parameters; under FSDP2 (`surgery.sharded`) a shard of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.optimization import Adafactor
from transformers.utils import logging

from ..surgery import unwrap_optimizer
from ..surgery.processes import ProcessTeam, Timer, processes
from ..surgery.shards import check_torch, is_sharded, reshard, sharded_entries
from ..surgery.wrappers import plain_name
from .calibration import as_the_trainer_does
from .ddp import ALTERNATIVE, find_ddp, rebuild_reducer
from .replicas import verify_replicas
from .timing import Stopwatch

logger = logging.get_logger(__name__)

REPLICATED = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}
FSDP2 = (
    "FSDP2 shards parameters in a way that cuts can follow: TrainingArguments(fsdp=True, "
    "fsdp_config={'fsdp_version': 2}), or 'accelerate launch --config_file configs/accelerate/fsdp2.yaml'."
)


def refuse_unsupported(args: TrainingArguments, model: nn.Module, sharded: bool = True) -> None:
    """Raise if parameters cannot change shape in the way this run distributes them.

    Args:
        args: of the training.
        model: the model as it is trained.
        sharded: whether parameters that `fully_shard` has sharded can be cut by the caller.

    Raises:
        NotImplementedError: FSDP1, DeepSpeed, tensor parallelism and other ways to shard; `nn.DataParallel`.
        RuntimeError: a private name of torch's FSDP2 that a cut needs is missing in this torch.
    """
    state = AcceleratorState() if AcceleratorState._shared_state else None
    kind = DistributedType.NO if state is None else state.distributed_type
    if args.deepspeed or kind == DistributedType.DEEPSPEED:
        raise NotImplementedError(
            "DeepSpeed's ZeRO (stages 1, 2 and 3) keeps parameters or moments in one flat partition for each rank, "
            f"with maps of places in it, so no shape can change during training. {FSDP2}"
        )
    # Not args.fsdp, which is None where `accelerate launch` sets FSDP up.
    version = getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", None)
    if kind == DistributedType.FSDP and version != 2:
        raise NotImplementedError(
            f"FSDP version {version} keeps the parameters of a layer in one flat shard, so no shape can change during "
            f"training. {FSDP2} fsdp_version is 1 unless it is given."
        )
    if kind not in REPLICATED | {DistributedType.FSDP}:
        raise NotImplementedError(
            f"this run is distributed as {kind.value}, which shards or copies parameters in a way that a change of "
            f"their shape does not reach. {ALTERNATIVE}"
        )
    if args.fsdp and not is_sharded(model):
        logger.warning(
            f"fsdp is set, but nothing is sharded: on this device ({args.device.type}) Accelerate trains as "
            f"{kind.value} instead."
        )
    if is_sharded(model) and not sharded:
        raise NotImplementedError(f"this callback cannot cut parameters that are sharded by FSDP2. {ALTERNATIVE}")
    check_torch(model)
    _refuse_other_shards(model)
    if args.n_gpu > 1 and processes() == 1:
        raise NotImplementedError(
            f"one process would drive {args.n_gpu} GPUs by nn.DataParallel. Start one process for each GPU: "
            f"torchrun --nproc_per_node {args.n_gpu} ..., or set CUDA_VISIBLE_DEVICES to one."
        )


def refuse_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise if an optimizer, wrapped or not, would fail at its first step of parameters that FSDP2 shards.

    Raises:
        NotImplementedError: Adafactor of transformers.
    """
    if is_sharded(model) and optimizer is not None and isinstance(unwrap_optimizer(optimizer), Adafactor):
        raise NotImplementedError(
            "transformers' Adafactor (optim='adafactor') cannot step parameters that FSDP2 shards: it keeps the means "
            "over rows and columns as tensors that are not sharded. Train with another optimizer, such as "
            "optim='adamw_torch', or with DDP."
        )


def _refuse_other_shards(model: nn.Module) -> None:
    """Raise for DTensors of anything but `fully_shard`, also where they are not cut: what is compared would differ."""
    reshard(model)
    ours = {id(entry.sharded_param) for _, entry in sharded_entries(model).values() if not entry.is_dtensor}
    for path, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in ours:
            raise NotImplementedError(
                f"{plain_name(path)} is sharded by tensor parallelism (or another DTensor plan). After a cut ranks "
                "are compared, and ranks of one tensor-parallel group hold different rows, which nothing tells from a "
                f"fault. Train without it. {FSDP2}"
            )


class TrainingTeam(ProcessTeam):
    """All ranks of a training: each gathers statistics on its own batches, rank 0 decides for all.

    Args:
        trainer: the Trainer whose loss reads batches that the model's forward does not take, if any.
        watch: takes the times of statistics, decision and broadcast.
        check: called with the measurements, on rank 0, before a plan is made.
    """

    def __init__(
        self,
        trainer: Any = None,
        watch: Stopwatch | None = None,
        check: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        super().__init__(lambda model: as_the_trainer_does(model, trainer), watch or Stopwatch(), check)


def find_wrapper(trainer: Any, model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper through which a Trainer runs a model; None in a single process, and where FSDP2 shards it.

    Raises:
        RuntimeError: as `find_ddp`.
    """
    return None if is_sharded(model) else find_ddp(trainer, model)


def settle(trainer: Any, model: nn.Module, optimizer: Any, watch: Timer) -> None:
    """On several processes, make DDP reduce the new parameters, if it is there, and check that ranks have the same.

    Raises:
        RuntimeError: as `find_ddp` and `verify_replicas`.
    """
    if processes() == 1:
        return
    ddp = find_wrapper(trainer, model)
    if ddp is not None:
        with watch("rebuild"):
            rebuild_reducer(ddp)
    with watch("verification"):
        verify_replicas(model, optimizer)
