"""A callback that replaces the loss of a model while an unmodified Trainer trains it.

Source: hooks of torch.nn.Module; the methods built on this name their own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..training.run_state import PerRun, is_running
from ..training.trainer_log import running_trainer


class LossHookCallback(TrainerCallback):
    """Replaces the loss in a model's outputs by `new_loss`, in training mode, from the start of training to its end.

    Evaluation sees the model's own loss. Pass the callback to the Trainer as it is; the model is not wrapped.

    Raises:
        ValueError: when training starts, if the Trainer would not use the model's loss (`compute_loss_func`,
            `label_smoothing_factor`); in the first step, if the model returns none.
    """

    def __init__(self) -> None:
        self._runs: PerRun[_Hook] = PerRun()

    def prepare(self, model: nn.Module, args: TrainingArguments) -> Any:
        """Called when training starts; `new_loss` and `of_run` give back what it returns."""

    def new_loss(self, model: nn.Module, inputs: dict[str, Any], output: Any, run: Any) -> Tensor:
        """The loss to train by, a scalar tensor ().

        Args:
            model: the model, without wrappers.
            inputs: keyword arguments of its forward pass, `num_items_in_batch` among them where the Trainer gives it.
            output: what the model returned, with `loss`.
            run: what `prepare` returned for this training.

        Raises:
            NotImplementedError: unless a subclass defines it.
        """
        raise NotImplementedError

    def of_run(self, state: TrainerState) -> Any:
        """What `prepare` returned for the training with this state; None outside of one."""
        hook = self._runs.of(state)
        return None if hook is None else hook.run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Attach the hook to the model.

        Raises:
            ValueError: if the Trainer does not use the model's loss.
        """
        model: Any = kwargs["model"]
        trainer = running_trainer()
        if args.label_smoothing_factor or getattr(trainer, "compute_loss_func", None) is not None:
            raise ValueError(
                f"{type(self).__name__} changes the loss that the model returns, which this Trainer does not use: "
                "leave out label_smoothing_factor and compute_loss_func"
            )
        self._runs.begin(state, _Hook(self, state, model, self.prepare(model, args)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (hook := self._runs.end(state)) is not None:
            hook.remove()


class _Hook:
    """A forward hook that serves one training and no other; a copy or pickle of the model has one that does nothing."""

    def __init__(self, callback: LossHookCallback, state: TrainerState, model: nn.Module, run: Any):
        self.callback, self.run = callback, run
        self._state, self._thread = weakref.ref(state), threading.get_ident()
        self._handle = model.register_forward_hook(self, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
        if not model.training:
            return output
        if self._is_left_over():
            self.remove()
            return output
        name, loss = type(self.callback).__name__, output.get("loss") if hasattr(output, "get") else None
        if loss is None or args:
            raise ValueError(
                f"{name} needs a model that is called with keywords, labels among them, and returns "
                f"a ModelOutput with a loss; {type(model).__name__} returned "
                f"{type(output).__name__}{'' if loss is None else ' for positional arguments'}"
            )
        output["loss"] = self.callback.new_loss(model, inputs, output, self.run)
        return output

    @torch.compiler.disable
    def _is_left_over(self) -> bool:
        """Whether the model is run by something else than its training, which then an error has ended."""
        # In other threads are only replicas, whose call stack does not lead back to the Trainer.
        return threading.get_ident() == self._thread and not is_running(self._state())

    def __reduce__(self) -> tuple[Any, ...]:
        return _in_a_copy, ()


def _in_a_copy() -> Callable[..., None]:
    """What a hook is in a copy of its model."""
    return _nothing


def _nothing(*_: Any) -> None:
    pass
