"""Run stock transformers mixers by this package's scans and convolution.

`use_fast_ops` replaces a mixer's class by a subclass with the same name and another `forward`. Parameters, state dict
and config stay as they were, `isinstance` still holds, and copies and pickles of the model keep the choice.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers.integrations import accelerate

from ..compatibility import (
    HARMLESS_KEYWORDS,
    check_keywords,
    one_cache,
    transformed,
    unknown_keywords,
    unknown_parameters,
)
from ..layers.mamba import time_steps
from ..layers.mixer import convolve, mask_padding, recurrent_state, scan_or_step
from ..ops.selective_scan import selective_scan, selective_state_update
from ..ops.ssd_scan import ssd_scan, ssd_state_update
from .fast_delta import delta_forward, missing_functions
from .selective_config import has_parameters

LENT = "_hf_compressm_lent"
"""The attribute that marks mixers which this package has switched on by itself, for a limited time."""
_OR_STOCK = ", or call use_fast_ops(model, enable=False)"


def use_fast_ops(model: nn.Module, enable: bool = True) -> list[str]:
    """Let a model's stock Mamba, Mamba-2 and delta-rule mixers run by this package's ops, or by transformers' code.

    Weights, state dict and config stay as they are. Outputs change by rounding, and in two cases in which
    transformers' PyTorch code ignores part of its input: several tokens after cached ones continue from the cached
    state in Mamba, FalconMamba and Jamba too, and a single token after cached ones has its time step clamped to the
    config's limits, as all others have. Padding is treated as transformers does: after a prompt with padding on the
    right the cache differs from that of the text alone (in models of `from_stock` it does not). Copies and pickles of
    the model keep the choice; checkpoints do not. Calling it again changes nothing.

    An adapter or hook on `dt_proj` or `conv1d` takes effect, as it does after merging; transformers' own code ignores
    it.

    Args:
        model: any model with such mixers: Mamba, FalconMamba, Jamba, Mamba-2, Bamba, Zamba2, Nemotron-H, Falcon-H1,
            GraniteMoeHybrid, Qwen3-Next, Qwen3.5, Qwen4-exp, OLMo-Hybrid. This package's own models run by its ops
            already.
        enable: False goes back to transformers' own code.

    Returns:
        The names of the mixers within the model.

    Raises:
        ValueError: if the model has no such mixer, one whose `forward` was replaced or that `fully_shard` was applied
            to, or one whose activation has parameters, which transformers' own code does not read.
        RuntimeError: if the installed transformers lacks something that the ops need; the message names it.
    """
    found = stock_mixers(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no mixer that use_fast_ops can change; it knows "
            f"{', '.join(sorted(path.rpartition('.')[2] for path in _FORWARDS))}"
        )
    for name, mixer in found.items():
        if "forward" in vars(mixer):
            raise ValueError(
                f"the forward of {name} has been replaced (by hooks of accelerate, or kernels of the hub); call "
                "use_fast_ops before that"
            )
        if isinstance(mixer, FSDPModule):
            raise ValueError(f"fully_shard was applied to {name} itself; call use_fast_ops before that")
        if enable:
            require(mixer)
            if has_parameters(str(mixer.activation)):
                raise ValueError(
                    f"the activation of {name}, {mixer.activation!r}, has parameters that transformers' forward never "
                    "reads, so use_fast_ops cannot give the same outputs and gradients; choose another activation"
                )
    for mixer in found.values():
        stock = mixer_class(mixer)
        vars(mixer).pop(LENT, None)
        mixer.__class__ = fast_class(stock) if enable else stock
    return list(found)


def uncalled_layers(mixer: nn.Module) -> list[str]:
    """Name the layers in a mixer whose weights transformers' own code uses without calling the layer.

    The list is empty for a mixer that runs by this package's ops, or is this package's own.
    """
    path = _path(mixer_class(mixer))
    used, scan = _FORWARDS.get(path, ([], None))
    return used if type(mixer) is mixer_class(mixer) or scan is None else []


def has_stock_mixers(model: nn.Module) -> bool:
    """Tell whether a model has mixers that `use_fast_ops` can change."""
    return bool(stock_mixers(model))


def mixer_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or for a mixer that runs by this package's ops its transformers class.

    For a module with a parametrisation or one that `fully_shard` was applied to, whose class torch derives from its
    own, that is the original class.
    """
    cls = type(module)
    while FSDPModule in cls.__bases__ or cls.__module__ in (__name__, "torch.nn.utils.parametrize"):
        cls = cls.__bases__[-1]
    return cls


def stock_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the mixers that `use_fast_ops` can change or has changed, by name."""
    return {name: module for name, module in model.named_modules() if _path(mixer_class(module)) in _FORWARDS}


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def fast_class(stock: type) -> type:
    """Return the subclass of a transformers class that runs by this package's ops."""
    return _fast_class(_path(stock))


@cache
def _fast_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    stock = getattr(importlib.import_module(module), name)
    used, scan = _FORWARDS[path]
    members = {"forward": _forward(scan, used, stock), "__reduce_ex__": _reduce, "__doc__": stock.__doc__}
    return type(name, (stock,), members | {"__module__": __name__})


def _forward(scan: Callable | None, used: list[str], stock: type) -> Callable:
    """Build a mixer's forward around its scan.

    Args:
        scan: takes the mixer, hidden states (B, L, H) that are zero at padding, the mask, the cache and the cached
            state, and returns the input of the output projection. None for a gated delta rule.
        used: names of layers whose weights it uses without calling them; accelerate may have offloaded these.
        stock: the transformers class, whose forward runs if the mixer is only switched on for a limited time and the
            ops cannot do what is asked.
    """
    fast = delta_forward(used, stock) if scan is None else _scan_forward(scan, used)
    known = HARMLESS_KEYWORDS.union(inspect.signature(fast).parameters)

    @functools.wraps(fast)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = unknown_keywords(kwargs, known)
        if getattr(self, LENT, False) and (asked or transformed()):
            return stock.forward(self, hidden_states, *args, **kwargs)  # type: ignore[attr-defined]
        check_keywords(self, {name: kwargs[name] for name in asked}, _OR_STOCK)
        return fast(self, hidden_states, *args, **kwargs)

    return forward


def _scan_forward(scan: Callable, used: list[str]) -> Callable:
    """Build the forward around a scan; arguments as in `_forward`."""

    # Weights of children that are used without calling them must be brought in where accelerate offloads them.
    @accelerate.force_accelerate_hooks(used)
    def by_scan(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        cache_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        cache = one_cache(self, cache=cache, cache_params=cache_params)
        state = recurrent_state(cache, self.layer_idx)
        y = scan(self, mask_padding(hidden_states, attention_mask), attention_mask, cache, state)
        return self.out_proj(y.to(hidden_states.dtype))

    return by_scan


def _reduce(self: Any, protocol: Any) -> tuple:
    """Copy and pickle a mixer that is switched on for a limited time as the stock mixer."""
    made: Any = nn.Module.__reduce_ex__(self, protocol)
    if LENT not in vars(self):
        return made
    state = {name: value for name, value in made[2].items() if name != LENT}
    return object.__new__, (mixer_class(self),), state, *made[3:]


def __getattr__(name: str) -> Any:
    """Find the subclasses by name, for pickle."""
    for path in _FORWARDS:
        if path.rpartition(".")[2] == name:
            return _fast_class(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def require(mixer: nn.Module) -> None:
    """Check that the installed transformers is as the scan functions below expect it.

    Raises:
        RuntimeError: naming what is missing or unknown.
    """
    from transformers import cache_utils

    used, scan = _FORWARDS[_path(mixer_class(mixer))]
    common = ("layer_idx", "in_proj", "out_proj", "A_log", "D", "activation", "act")
    special = ("x_proj",) if "dt_proj" in used else ("dt_bias", "norm", "n_groups", "chunk_size", "time_step_limit")
    missing = [f"{type(mixer).__name__}.{name}" for name in (*common, *special, *used) if not hasattr(mixer, name)]
    if scan is None:
        missing = missing_functions(mixer_class(mixer))
    methods = ("has_previous_state", "update_conv_state", "update_recurrent_state")
    missing += [f"cache_utils.Cache.{name}" for name in methods if not hasattr(cache_utils.Cache, name)]
    if not hasattr(accelerate, "force_accelerate_hooks"):
        missing.append("integrations.accelerate.force_accelerate_hooks")
    if scan is not None:  # a delta rule's forward is transformers' own
        missing += [f"knowledge of {name}" for name in sorted(unknown_parameters(mixer_class(mixer)))]
    if missing:
        import transformers

        raise RuntimeError(
            f"use_fast_ops does not fit transformers {transformers.__version__}: no {', '.join(missing)}"
        )


def _mamba_scan(mixer: Any, hidden: Tensor, attention_mask: Tensor | None, cache: Any, state: Tensor | None) -> Tensor:
    """Scan of Mamba, FalconMamba and Jamba; the last two normalise dt, B and C. (B, L, H) -> (B, L, I)."""
    u, gate = mixer.in_proj(hidden).chunk(2, dim=-1)
    u = mask_padding(convolve(mixer, u, cache), attention_mask)
    size = mixer.A_log.shape[1]
    projected = mixer.x_proj(u)
    step, B, C = projected.split([projected.shape[-1] - 2 * size, size, size], dim=-1)
    if hasattr(mixer, "dt_layernorm"):
        step, B, C = mixer.dt_layernorm(step), mixer.b_layernorm(B), mixer.c_layernorm(C)
    delta, bias = time_steps(mixer.dt_proj, step)
    A = -mixer.A_log.float().exp()
    options: dict[str, Any] = {"D": mixer.D.float(), "delta_bias": bias, "delta_softplus": True}
    scan, one = partial(selective_scan, z=gate), partial(selective_state_update, z=gate[:, 0])
    return scan_or_step(mixer, cache, state, scan, one, (u, delta, A, B, C), **options)


def _mamba2_scan(mixer: Any, hidden: Tensor, attention_mask: Tensor | None, cache: Any, state: Tensor | None) -> Tensor:
    """Scan of Mamba-2 and similar mixers; Falcon-H1 scales its projections and may gate without a norm."""
    if hasattr(mixer, "mup_vector"):
        projected = mixer.in_proj(hidden * mixer.ssm_in_multiplier) * mixer.mup_vector
    else:
        projected = mixer.in_proj(hidden)
    heads, convolved = len(mixer.A_log), len(mixer.conv1d.weight)
    channels = projected.shape[-1] - convolved - heads
    block = (convolved - channels) // 2
    gate, signal, dt = projected.split([channels, convolved, heads], dim=-1)
    signal = mask_padding(convolve(mixer, signal, cache), attention_mask)
    x, B, C = signal.split([channels, block, block], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    B, C = (part.unflatten(-1, (mixer.n_groups, -1)) for part in (B, C))
    options: dict[str, Any] = {
        "D": mixer.D,
        "dt_bias": mixer.dt_bias,
        "dt_softplus": True,
        "dt_limit": tuple(mixer.time_step_limit),
    }
    A = -mixer.A_log.float().exp()
    scan = partial(ssd_scan, chunk_size=mixer.chunk_size)
    y = scan_or_step(mixer, cache, state, scan, ssd_state_update, (x, dt, A, B, C), **options)
    y = y.flatten(2)
    return mixer.norm(y, gate) if getattr(mixer, "mamba_rms_norm", True) else y * F.silu(gate)


_MAMBA = (["conv1d", "dt_proj"], _mamba_scan)
_MAMBA2 = (["conv1d"], _mamba2_scan)
_DELTA = (["conv1d"], None)
_FORWARDS: dict[str, tuple[list[str], Callable | None]] = {
    f"transformers.models.{path}": kind
    for path, kind in {
        "mamba.modeling_mamba.MambaMixer": _MAMBA,
        "falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": _MAMBA,
        "jamba.modeling_jamba.JambaMambaMixer": _MAMBA,
        "mamba2.modeling_mamba2.Mamba2Mixer": _MAMBA2,
        "bamba.modeling_bamba.BambaMixer": _MAMBA2,
        "zamba2.modeling_zamba2.Zamba2MambaMixer": _MAMBA2,
        "nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": _MAMBA2,
        "falcon_h1.modeling_falcon_h1.FalconH1Mixer": _MAMBA2,
        "granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer": _MAMBA2,
        "qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet": _DELTA,
        "qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet": _DELTA,
        "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeGatedDeltaNet": _DELTA,
        "qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextGatedDeltaNet": _DELTA,
        "olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet": _DELTA,
    }.items()
}
