"""The fast ops switched on by this package itself: where they are exact, said once, and back at the end.

Such a mixer is as it was for everybody but the one who calls it: copies and pickles have transformers' own class, and
what the ops do not do is left to transformers' own forward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers.utils import logging

from ..layers.plain import is_plain
from .fast_ops import LENT, fast_class, mixer_class, passed_over, require, stock_mixers
from .selective import has_parameters

logger = logging.get_logger(__name__)

_KERNELS = ("mamba_ssm", "kernels")
"""Packages with which transformers runs these mixers by kernels for GPUs."""


@contextmanager
def by_fast_ops(model: nn.Module, enable: bool = True) -> Iterator[None]:
    """Stock mixers run by this package's ops within the block, where that is exact; nothing happens without `enable`.

    Mixers on which `use_fast_ops` was called before stay on afterwards.
    """
    lent = switch_on(model) if enable else []
    try:
        yield
    finally:
        switch_back(lent)


def switch_on(model: nn.Module) -> list[nn.Module]:
    """Let stock mixers run by this package's ops, where that changes their outputs by rounding only.

    Left alone: mixers whose forward somebody has replaced, whose activation has parameters, or with an adapter or a
    hook on a layer that transformers' code passes over; all on GPUs for which transformers has kernels; and all where
    the ops do not fit the version of transformers, which is said.

    Returns:
        The mixers that were switched, for `switch_back`.
    """
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
    """The mixers of a model that `switch_on` has switched."""
    return [mixer for mixer in stock_mixers(model).values() if LENT in vars(mixer)]


def switch_back(mixers: Iterable[nn.Module]) -> None:
    """Give mixers that `switch_on` has returned transformers' own forward again."""
    for mixer in mixers:
        if vars(mixer).pop(LENT, False):
            mixer.__class__ = mixer_class(mixer)


def _exact(mixer: nn.Module) -> bool:
    device = next(mixer.parameters()).device.type
    if device == "meta" or (device != "cpu" and any(map(importlib.util.find_spec, _KERNELS))):
        return False
    layers = [getattr(mixer, name) for name in passed_over(mixer)]
    plain = all(is_plain(layer, nn.Conv1d) or is_plain(layer, nn.Linear) for layer in layers)
    return plain and "forward" not in vars(mixer) and not has_parameters(str(getattr(mixer, "activation", "")))
