"""Refuse data of which the Trainer hands nothing but labels to the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..surgery.wrappers import class_name

LABELS = {"label", "label_ids", "labels", "shift_labels"}
NOT_INPUTS = LABELS | {"attention_mask"}


def refuse_lost_inputs(trainer: Any, model: nn.Module) -> None:
    """Raise if the Trainer has dropped every column that the model could read, since `forward` takes none so named.

    With `remove_unused_columns`, the default, it does so without a word as long as one is left, such as `labels`.

    Raises:
        ValueError: if that is so, with the columns' names.
    """
    taken = getattr(trainer, "_signature_columns", None)  # what the Trainer, or a subclass of it, keeps
    names = getattr(getattr(trainer, "train_dataset", None), "column_names", None)
    if not isinstance(names, list) or taken is None or not trainer.args.remove_unused_columns:
        return
    dropped = [name for name in names if name not in taken]
    kept = {name for name in names if name in taken}
    if dropped and kept and kept <= NOT_INPUTS:
        expected = getattr(model, "main_input_name", "input_ids")
        raise ValueError(
            f"the Trainer drops the columns {', '.join(dropped)} of the data, which {class_name(model)}.forward "
            f"does not take, and only {', '.join(sorted(kept))} would reach the model. Rename the column that the "
            f"model reads to {expected}, or set remove_unused_columns=False and make the batch in data_collator."
        )
