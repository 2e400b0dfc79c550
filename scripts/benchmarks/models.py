"""Build the language models whose training steps are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stock_families import VOCABULARY
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm import (
    CompreSSMMamba2Config,
    CompreSSMMamba2ForCausalLM,
    CompreSSMMambaConfig,
    CompreSSMMambaForCausalLM,
    MimoSSMConfig,
    MimoSSMForCausalLM,
)

OPS = {
    "mimo_ssm": "diag_scan",
    "compressm_mamba": "selective_scan",
    "compressm_mamba2": "ssd_scan",
    "mamba": "selective_scan",
    "mamba2": "ssd_scan",
}
"""The scan of each model."""


def build(name: str, state_size: int, hidden: int = 64, layers: int = 2, uncut: int | None = None) -> nn.Module:
    """Build a model in training mode, the same at every call.

    Args:
        name: one of `OPS`; "mamba" and "mamba2" are those of transformers.
        state_size: N >= 1 of every layer.
        hidden, layers: hidden size and number of layers.
        uncut: for "compressm_mamba2", the states that projections and convolutions go on to provide after a cut to
            `state_size`; no cut if None.
    """
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers}
    width = 16 if hidden < 256 else 32 if hidden < 1024 else 64
    heads: dict[str, Any] = {"num_heads": 2 * hidden // width, "head_dim": width, "n_groups": 1, "chunk_size": 64}
    torch.manual_seed(0)
    if name == "mimo_ssm":
        config = MimoSSMConfig(**common, state_sizes=state_size, dropout=0.0)
        return MimoSSMForCausalLM(config).train()
    if name == "compressm_mamba":
        return CompreSSMMambaForCausalLM(CompreSSMMambaConfig(**common, state_size=state_size)).train()
    if name == "compressm_mamba2":
        sizes: dict[str, Any] = {"state_size": uncut or state_size, "state_sizes": state_size}
        return CompreSSMMamba2ForCausalLM(CompreSSMMamba2Config(**common, **heads, **sizes)).train()
    if name == "mamba":
        return MambaForCausalLM(MambaConfig(**common, state_size=state_size)).train()
    return Mamba2ForCausalLM(Mamba2Config(**common, **heads, state_size=state_size)).train()


def loss_and_gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Return loss, logits and the gradients of all parameters, and clear the gradients."""
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    found = [output.loss.detach(), output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """Return a function that takes one step: forward, backward, and AdamW as the Trainer runs it."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
