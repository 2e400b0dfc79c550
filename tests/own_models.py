"""Every class of this package's models with a small config, for tests of what they have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from own_delta_models import FIELDS as DELTA
from own_minimax_models import FIELDS as MINIMAX

import hf_compressm as package

V, B, L = 31, 8, 7
"""Vocabulary, batch, tokens."""

HEADS = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "state_sizes": [3, 5]}
FIELDS: dict[str, dict[str, Any]] = {
    "CompreSSMMamba": SIZES | {"state_size": 5, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
    "MimoSSM": SIZES | {"dropout": 0.0, "initializer_range": 1.0, "pad_token_id": 0},
}
FIELDS["CompreSSMMamba2"] = FIELDS["CompreSSMMamba"] | HEADS
FIELDS["CompreSSMGatedDeltaNet"] = DELTA | SIZES | {"layer_types": None, "full_attention_interval": 0}
FIELDS["CompreSSMMiniMax"] = MINIMAX | SIZES | {"layer_types": None, "full_attention_interval": 0}

CAUSAL = tuple(f"{family}ForCausalLM" for family in FIELDS)
CLASSIFIERS = (
    *(f"{family}ForSequenceClassification" for family in FIELDS),
    "MimoSSMForSequencePairClassification",
)
STEPS = tuple(f"{family}ForTokenClassification" for family in FIELDS)
MODELS = tuple(f"{family}Model" for family in FIELDS)


@dataclass
class Own:
    """A class by name, and what makes small models and inputs for it."""

    name: str
    family: str = field(init=False)

    def __post_init__(self) -> None:
        self.family = self.name.partition("For")[0].removesuffix("Model")

    @property
    def cls(self) -> Any:
        return getattr(package, self.name)

    def config(self, **fields: Any) -> Any:
        return getattr(package, f"{self.family}Config")(**(FIELDS[self.family] | fields))

    def model(self, seed: int = 0, **fields: Any) -> Any:
        torch.manual_seed(seed)
        return self.cls(self.config(**fields))

    def ids(self, batch: int = B, seed: int = 0) -> torch.Tensor:
        shape = (batch, 2, L) if "Pair" in self.name else (batch, L)
        return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))
