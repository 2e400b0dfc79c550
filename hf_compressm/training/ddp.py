"""Cuts under `DistributedDataParallel`: its reducer is rebuilt in place after every cut.

A parameter that is replaced behind the back of `DistributedDataParallel` is never all-reduced again, without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..surgery.processes import processes

PRIVATE = (
    *("reducer", "logger", "parameters_to_ignore", "static_graph", "_module_parameters", "_has_rebuilt_buckets"),
    *("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper", "_comm_hooks"),
)
"""What `rebuild_reducer` uses of `DistributedDataParallel` beyond its public interface."""

ALTERNATIVE = (
    "Train with plain data parallelism (DDP) or FSDP2, or compress before or after training with hf_compressm.compress."
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
