"""Save and restore the base model beneath PEFT's adapters: PEFT saves adapters only, but a cut changes base weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .adapters.base import find_mixers
from .optimizer import unwrap_optimizer
from .parameters import outside_inference_mode
from .peft.tuners import is_copy_wrapper, is_tuner
from .processes import team_for
from .resize import resize_mixers
from .sharded import whole_site
from .shards import is_sharded
from .snapshot import to_cpu


def save_base_model(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save the model beneath the adapters as a plain checkpoint, without them, and note its folder in their configs.

    ```python
    save_base_model(peft_model, "small")
    peft_model.save_pretrained("small-lora")  # its adapter_config.json names "small"
    AutoPeftModelForCausalLM.from_pretrained("small-lora")
    ```

    A cut changes the base weights, so its adapters fit no other base, not even the original one.

    Args:
        model: a PeftModel with unmerged adapters.
            Sharded by FSDP2 too; call it on all ranks then, of which the first writes.
        folder: for config and weights; it goes into the adapters' configs as it is given.

    Raises:
        ValueError: if the model is not a PeftModel, the model beneath is not one of transformers, or adapters are
            merged into its weights.
    """
    wrapped: Any = model
    if not hasattr(wrapped, "get_base_model"):
        raise ValueError(f"{type(model).__name__} is not a PeftModel; save it with its own save_pretrained")
    base = wrapped.get_base_model()
    if not hasattr(base, "save_pretrained"):
        raise ValueError(
            f"the model beneath the adapters is a {type(base).__name__}, which has no save_pretrained: merge the "
            "adapters (merge_and_unload) and save its state_dict, or save the model within it"
        )
    merged = next((name for name, module in base.named_modules() if is_tuner(module) and module.merged), None)
    if merged is not None:
        raise ValueError(f"an adapter is merged into {merged}; call unmerge_adapter() before saving the base model")
    first = not is_sharded(base) or dist.get_rank() == 0
    base.save_pretrained(folder, state_dict=_plain_state(base, first), is_main_process=first)
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = os.fspath(folder)


def mixer_state(model: nn.Module) -> dict[str, Any]:
    """Sizes of the mixers, and the parameters that cuts replace, on the CPU. Collective if FSDP2 shards the model."""
    sites = find_mixers(model)
    whole = whole_site if is_sharded(model) else (lambda site: site)
    return {
        "sizes": {site.name: site.state_size for site in sites},
        "parameters": {site.name: to_cpu(whole(site).parameters()) for site in sites},
    }


@outside_inference_mode
def restore_mixer_state(model: nn.Module, saved: Mapping[str, Any], optimizer: Any = None) -> None:
    """Restore the sizes and parameters of `mixer_state`; new parameters go to the optimizer too, if there is one."""
    team, inner = team_for(model), None if optimizer is None else unwrap_optimizer(optimizer)
    resize_mixers(model, saved["sizes"], inner, team)
    for site in find_mixers(model):
        with team.opened(model, site, inner):
            for name, parameter in site.parameters().items():
                parameter.data.copy_(saved["parameters"][site.name][name])


def _plain_state(base: nn.Module, kept: bool) -> dict[str, Tensor]:
    """The state dict that the model would have without PEFT, gathered tensor by tensor where it is to be `kept`."""
    state = {}
    dropped: list[str] = []
    for name, module in base.named_modules():
        if is_copy_wrapper(module):
            dropped += [f"{name}.{part}." for part in ("modules_to_save", "token_adapter")]
        elif is_tuner(module):
            dropped += [f"{name}.{part}." for part, _ in module.named_children() if part != "base_layer"]
    for key, value in base.state_dict().items():
        if not key.startswith(tuple(dropped)):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if kept:
                state[key.replace(".base_layer.", ".").replace(".original_module.", ".")] = (
                    value if whole is value else whole.cpu()
                )
    return state
