"""Compare greedy tokens of a GGUF in llama.cpp with those of transformers for the stock model that it was made from.

    hf-compressm export outputs/small small-stock --to stock --for llama.cpp
    hf-compressm export outputs/small small-gguf --to gguf --for llama.cpp
    python scripts/benchmarks/llama_cpp_tokens.py small-stock small-gguf/model.gguf

The package xllamacpp brings llama.cpp with it, built for CPUs. The model needs its tokenizer.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "State-space models that shrink while they train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stock", help="folder of the stock model, with its tokenizer")
    parser.add_argument("gguf", help="GGUF file that was made from the same model")
    parser.add_argument("--prompt", default=PROMPT, help="text to go on from")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    options = parser.parse_args()
    expected = transformers_tokens(options.stock, options.prompt, options.tokens)
    found = llama_cpp_tokens(options.gguf, options.prompt, options.tokens)
    equal = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), len(found))
    print(json.dumps({"tokens": options.tokens, "equal": equal, "transformers": expected, "llama.cpp": found}))
    raise SystemExit(0 if equal == options.tokens else 1)


@torch.no_grad()
def transformers_tokens(folder: str, prompt: str, count: int) -> list[int]:
    """The ids that transformers generates greedily."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    done = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
    return done[0, ids.shape[1] :].tolist()


def llama_cpp_tokens(path: str, prompt: str, count: int) -> list[int]:
    """The ids that llama.cpp generates greedily; it splits the prompt into tokens by the file's own vocabulary."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, 4096, 1
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, -1
    asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": 1, "ignore_eos": True}
    answer = xllamacpp.Server(params).handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]


if __name__ == "__main__":
    main()
