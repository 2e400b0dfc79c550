"""Callbacks that change the loss a model returns while an unmodified Trainer trains it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..training.trainer_log import running_trainer


class LossHookCallback(TrainerCallback):
    """Replaces the loss in a model's outputs by `new_loss`, in training mode, from the start of training to its end.

    Evaluation sees the model's own loss. Pass the callback to the Trainer as it is; the model is not wrapped.

    Raises:
        ValueError: when training starts, if the Trainer would not use the model's loss (`compute_loss_func`,
            `label_smoothing_factor`); in the first step, if the model returns none.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def prepare(self, model: nn.Module, args: TrainingArguments) -> None:
        """Called when training starts."""

    def new_loss(self, model: nn.Module, inputs: dict[str, Any], output: Any) -> Tensor:
        """The loss to train by.

        Args:
            model: the model, without wrappers.
            inputs: keyword arguments of its forward pass, `num_items_in_batch` among them where the Trainer gives it.
            output: what the model returned, with `loss`.
        """
        raise NotImplementedError

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        trainer = running_trainer()
        if args.label_smoothing_factor or getattr(trainer, "compute_loss_func", None) is not None:
            raise ValueError(
                f"{type(self).__name__} changes the loss that the model returns, which this Trainer does not use: "
                "leave out label_smoothing_factor and compute_loss_func"
            )
        self._remove()
        self.prepare(model, args)
        self._handle = model.register_forward_hook(self._hook, with_kwargs=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _hook(self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
        if not model.training:
            return output
        loss = output.get("loss") if hasattr(output, "get") else None
        if loss is None or args:
            raise ValueError(
                f"{type(self).__name__} needs a model that is called with keywords, labels among them, and returns "
                f"a ModelOutput with a loss; {type(model).__name__} returned "
                f"{type(output).__name__}{'' if loss is None else ' for positional arguments'}"
            )
        output["loss"] = self.new_loss(model, inputs, output)
        return output
