"""What a process without this package does with a saved model: load it, generate, and count the bytes of its states.

    python -I scripts/benchmarks/plain_generation.py MODEL --tokens 40 --prompt 105 109 112

prints generated tokens and bytes as JSON. It imports torch and transformers only, and ends with an error if the model's
code imports this package.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PACKAGE = "hf_compressm"


class Blocked:
    """Lets no module of this package be imported, wherever it is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}: it is blocked here", name=name)


def state_bytes(cache: Any) -> int:
    """Bytes of a cache's convolution and recurrent states; those of softmax attention, which grow, are left out."""
    layers = getattr(cache, "layers", ())
    kept = [getattr(layer, name, None) for layer in layers for name in ("conv_states", "recurrent_states")]
    states = tree_leaves([kept, getattr(cache, "rnn_state", None)])
    return sum(state.numel() * state.element_size() for state in states if isinstance(state, Tensor))


@torch.no_grad()
def bytes_per_sequence(model: Any, prompt: Tensor) -> int:
    """Bytes of state that a model in evaluation mode keeps for one sequence, here `prompt` (1, L)."""
    return state_bytes(cache_of(model(input_ids=prompt, use_cache=True))[1])


def cache_of(outputs: Any) -> tuple[str, Any]:
    """The cache that a model returns, and its name, which is also that of the forward's argument."""
    found = {name: getattr(outputs, name, None) for name in ("past_key_values", "cache_params", "cache")}
    return next((name, cache) for name, cache in found.items() if cache is not None)


def continued(model: Any, prompt: Tensor, tokens: int) -> list[int]:
    """The most likely continuation of a prompt (1, L) by so many tokens, through the cache."""
    made = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True)
    return made[0, prompt.shape[1] :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--prompt", type=int, nargs="+", required=True)
    options = parser.parse_args()
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    prompt = torch.tensor([options.prompt])
    found = {"class": f"{type(model).__module__}.{type(model).__qualname__}", "torch": torch.__version__}
    found |= {"tokens": continued(model, prompt, options.tokens), "bytes": bytes_per_sequence(model, prompt)}
    assert not any(name.partition(".")[0] == PACKAGE for name in sys.modules)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
