"""What all language models of this package share: backbone and head."""

from __future__ import annotations

from typing import Any

from torch import nn

from .known_by_name import KnownCausalLM


class CausalLM(KnownCausalLM):
    """Mixin of PreTrainedModels that adds a linear head over `backbone`; its weight may be the embedding's.

    Raises:
        ValueError: if the config is for continuous input.
    """

    backbone_class: Any
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: Any) -> None:
        if config.vocab_size is None or config.num_channels is not None:
            raise ValueError(
                f"{type(self).__name__} predicts tokens: set config.vocab_size and leave config.num_channels out"
            )
        super().__init__(config)  # type: ignore[call-arg]
        self.backbone = self.backbone_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
