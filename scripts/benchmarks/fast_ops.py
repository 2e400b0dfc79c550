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
from typing import Any

import torch
from common import in_turns, largest_difference, machine, shown, spread, write_json
from models import VOCABULARY, build, loss_and_gradients, training_step

from hf_compressm import use_fast_ops

CASES = ["mamba-16", "mamba-16-large", "mamba-128", "mamba2-16", "mamba2-16-large"]
CASES += ["mamba2-64", "mamba2-128", "mamba2-128-large"]
LENGTH, BATCH = 256, 4
TOLERANCE = 1e-3
"""Of logits and gradients, relative to the largest entry: float32 sums over 1024 tokens."""


def run(case: str, repeats: int, budget: float) -> dict:
    name, size, *rest = case.split("-")
    stock = build(name, int(size), hidden=256 if rest == ["large"] else 64)
    fast = copy.deepcopy(stock)
    use_fast_ops(fast)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    difference = largest_difference(loss_and_gradients(fast, tokens), loss_and_gradients(stock, tokens))
    if not difference < TOLERANCE:
        raise SystemExit(f"{case}: logits or gradients differ by {difference:.1e} of the largest entry")
    steps = {name: training_step(model, tokens) for name, model in (("stock", stock), ("fast", fast))}
    seconds = in_turns(steps, repeats, budget)
    row: dict[str, Any] = {"case": case, "difference": difference} | {
        name: spread(values) for name, values in seconds.items()
    }
    return row | {"ratio": row["stock"]["median_ms"] / row["fast"]["median_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, help=f"default: {' '.join(CASES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of one model's steps in one case")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    description = machine()
    print(", ".join(f"{key} {value}" for key, value in description.items()))
    print(
        f"{'case':18} {'stock ms':>10} {'(p10, p90)':>20} {'fast ms':>10} {'(p10, p90)':>20} {'ratio':>7} {'differ':>8}"
    )
    rows = []
    for case in arguments.cases:
        row = run(case, arguments.repeats, arguments.budget)
        rows.append(row)
        times = f"{shown(row['stock'])} {shown(row['fast'])}"
        print(f"{case:18} {times} {row['ratio']:7.2f} {row['difference']:8.1e}", flush=True)
    if arguments.json:
        write_json(arguments.json, {"machine": description, "rows": rows})


if __name__ == "__main__":
    main()
