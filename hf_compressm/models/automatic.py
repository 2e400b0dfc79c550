"""Switch the fast ops on where they are exact, without being asked by the user, and off again at the end.

Only calls of such a mixer change: copies and pickles have transformers' own class, and where the ops cannot do what is
asked, transformers' own forward runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers.utils import logging

from ..layers.plain import is_plain
from .fast_ops import LENT, fast_class, mixer_class, require, stock_mixers, uncalled_layers
from .selective_config import has_parameters

logger = logging.get_logger(__name__)

_KERNELS = ("mamba_ssm", "kernels")
"""Packages with which transformers runs these mixers by kernels for GPUs."""


@contextmanager
def by_fast_ops(model: nn.Module, enable: bool = True) -> Iterator[None]:
    """Let stock mixers run by this package's ops within the block, as `switch_on` does.

    Mixers on which `use_fast_ops` was called before stay on afterwards.
    """
    lent = switch_on(model, enable)
    try:
        yield
    finally:
        switch_back(lent)


def switch_on(model: nn.Module, enable: bool = True) -> list[nn.Module]:
    """Let stock mixers run by this package's ops, if that changes their outputs by rounding only.

    Some mixers stay as they are: those whose forward was replaced, whose activation has parameters, or that have an
    adapter or hook on a layer which transformers' code does not call. All stay on GPUs for which transformers has
    kernels, and if the ops do not fit the installed transformers, which is logged.

    Args:
        model: any model, with or without stock mixers.
        enable: the user's choice; nothing happens if False.

    Returns:
        The mixers that were switched, for `switch_back`.
    """
    if not enable:
        return []
    mixers = [mixer for mixer in stock_mixers(model).values() if type(mixer) is mixer_class(mixer) and _exact(mixer)]
    try:
        for mixer in mixers:
            require(mixer)
    except RuntimeError as error:
        logger.warning_once(f"{error}; transformers' own code runs instead")
        return []
    for mixer in mixers:
        mixer.__class__ = fast_class(type(mixer))
        vars(mixer)[LENT] = True
    if mixers:
        logger.warning_once(
            "Stock selective layers run by this package's ops, with the same outputs and faster; what is saved stays "
            "as it was. fast_ops=False (on a command line --no-fast-ops or --no_fast_ops) keeps transformers' own code."
        )
    return mixers


def lent_mixers(model: nn.Module) -> list[nn.Module]:
    """List the mixers of a model that `switch_on` has switched."""
    return [mixer for mixer in stock_mixers(model).values() if LENT in vars(mixer)]


def switch_back(mixers: Iterable[nn.Module]) -> None:
    """Let mixers that `switch_on` has returned run by transformers' own forward again."""
    for mixer in mixers:
        if vars(mixer).pop(LENT, False):
            mixer.__class__ = mixer_class(mixer)


def _exact(mixer: nn.Module) -> bool:
    device = next(mixer.parameters()).device.type
    if device == "meta" or (device != "cpu" and any(map(importlib.util.find_spec, _KERNELS))):
        return False
    layers = [getattr(mixer, name) for name in uncalled_layers(mixer)]
    plain = all(is_plain(layer, nn.Conv1d) or is_plain(layer, nn.Linear) for layer in layers)
    return plain and "forward" not in vars(mixer) and not has_parameters(str(getattr(mixer, "activation", "")))
