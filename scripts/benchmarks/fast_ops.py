"""One training step (forward, backward, AdamW) of stock Mamba and Mamba-2 on the CPU, with and without use_fast_ops.

    python scripts/benchmarks/fast_ops.py
    python scripts/benchmarks/fast_ops.py mamba2-16 mamba2-128 --threads 2 --repeats 20 --json fast_ops.json

Both models hold the same weights, must give the same logits and gradients, and then take steps in turns on the same
tokens. A case is NAME-N or NAME-N-large: hidden size 64 and 8 heads of 16 channels, or 256 and 16 of 32; 2 layers, 256
tokens, batch 4, vocabulary 256. Stock Mamba takes about half a minute for a step at N = 128: after `--budget` seconds
of a case no further steps of the slower model are taken, but at least two.
"""

import argparse
import copy
import json
import platform
import statistics
import time

import torch
from tqdm.auto import tqdm
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers import __version__ as transformers_version

from hf_compressm import use_fast_ops

CASES = ["mamba-16", "mamba-16-large", "mamba-128", "mamba2-16", "mamba2-16-large"]
CASES += ["mamba2-64", "mamba2-128", "mamba2-128-large"]
VOCABULARY, LENGTH, BATCH = 256, 256, 4
TOLERANCE = 1e-3
"""Of logits and gradients, relative to the largest entry: float32 sums over 1024 tokens."""


def build(name: str, size: int, large: bool) -> torch.nn.Module:
    common = {"vocab_size": VOCABULARY, "hidden_size": 256 if large else 64, "num_hidden_layers": 2, "state_size": size}
    torch.manual_seed(0)
    if name == "mamba":
        return MambaForCausalLM(MambaConfig(**common)).train()
    heads = {"num_heads": 16, "head_dim": 32} if large else {"num_heads": 8, "head_dim": 16}
    return Mamba2ForCausalLM(Mamba2Config(**common, **heads, n_groups=1, chunk_size=64)).train()


def check(stock: torch.nn.Module, fast: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Largest difference of logits and gradients, relative to the largest entry; leaves no gradients behind."""
    results = []
    for model in (stock, fast):
        output = model(tokens, labels=tokens)
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    pairs = zip(*results, strict=True)
    return max(float((found - expected).abs().max() / expected.abs().max()) for expected, found in pairs)


def measure(models: dict, tokens: torch.Tensor, repeats: int, budget: float) -> dict[str, list[float]]:
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in tqdm(range(repeats + 1), leave=False, disable=None):
        for name, model in models.items():
            if turn > 2 and sum(seconds[name]) > budget:
                continue
            start = time.perf_counter()
            model(tokens, labels=tokens).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> dict:
    ordered = sorted(seconds)
    tenth = (len(ordered) - 1) // 10
    return {
        "steps": len(ordered),
        "median_ms": 1e3 * statistics.median(ordered),
        "p10_ms": 1e3 * ordered[tenth],
        "p90_ms": 1e3 * ordered[-1 - tenth],
    }


def run(case: str, repeats: int, budget: float) -> dict:
    name, size, *rest = case.split("-")
    stock = build(name, int(size), rest == ["large"])
    fast = copy.deepcopy(stock)
    use_fast_ops(fast)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    difference = check(stock, fast, tokens)
    if not difference < TOLERANCE:
        raise SystemExit(f"{case}: logits or gradients differ by {difference:.1e} of the largest entry")
    seconds = measure({"stock": stock, "fast": fast}, tokens, repeats, budget)
    row = {"case": case, "difference": difference} | {name: spread(values) for name, values in seconds.items()}
    return row | {"ratio": row["stock"]["median_ms"] / row["fast"]["median_ms"]}


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, help=f"default: {' '.join(CASES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of one model's steps in one case")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {
        "processor": processor(),
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers_version,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(
        f"{'case':18} {'stock ms':>10} {'(p10, p90)':>20} {'fast ms':>10} {'(p10, p90)':>20} {'ratio':>7} {'differ':>8}"
    )
    rows = []
    for case in arguments.cases:
        row = run(case, arguments.repeats, arguments.budget)
        rows.append(row)
        times = ""
        for model in ("stock", "fast"):
            between = f"({row[model]['p10_ms']:.1f}, {row[model]['p90_ms']:.1f})"
            times += f" {row[model]['median_ms']:10.1f} {between:>20}"
        print(f"{case:18}{times} {row['ratio']:7.2f} {row['difference']:8.1e}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
