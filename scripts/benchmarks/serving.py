"""What serving gains from a cut: tokens per second, milliseconds per token, bytes of state per sequence, peak memory.

    python scripts/benchmarks/serving.py
    python scripts/benchmarks/serving.py --families mamba --batches 1 32 --repeats 15 --json serving.json
    python scripts/benchmarks/serving.py --device cuda --hidden 1024 --layers 24

Families: transformers' Mamba, Mamba-2 and Qwen3.5 (gated delta rule), each by transformers' own path ("stock") and as
this package's class with the same weights ("own"), and MimoSSM. Each is measured at `--full` states (key channels) and
after `compress` to `--cut`, with random weights, which cost what trained ones do.

First, nothing is timed unless the two classes generate the same tokens at full size, and a prompt that is read in
chunks gives this package's classes the cache that it gives them when it is read at once; where transformers' own path
fails in that, it is said. Then, all cases of a batch size in turns:

    ms/token      of `generate` beyond the first token, from prompts of 16 tokens; tokens/s is the batch over that
    prefill       ms of the forward pass of a prompt of `--prompt` tokens; "-" where one would need more than
                  `--memory`
    step          ms of a training step (forward, backward, AdamW) on 256 tokens a sequence, at the first batch size
    bytes         of convolution and recurrent states of one sequence
    MB            peak of memory beyond the weights, while it generates and in a training step; in a process of its own
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Clock, in_turns, machine, machine_line, parse, write_json
from models import build, training_step
from plain_generation import bytes_per_sequence, cache_of
from shard_memory import GIVE_BACK, megabytes, reset_mark
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from hf_compressm import compress, from_stock
from hf_compressm.reduction import SizeConstraints
from hf_compressm.report.text_tables import markdown_table

FAMILIES = ("mamba", "mamba2", "gated_delta", "mimo_ssm")
PROMPT, TOKENS, TRAINED = 16, 32, 256
TOLERANCE = 1e-3
"""Of a cache's largest entry: float32, summed in another order over thousands of tokens."""
SMALL = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
"""Blocks that are small too go back to the system when they are freed, and count in peaks."""
Case = tuple[str, str, int]
"""Family, "stock" or "own", and number of states."""


def qwen3_5(size: int, hidden: int, layers: int) -> nn.Module:
    """A Qwen3.5 with `size` key channels and one layer of softmax attention, without which it cannot generate."""
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_value_head_dim": hidden // 4}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4}
    config = Qwen3_5TextConfig(
        **{"vocab_size": 256, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers + 1},
        **{"layer_types": ["linear_attention"] * layers + ["full_attention"], "linear_key_head_dim": size},
        **heads,
        **attention,
    )
    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(config)


def cases(family: str, options: argparse.Namespace) -> list[Case]:
    kinds = ("own",) if family == "mimo_ssm" else ("stock", "own")
    return [(family, kind, size) for kind in kinds for size in (options.full, options.cut)]


def model_of(case: Case, options: argparse.Namespace) -> nn.Module:
    """A model in evaluation mode, of the same weights in both classes, cut from full size if its size is smaller."""
    family, kind, size = case
    if family == "gated_delta":
        model = qwen3_5(options.full, options.hidden, options.layers)
    else:
        model = build(family, options.full, options.hidden, options.layers)
    model = from_stock(model) if kind == "own" and family != "mimo_ssm" else model
    model.eval().generation_config.eos_token_id = None  # type: ignore[union-attr]
    if size < options.full:
        calibration = [{"input_ids": prompt(2, 128, seed=1)}]
        compress(model, calibration, target=size, refit_steps=0, constraints=SizeConstraints(multiple_of=1))
    return model.to(options.device)


def prompt(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generated(model: Any, ids: Tensor, count: int) -> Tensor:
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True)


@torch.no_grad()
def prefilled(model: Any, ids: Tensor, chunk: int = 1 << 20) -> Any:
    """The cache after a prompt (B, L) that is read in chunks."""
    cache: dict[str, Any] = {}
    for part in ids.split(chunk, dim=1):
        name, value = cache_of(model(input_ids=part, use_cache=True, logits_to_keep=1, **cache))
        cache = {name: value}
    return next(iter(cache.values()))


def states(cache: Any) -> list[Tensor]:
    layers = [[getattr(layer, name, None) for name in ("conv_states", "recurrent_states")] for layer in cache.layers]
    return [state for state in tree_leaves(layers) if isinstance(state, Tensor)]


def check(models: dict[Case, nn.Module], options: argparse.Namespace) -> None:
    """Exit unless classes with the same weights generate the same tokens, and chunks make the same cache."""
    ids = prompt(2, PROMPT).to(options.device)
    tokens = {case: generated(model, ids, TOKENS).tolist() for case, model in models.items()}
    full = [case for case in models if case[2] == options.full]
    if any(tokens[case] != tokens[full[0]] for case in full):
        raise SystemExit(f"{full[0][0]}: the two classes generate different tokens; nothing is timed")
    chunk = max(options.prompt // 8, 1)
    long = prompt(1, 2 * chunk + chunk // 5).to(options.device)
    for case, model in models.items():
        pairs = zip(states(prefilled(model, long)), states(prefilled(model, long, chunk)), strict=True)
        worst = max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
        if not worst < TOLERANCE:
            told = f"{case}: a prompt read in chunks gives a cache that differs by {worst:.1e} of its largest entry"
            if case[1] == "own":
                raise SystemExit(f"{told}; nothing is timed")
            print(told)


def fits(case: Case, batch: int, options: argparse.Namespace) -> bool:
    """Whether a long prefill is worth a try: transformers' loops keep all states of all positions, thrice."""
    family, kind, size = case
    if kind == "own" or family == "gated_delta":
        return True
    return 3 * 4 * batch * options.prompt * 2 * options.hidden * size < options.memory * 1e9


def works(models: dict[Case, nn.Module], batch: int, options: argparse.Namespace) -> dict[Any, Callable[[], Any]]:
    """What is timed at a batch size, by case and quantity."""
    short, long, text = (prompt(batch, length).to(options.device) for length in (PROMPT, options.prompt, TRAINED))
    found: dict[Any, Callable[[], Any]] = {}
    for case, model in models.items():
        found[case, "first"] = lambda m=model: generated(m, short, 1)  # type: ignore[misc]
        found[case, "all"] = lambda m=model: generated(m, short, 1 + TOKENS)  # type: ignore[misc]
        if fits(case, batch, options):
            found[case, "prefill"] = lambda m=model: prefilled(m, long)  # type: ignore[misc]
        if batch == options.batches[0]:
            trained = copy.deepcopy(model).train()
            found[case, "step"] = training_step(trained, text)
    return found


def rows(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    models = {case: model_of(case, options) for case in cases(name, options)}
    check(models, options)
    memory = {case: peaks(case, options) for case in models}
    for batch in options.batches:
        seconds = in_turns(works(models, batch, options), options.repeats, options.budget, Clock(options.device))
        for case, model in models.items():
            ms = {what: 1e3 * median(found) for (of, what), found in seconds.items() if of == case and found}
            token = (ms["all"] - ms["first"]) / TOKENS
            row = {"family": case[0], "class": case[1], "states": case[2], "batch": batch}
            row |= {"ms_per_token": token, "tokens_per_s": 1e3 * batch / token, "prefill_ms": ms.get("prefill")}
            row |= {"step_ms": ms.get("step"), "bytes": bytes_per_sequence(model, prompt(1, PROMPT).to(options.device))}
            yield row | memory[case][str(batch)]


def peaks(case: Case, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peaks of memory, in MB, by batch size, taken in a process of its own, where no other case was run before."""
    words = [sys.executable, __file__, "--job", json.dumps(case), "--batches", *map(str, options.batches)]
    for name in ("full", "cut", "hidden", "layers", "device", "threads"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(words, env=os.environ | GIVE_BACK | SMALL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def job(options: argparse.Namespace) -> None:
    family, kind, size = json.loads(options.job)
    model = model_of((family, kind, size), options)
    trained, found = copy.deepcopy(model).train(), {}
    for batch in options.batches:
        short, text = (prompt(batch, length).to(options.device) for length in (PROMPT, TRAINED))
        step = training_step(trained, text)
        step()  # makes moments, which are not what is looked for
        found[batch] = {"generate_mb": peak(lambda ids=short: generated(model, ids, TOKENS), options)}  # type: ignore
        found[batch]["step_mb"] = peak(step, options)
    print(json.dumps(found))


def peak(work: Callable[[], Any], options: argparse.Namespace) -> float:
    """MB that a call needs beyond what there is before it."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    work()
    reset_mark()
    before = megabytes("VmRSS")
    work()
    return max(megabytes("VmHWM") - before, 0.0)


def columns(options: argparse.Namespace) -> list[str]:
    names = ["model", "states", "batch", "ms/token", "tokens/s", "/ full", f"prefill of {options.prompt}, ms"]
    return [*names, "training step, ms", "state bytes", "peak generating, MB", "peak training, MB"]


def cells(row: dict[str, Any], full: dict[str, Any]) -> list[str]:
    """A row as text; `full` is that of the same class and batch before the cut."""

    def shown(name: str, digits: int = 1) -> str:
        return "-" if row[name] is None else f"{row[name]:,.{digits}f}"

    found = [f"{row['family']}, {row['class']}", str(row["states"]), str(row["batch"]), shown("ms_per_token", 2)]
    found += [shown("tokens_per_s", 0), f"{row['tokens_per_s'] / full['tokens_per_s']:.2f}", shown("prefill_ms", 0)]
    return [*found, shown("step_ms", 0), shown("bytes", 0), shown("generate_mb"), shown("step_mb")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--full", type=int, default=128, help="states, or key channels, before the cut")
    parser.add_argument("--cut", type=int, default=12, help="states after it")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--memory", type=float, default=6.0, help="GB that a prefill may need")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.set_defaults(sizes=[1])
    options = parse(parser, repeats=7)
    if options.job:
        return job(options)
    print(machine_line(options.device))
    found: list[dict[str, Any]] = []
    lines: list[list[str]] = []
    for name in options.families:
        full: dict[Any, dict[str, Any]] = {}
        for row in rows(name, options):
            found.append(row)
            lines.append(cells(row, full.setdefault((row["class"], row["batch"]), row)))
            print(*lines[-1], sep=" | ", flush=True)
    print(markdown_table(columns(options), lines))
    if options.json:
        write_json(Path(options.json), {"machine": machine(options.device), "rows": found})


if __name__ == "__main__":
    main()
