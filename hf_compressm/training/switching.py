"""Switch mixers back from this package's ops when training ends, also where an error ends it."""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer

from ..models.automatic import lent_mixers, switch_back


def switch_back_at_the_end(trainer: Trainer) -> None:
    """Make every `train` of this Trainer switch mixers back at its end: no event tells a callback of an error."""
    if not isinstance(trainer.train, _Train):
        trainer.train = _Train(trainer)  # type: ignore[method-assign]


class _Train:
    def __init__(self, trainer: Trainer):
        self.trainer, self.train = trainer, trainer.train
        functools.update_wrapper(self, trainer.train, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = set(map(id, self._lent()))
        try:
            return self.train(*args, **kwargs)
        finally:
            switch_back(mixer for mixer in self._lent() if id(mixer) not in before)

    def _lent(self) -> list[Any]:
        model: Any = self.trainer.model  # None before `model_init` is called
        return [] if model is None else lent_mixers(model)
