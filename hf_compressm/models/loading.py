"""Refuse to load tensors that do not have the sizes which the config says."""

from __future__ import annotations

from typing import Any


class SizesFromConfig:
    """Mixin whose `from_pretrained` refuses tensors of other sizes than the config says, and never draws new ones."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model as transformers does; an error about tensors of another size names them.

        Raises:
            RuntimeError: if tensors of the checkpoint do not have the sizes that the config says, or state matrices
                are missing, unless `ignore_mismatched_sizes`.
        """
        loaded: Any = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        model, info = loaded
        wrong = [
            f"{name} is {tuple(stored)} in the checkpoint, {tuple(expected)} in the model"
            for name, stored, expected in sorted(info["mismatched_keys"])
        ]
        matrices = ("read_in", "read_out")
        missing = info["missing_keys"]
        for name in sorted(missing):
            # If the whole layer is missing, transformers warns and draws all of it.
            if name.endswith(matrices) and f"{name.rpartition('.')[0]}.out_proj.weight" not in missing:
                wrong.append(f"{name} is missing")
        wrong += [f"{name} has no place" for name in sorted(info["unexpected_keys"]) if name.endswith(matrices)]
        if wrong and not ignore_mismatched_sizes:
            raise RuntimeError(
                f"the checkpoint {pretrained_model_name_or_path} does not fit its config, whose state_sizes are "
                f"{model.config.state_sizes}: {'; '.join(wrong)}"
            )
        return (model, info) if output_loading_info else model
