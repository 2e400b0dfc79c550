"""Saved models and tokenizers as they are: dtype, head and all."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from .heads import HEADS, model_classes

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def load_model(name: str, device: str = "auto") -> Any:
    """The saved model in its own dtype, with the head that its config names, so that saving it loses nothing.

    Raises:
        ValueError: if it is neither a causal language model nor a sequence classifier, or there is no such device.
        OSError: if there is no such model.
    """
    place = _device(device)
    config = AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    for auto in HEADS.values():
        if architecture in [known.__name__ for known in model_classes(auto, type(config))]:
            model = auto.from_pretrained(name, dtype="auto").eval()
            # A quantised model is where its quantiser has put it, and may not be moved.
            return model if getattr(config, "quantization_config", None) else model.to(place)
    raise ValueError(
        f"{name} was saved as {architecture or 'an unnamed architecture'}; supported are causal language models and "
        "sequence classifiers"
    )


def load_tokenizer(name: str) -> Any:
    """The tokenizer saved with a model, or None: `AutoTokenizer` makes up an empty one where there are no files."""
    for file in TOKENIZER_FILES:
        try:
            cached_file(name, file)
        except OSError:
            continue
        return AutoTokenizer.from_pretrained(name)
    return None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
