"""What differs between versions of transformers, accelerate, peft, torch and datasets; every other module asks here.

It imports nothing of this package, and these libraries only where a function needs them. What models need of it travels
with saved models, so that their code runs on versions that nobody has pinned.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from typing import Any

LOWEST, NEWEST = (5, 17), (5, 24)
"""Minor versions of transformers between which this package is tested; pyproject.toml says the same."""

CACHE_KEYWORDS = ("cache", "cache_params", "past_key_values")
"""How transformers names a cache: `cache` from 5.24 on; before that `cache_params` in Mamba's kin, or the third."""

PACKED_KEYWORDS = ("seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
"""What separates sequences that are packed into one."""

HARMLESS_KEYWORDS = frozenset(
    {
        *("output_hidden_states", "output_attentions", "output_router_logits", "return_dict", "use_cache"),
        *("num_items_in_batch", "shift_labels", "logits_to_keep", "is_causal", "max_length_q", "max_length_k"),
        *("position_ids", "cache_position", "position_embeddings", "token_type_ids", "mm_token_type_ids"),
    }
)
"""What models hand down to all their layers alike, and what says nothing to a recurrent one."""


def one_cache(owner: Any, **caches: Any) -> Any:
    """The cache among those given under different names; None if there is none.

    Raises:
        TypeError: if two different ones are given.
    """
    given = {name: cache for name, cache in caches.items() if cache is not None}
    first = next(iter(given.values()), None)
    if any(cache is not first for cache in given.values()):
        raise TypeError(f"{type(owner).__name__} was given a cache as {' and another as '.join(given)}; give one")
    return first


def check_keywords(owner: Any, keywords: Mapping[str, Any], remedy: str = "") -> None:
    """Refuse keyword arguments that a recurrent layer would otherwise pass over; None means nothing.

    Args:
        owner: the module that was given them.
        remedy: what else the reader of the message about packed sequences can do.

    Raises:
        ValueError: if they separate sequences that are packed into one.
        TypeError: if there are others than models hand down to all their layers.
    """
    given = unknown_keywords(keywords)
    if any(name in PACKED_KEYWORDS for name in given):
        raise ValueError(
            f"sequences packed into one are not kept apart by this package's ops ({', '.join(given)}); pass them one "
            f"by one{remedy}"
        )
    if given:
        raise TypeError(
            f"{type(owner).__name__} does not know the keyword {', '.join(given)}, and passing over it could change "
            f"what is computed; leave it out{remedy}"
        )


def unknown_keywords(keywords: Mapping[str, Any], known: Collection[str] = HARMLESS_KEYWORDS) -> list[str]:
    """Names of keyword arguments that mean something, and are not among the known ones."""
    return [name for name, value in keywords.items() if value is not None and name not in known]


def transformed() -> bool:
    """Whether what runs now is exported, traced, or under a transform of torch.func: our ops have no rules there."""
    import torch

    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def cache_keyword(taker: Callable) -> str:
    """The name by which a function of transformers, or a class of outputs, takes a cache.

    Raises:
        RuntimeError: if it takes none by a name that is known here.
    """
    names = inspect.signature(inspect.unwrap(taker)).parameters
    for name in CACHE_KEYWORDS:
        if name in names:
            return name
    raise RuntimeError(f"{taker.__qualname__} takes no cache by any of the names {', '.join(CACHE_KEYWORDS)}")


def takes_any_cache_name(forward: Callable) -> Callable:
    """A forward of transformers that takes a cache by each of its names; with the same signature."""
    keyword = cache_keyword(forward)

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in CACHE_KEYWORDS if name in kwargs}
        if given:
            kwargs[keyword] = one_cache(self, **given)
        return forward(self, *args, **kwargs)

    return renamed


def saved_form(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state dict by the names, and in the pieces, in which `save_pretrained` writes it."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(state)))


def parameters_of(function: Callable) -> set[str]:
    """Names of a function's parameters, beneath its decorators."""
    return set(inspect.signature(inspect.unwrap(function)).parameters)


def unknown_parameters(mixer_class: type) -> set[str]:
    """Parameters of a stock mixer's forward that the forwards which stand in for it would pass over."""
    known = {"self", "hidden_states", "attention_mask", "kwargs", *CACHE_KEYWORDS}
    return parameters_of(mixer_class.forward) - known  # type: ignore[attr-defined]


_MIXERS = ("mamba.modeling_mamba.MambaMixer", "mamba2.modeling_mamba2.Mamba2Mixer")
_MODEL = ("input_ids", "inputs_embeds", "use_cache", "output_hidden_states", "return_dict", "attention_mask")
_LAYER = ("hidden_states", "attention_mask")
_NEEDED: dict[str, tuple[str, ...]] = {
    "models.mamba.modeling_mamba.MambaBlock.forward": _LAYER,
    "models.mamba.modeling_mamba.MambaModel.forward": _MODEL,
    "models.mamba.modeling_mamba.MambaForCausalLM.forward": (*_MODEL, "labels", "logits_to_keep"),
    "models.mamba2.modeling_mamba2.Mamba2Block.forward": _LAYER,
    "models.mamba2.modeling_mamba2.Mamba2Model.forward": _MODEL,
    "models.mamba2.modeling_mamba2.Mamba2ForCausalLM.forward": (*_MODEL, "labels", "logits_to_keep"),
    "core_model_loading.revert_weight_conversion": ("model", "state_dict"),
    "cache_utils.Cache.update_conv_state": ("conv_states", "layer_idx"),
    "cache_utils.Cache.update_recurrent_state": ("recurrent_states", "layer_idx"),
    "cache_utils.Cache.has_previous_state": ("layer_idx",),
    "generation.utils.GenerationMixin._supports_default_dynamic_cache": (),
    "integrations.accelerate.force_accelerate_hooks": (),
    "trainer_pt_utils.safe_globals": (),
    "trainer.Trainer.train": ("resume_from_checkpoint", "ignore_keys_for_eval"),
    "trainer.Trainer.log": ("logs",),
    "trainer.Trainer._get_output_dir": ("trial",),
}
"""What this package relies on in transformers beyond its public interface: functions, and parameters that they have."""


def changed_interfaces() -> list[str]:
    """What this package relies on and the installed transformers lacks or has anew, as parts of a sentence."""
    changes = []
    for path, names in _NEEDED.items():
        function = _found(path)
        missing = [] if function is None else sorted(set(names) - parameters_of(function))
        if function is None:
            changes.append(f"there is no {path}")
        elif missing:
            changes.append(f"{path} takes no {', '.join(missing)}")
    for path in _MIXERS:
        mixer = _found(f"models.{path}")
        if mixer is None:
            changes.append(f"there is no models.{path}")
        elif anew := sorted(unknown_parameters(mixer)):
            changes.append(f"{mixer.__name__}.forward takes {', '.join(anew)}, whose meaning is unknown here")
        elif not parameters_of(mixer.forward) & set(CACHE_KEYWORDS):
            changes.append(f"{mixer.__name__}.forward takes no cache by any of the names {', '.join(CACHE_KEYWORDS)}")
    return changes


def check_transformers() -> None:
    """Stop where the installed transformers is not as this package takes it to be; warn where it is newer than tested.

    Raises:
        RuntimeError: if it is older than the oldest version that is tested, or an interface has changed.
    """
    installed = version("transformers")
    minor = tuple(int(part) for part in installed.split(".")[:2])
    tested = f"hf_compressm is tested with {_dotted(LOWEST)} to {_dotted(NEWEST)}"
    remedy = f"pip install 'transformers>={_dotted(LOWEST)},<{_dotted((NEWEST[0], NEWEST[1] + 1))}'"
    if minor < LOWEST:
        raise RuntimeError(f"transformers {installed} is too old: {tested}. Install one of these: {remedy}")
    if changes := changed_interfaces():
        raise RuntimeError(
            f"transformers {installed} does not fit: {'; '.join(changes)}. {tested}. Install one of these: {remedy}"
        )
    if minor > NEWEST:
        warnings.warn(
            f"transformers {installed} is newer than what was tested: {tested}. Its interfaces look the same; where "
            f"results look wrong, install an older one: {remedy}",
            stacklevel=2,
        )


def mamba2_norm_is_by_group() -> bool:
    """Whether stock Mamba-2 normalises each of its groups by itself, as the published model does: from 5.23 on."""
    norm = _found("models.mamba2.modeling_mamba2.MambaRMSNormGated")
    return norm is not None and "group_size" in parameters_of(norm.__init__)


def peft_class(module: str, name: str) -> Any:
    """A class of peft, or None where peft was not imported, so that nothing of it can be there.

    Raises:
        RuntimeError: if the installed peft has no such class.
    """
    if "peft" not in sys.modules:
        return None
    found = getattr(sys.modules.get(f"peft.{module}"), name, None)
    if found is None and hasattr(sys.modules["peft"], "PeftModel"):  # else it is still being imported
        raise RuntimeError(
            f"peft {version('peft')} has no {module}.{name}, by which adapters are found. Install a version of peft "
            "that this package is tested with: constraints.txt names one."
        )
    return found


def raise_recompile_limit(cuts: int) -> None:
    """Let torch.compile compile once for every shape that `cuts` cuts bring; beyond its limit it would run eagerly.

    Raises:
        RuntimeError: if the installed torch has no such limit by a name that is known here.
    """
    import torch

    config: Any = torch._dynamo.config
    needed = cuts + 8
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), needed))
            return
    raise RuntimeError(
        f"torch {torch.__version__} has no torch._dynamo.config.recompile_limit, so cuts could end in eager mode "
        "unnoticed. Train without torch_compile, or with a version of torch that this package is tested with."
    )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _found(path: str) -> Any:
    """An object of transformers by its dotted path, or None."""
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["transformers", *parts[:split]]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("transformers"):
                raise  # something else is broken, and says what
            continue
        for name in parts[split:]:
            found = getattr(found, name, None)
        return found
    return None


check_transformers()
