"""Knowledge distillation: a small model from scratch, taught by a full-size one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import TrainingArguments

from .loss_hook import LossHookCallback

IGNORED = -100
NOT_FOR_THE_TEACHER = ("labels", "num_items_in_batch")


class DistillationCallback(LossHookCallback):
    """Trains by alpha * cross-entropy + (1 - alpha) * T^2 * KL(teacher || student), both softened by T.

    ```python
    Trainer(small_model, args, train_dataset=..., callbacks=[DistillationCallback(teacher)])
    ```

    The divergence is a mean over sequences for classifiers, and over the tokens that have a label for causal language
    models, with gradient accumulation as without. The teacher runs on each batch of the student, in evaluation mode and
    without gradients, and is in no checkpoint.

    Args:
        teacher: a trained model that takes the student's inputs and has logits of the same shape. It is frozen and
            moved to the training device.
        alpha: weight of the labels, in [0, 1].
        temperature: T > 0, by which logits are divided.

    Raises:
        ValueError: on alpha or temperature out of range; in the first step, if the logits' shapes differ or labels are
            not class indices; and as `LossHookCallback`.

    Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531. The defaults are those of arXiv 2510.02823.
    """

    def __init__(self, teacher: nn.Module, alpha: float = 0.5, temperature: float = 2.0):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha, the weight of the labels, must lie in [0, 1]; got {alpha}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number; got {temperature}")
        self.teacher, self.alpha, self.temperature = teacher.requires_grad_(False).eval(), alpha, temperature
        # Without gradients a model would by default return a cache of its states as well.
        takes_cache = "use_cache" in inspect.signature(teacher.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if takes_cache else {}

    def prepare(self, model: nn.Module, args: TrainingArguments) -> None:
        self.teacher.to(args.device)

    def new_loss(self, model: nn.Module, inputs: dict[str, Any], output: Any, run: Any) -> Tensor:
        """The weighted sum of the labels' loss and the divergence from the teacher, a scalar tensor ().

        Raises:
            ValueError: if the logits' shapes differ, or labels are not class indices.
        """
        with torch.no_grad():
            passed = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_TEACHER}
            taught = self.teacher(**passed | self._options).logits
        if taught.shape != output.logits.shape:
            raise ValueError(
                f"the teacher's logits have shape {tuple(taught.shape)}, the student's {tuple(output.logits.shape)}; "
                "both models must have the same classes or vocabulary"
            )
        student, teacher, kept = _aligned(output.logits, taught, inputs["labels"])
        per_item = kl_div(
            (student.float() / self.temperature).log_softmax(-1),
            (teacher.float() / self.temperature).log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        count = inputs.get("num_items_in_batch")
        divergence = (per_item * kept).sum() / (kept.sum().clamp(min=1) if count is None else count)
        return self.alpha * output.loss + (1 - self.alpha) * self.temperature**2 * divergence


def _aligned(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and which of their places have a label: (B, K) and (B,), or (B, L - 1, K) and (B, L - 1)."""
    if labels.is_floating_point() or labels.ndim != student.ndim - 1:
        raise ValueError(
            "distillation takes class indices as labels, one for each sequence or one for each token; got "
            f"{labels.dtype} {tuple(labels.shape)} for logits {tuple(student.shape)}"
        )
    if student.ndim == 3:  # the logits at t predict the label at t + 1
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    return student, teacher, labels != IGNORED
