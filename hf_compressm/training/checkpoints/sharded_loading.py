"""Load a checkpoint of another size or number of ranks into a model that FSDP2 has sharded already.

Accelerate reads into the shards that are there, so they are resized first, in place and on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ...surgery import check_fixed_tensors, has_tuners, resize_mixers, sizes_in_state_dict, unwrap_optimizer
from ...surgery import record_keys as keys
from ...surgery.processes import decided_by_rank_0, raise_together, team_for
from ...surgery.wrappers import plain_name, plain_state_dict
from .contents import load_callback_state
from .reading import load_pickle, reading, weight_files
from .sharded_files import check_sharded_moments, saved_weight_shapes, sharded_format, sharded_weight_shapes

WHOLE = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def load_weights(trainer: Any, folder: Path, load: Callable[[], Any]) -> Any:
    """Resize the Trainer's sharded model to a checkpoint's sizes, and load its weights. Collective.

    Of a model with adapters of PEFT only these are loaded; the callback restores what cuts changed beneath them.

    Args:
        trainer: its model is sharded by FSDP2.
        folder: a checkpoint that was written under FSDP2, in this format, by any number of ranks, or under DDP.
        load: what the Trainer does to load one of FSDP2.

    Raises:
        FileNotFoundError, ValueError: on every rank: a file is missing or damaged, or the weights are of another model.
    """
    model = trainer.model
    form, sizes = decided_by_rank_0(lambda: _look(trainer, folder))
    optimizer = trainer.optimizer
    resize_mixers(model, sizes, None if optimizer is None else unwrap_optimizer(optimizer), team_for(model))
    if form is not None or has_tuners(model):
        return load()
    weights: dict[str, Any] = {}
    if trainer.args.process_index == 0:
        for file in weight_files(folder):
            weights |= load_file(file)
        weights = _with_tied(model, weights)
    return set_model_state_dict(model, weights, options=WHOLE)


def load_moments(trainer: Any, folder: Path, load: Callable[[], Any]) -> None:
    """Load the state of optimizer and scheduler of a checkpoint into those of a sharded model. Collective.

    Args:
        trainer, folder, load: as `load_weights` takes them.

    Raises:
        FileNotFoundError, ValueError: on every rank: a file is missing or damaged, or of another optimizer.
    """
    form = decided_by_rank_0(lambda: sharded_format(folder))
    if form is not None or not decided_by_rank_0((folder / OPTIMIZER_NAME).is_file):
        return load()
    model, optimizer = trainer.model, unwrap_optimizer(trainer.optimizer)
    names = {id(p): plain_name(name) for name, p in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state: Any = None
    problem = None
    try:
        state = _by_name(folder / OPTIMIZER_NAME, order) if trainer.args.process_index == 0 else None
    except ValueError as error:
        problem = error
    raise_together(problem)
    set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
    trainer.lr_scheduler.load_state_dict(load_pickle(folder / SCHEDULER_NAME))


def _look(trainer: Any, folder: Path) -> tuple[str | None, dict[str, int]]:
    """A checkpoint's format and its state sizes by mixer name, after a check that it is whole and of this model."""
    model, form = trainer.model, sharded_format(folder)
    expected = trainer.accelerator.state.fsdp_plugin.state_dict_type.name
    if form not in (None, expected):
        raise ValueError(
            f"{folder} holds a {form}, and this run reads a {expected}. "
            f"Set fsdp_state_dict_type in fsdp_config to {form}."
        )
    if has_tuners(model):
        return form, _sizes_beneath_adapters(folder, form)
    shapes = saved_weight_shapes(folder)
    check_sharded_moments(folder, shapes)
    try:
        check_fixed_tensors(model, shapes)
    except ValueError as error:
        raise ValueError(f"the weights are of another model: {error}. Build it as it was trained.") from error
    sizes = sizes_in_state_dict(model, shapes)
    if form is None and (foreign := sorted(shapes.keys() - plain_state_dict(model).keys())):
        raise ValueError(
            f"{folder} was saved without FSDP, under other names ({foreign[0]}) than those that this model trains "
            "with; go on from it without FSDP, or from a checkpoint of FSDP2."
        )
    return form, sizes


def _sizes_beneath_adapters(folder: Path, form: str | None) -> dict[str, int]:
    """What the callback noted of the state sizes by mixer name; empty without it."""
    if form is None:
        raise ValueError(
            f"{folder} holds adapters that were saved without FSDP; go on from it without FSDP, or from a checkpoint "
            "of FSDP2."
        )
    check_sharded_moments(folder, sharded_weight_shapes(folder))
    return dict((load_callback_state([folder]) or {}).get(keys.MIXERS, {}).get("sizes", {}))


def _with_tied(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """The weights, and under each name that safetensors leaves out those of the parameter that it shares."""
    own = plain_state_dict(model)
    by_tensor = {id(own[name]): value for name, value in weights.items() if name in own}
    return weights | {name: by_tensor[id(tensor)] for name, tensor in own.items() if id(tensor) in by_tensor}


def _by_name(path: Path, order: list[str]) -> dict[str, Any]:
    """An optimizer's state, saved by numbers, with the names of the parameters in their place."""
    with reading(path):
        saved = load_pickle(path)
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        if len(numbers) != len(order):
            raise ValueError(f"it is of an optimizer of {len(numbers)} parameters, this one has {len(order)}")
        names = dict(zip(numbers, order, strict=True))
        groups = [group | {"params": [names[number] for number in group["params"]]} for group in saved["param_groups"]]
        return {"state": {names[number]: entry for number, entry in saved["state"].items()}, "param_groups": groups}
