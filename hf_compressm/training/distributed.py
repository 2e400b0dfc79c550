"""Cuts across processes: statistics are summed, rank 0 makes the plan, every rank applies it, checksums are compared.

A parameter that is replaced behind the back of `DistributedDataParallel` is never all-reduced again, without an error.
So the reducer is rebuilt in place after every cut, and parameters and moments are compared across ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from ..surgery import Team, gather_statistics, unwrap_optimizer
from ..surgery.refit import Recording
from .calibration import as_the_trainer_does
from .timing import Stopwatch

Value = TypeVar("Value")

PRIVATE = (
    *("reducer", "logger", "parameters_to_ignore", "static_graph", "_module_parameters", "_has_rebuilt_buckets"),
    *("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper", "_comm_hooks"),
)
"""What `rebuild_reducer` uses of `DistributedDataParallel` beyond its public interface."""

SUPPORTED = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}
ALTERNATIVE = (
    "Train with plain data parallelism (DDP), or compress before or after training with hf_compressm.compress."
)
CHUNK = 1 << 22
"""Elements of a tensor that a checksum takes at once, so that it needs little memory."""


def processes() -> int:
    """Number of processes that train together, >= 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def refuse_unsupported(args: TrainingArguments, model: nn.Module) -> None:
    """Raise if parameters cannot change shape in the way this run distributes them.

    Raises:
        NotImplementedError: FSDP, DeepSpeed, tensor parallelism and other sharded set-ups; `nn.DataParallel`.
        RuntimeError: an attribute of `DistributedDataParallel` that `rebuild_reducer` needs is missing in this torch.
    """
    if args.deepspeed or args.fsdp:
        raise NotImplementedError(
            f"DeepSpeed and FSDP keep parameters in flat shards that cannot change shape during training. {ALTERNATIVE}"
        )
    kind = AcceleratorState().distributed_type if AcceleratorState._shared_state else DistributedType.NO
    if kind not in SUPPORTED:
        raise NotImplementedError(
            f"this run is distributed as {kind.value}, which shards or copies parameters in a way that a change of "
            f"their shape does not reach. {ALTERNATIVE}"
        )
    if sharded := next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None):
        raise NotImplementedError(
            f"{sharded} is a DTensor, as tensor parallelism and FSDP2 make them; replacing one is undone by the next "
            f"forward pass. {ALTERNATIVE}"
        )
    if args.n_gpu > 1 and processes() == 1:
        raise NotImplementedError(
            f"one process would drive {args.n_gpu} GPUs by nn.DataParallel. Start one process for each GPU: "
            f"torchrun --nproc_per_node {args.n_gpu} ..., or set CUDA_VISIBLE_DEVICES to one."
        )


def find_ddp(trainer: Any, model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper through which a Trainer runs a model; None in a single process.

    Raises:
        RuntimeError: if several processes train but no wrapper around this model is found, or the installed torch lacks
            what `rebuild_reducer` needs.
    """
    if processes() == 1:
        return None
    wrapper = getattr(trainer, "model_wrapped", None)
    while isinstance(wrapper, nn.Module) and not isinstance(wrapper, DistributedDataParallel):
        wrapper = getattr(wrapper, "_orig_mod", None)
    module = getattr(wrapper, "module", None)
    if wrapper is None or model not in (module, getattr(module, "_orig_mod", None)):
        raise RuntimeError(
            f"{processes()} processes train, but no DistributedDataParallel around the model was found, so new "
            f"parameters could not be kept equal. {ALTERNATIVE}"
        )
    if missing := [name for name in PRIVATE if not hasattr(wrapper, name)]:
        raise RuntimeError(
            f"torch {torch.__version__} has no DistributedDataParallel.{', '.join(missing)}, which rebuilding its "
            "reducer needs. Install a version of torch that this package is tested with, or train in one process."
        )
    return wrapper


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Make a DDP wrapper reduce the gradients of the parameters that its module has now. Call it on all ranks.

    In place, so that whoever holds the wrapper goes on using it; communication hooks and a static graph are kept. The
    sequence is that of `DistributedDataParallel.__setstate__`.
    """
    wrapper: Any = ddp
    wrapper.reducer = wrapper.logger = None  # the old hooks die with the old reducer
    wrapper._module_parameters = [
        parameter for name, parameter in ddp.module.named_parameters() if name not in wrapper.parameters_to_ignore
    ]
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    if wrapper.static_graph:  # the public setter returns at once where the flag is set already
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
    wrapper._has_rebuilt_buckets = False
    hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)


def decided_by_rank_0(work: Callable[[], Value], watch: Stopwatch | None = None) -> Value:
    """Run `work` on rank 0 and return its result on every rank.

    Adds to `watch` the time of the decision, and that of its broadcast: on other ranks, of waiting for it.

    Raises:
        Exception: on every rank, what `work` raises on rank 0.
    """
    watch = watch or Stopwatch()
    if processes() == 1:
        with watch("decision"):
            return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            with watch("decision"):
                outcome[0] = work()
        except Exception as error:  # the other ranks wait, and must fail in the same way
            outcome[1] = error
    with watch("broadcast"):
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_together(
    model: nn.Module,
    batches: Any,
    recordings: dict[str, Recording] | None = None,
    fast_ops: bool = True,
    trainer: Any = None,
) -> dict[str, Any]:
    """Statistics of every mixer that needs them over the calibration batches of all ranks, on every rank.

    Args:
        model, recordings, fast_ops: as `gather_statistics` takes them.
        batches: this rank's calibration batches, or None if no mixer needs any.
        trainer: the Trainer whose loss reads batches that the model's forward does not take, if any.

    Raises:
        Exception: what any rank raises, on every rank; that of the lowest rank if several do.
    """
    problem: Exception | None = None
    statistics: dict[str, Any] = {}
    try:
        statistics = gather_statistics(
            model, batches, recordings, otherwise=as_the_trainer_does(model, trainer), fast_ops=fast_ops
        )
    except Exception as error:  # the other ranks must not wait for this one's sums
        problem = error
    if processes() > 1:
        problems: list[Any] = [None] * processes()
        dist.all_gather_object(problems, problem)
        problem = next((found for found in problems if found is not None), None)
    if problem is not None:
        raise problem
    if processes() > 1:
        for name in sorted(statistics):
            statistics[name].sum_with(dist.all_reduce)
    return statistics


class TrainingTeam(Team):
    """All ranks of a training: each gathers statistics on its own batches, rank 0 decides for all.

    Args:
        trainer: the running Trainer, if any; see `gather_together`.
        watch: takes the times of statistics, decision and broadcast.
        check: called with the measurements, on rank 0, before a plan is made.
    """

    def __init__(
        self,
        trainer: Any = None,
        watch: Stopwatch | None = None,
        check: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        self.trainer, self.watch, self._check = trainer, watch or Stopwatch(), check

    def gather(
        self, model: nn.Module, batches: Any, recordings: dict[str, Recording] | None, fast_ops: bool
    ) -> dict[str, Any]:
        with self.watch("statistics"):
            return gather_together(model, batches, recordings, fast_ops, self.trainer)

    def check(self, measurements: Mapping[str, Any]) -> None:
        if self._check is not None:
            self._check(measurements)

    def decide(self, work: Callable[[], Value]) -> Value:
        return decided_by_rank_0(work, self.watch)


def verify_replicas(model: nn.Module, optimizer: Any = None) -> None:
    """Compare checksums of all parameters and optimizer moments across ranks.

    Buffers are left out: running statistics of a batch norm are each rank's own until the next forward pass.

    Raises:
        RuntimeError: on every rank, if any tensor differs; the message names the first and the rank.
    """
    if processes() == 1:
        return
    device = next(model.parameters()).device
    listed = [(name, tuple(tensor.shape), _checksum(tensor)) for name, tensor in _tensors(model, optimizer)]
    digest = int.from_bytes(hashlib.sha256(repr(listed).encode()).digest()[:8], "big", signed=True)
    own = torch.tensor([digest], device=device)
    digests = [torch.empty_like(own) for _ in range(processes())]
    dist.all_gather(digests, own)
    if all(torch.equal(found, own) for found in digests):
        return
    lists: list[Any] = [None] * processes()  # only now: at a thousand ranks they are long
    dist.all_gather_object(lists, listed)
    rank = next(rank for rank, other in enumerate(lists) if other != lists[0])
    differing = [other[0] for other, first in zip(lists[rank], lists[0], strict=False) if other != first]
    raise RuntimeError(
        f"rank {rank} and rank 0 differ in {(differing or ['the number of tensors'])[0]} after a change of state size; "
        "going on would train two models. Resume from the last checkpoint, and report this."
    )


def _tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    if optimizer is None:
        return
    state = unwrap_optimizer(optimizer).state
    for name, parameter in model.named_parameters():
        for key, value in sorted(state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                yield f"{name} ({key})", value


def _checksum(tensor: Tensor) -> int:
    """A sum over the bits of a tensor, weighted by position, modulo 2^63."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    bits = flat.view(width[flat.element_size()])
    total = 0
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        weights = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        total += int((part * (2 * weights + 1)).sum())
    return total % (1 << 63)
