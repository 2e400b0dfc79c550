"""Time stock models on the CPU with and without use_fast_ops: training, decoding, and compression.

    python scripts/benchmarks/fast_ops.py
    python scripts/benchmarks/fast_ops.py --quick
    python scripts/benchmarks/fast_ops.py --what decode --families mamba mamba2 --threads 2 --json fast_ops.json

All nine families, with two layers of states. For each case all variants of a model hold the same weights, must give the
same logits and gradients on a short piece first, and are then measured in turns:

    stock  transformers' own PyTorch code
    fast   the same model after use_fast_ops
    own    this package's class made of it, by from_stock (Mamba and Mamba-2)
    plain  the fast model with PyTorch's convolution and, for Mamba-2's kind, the scan by PyTorch's matrix products

`train` is a step (forward, backward, AdamW) at eight shapes; `decode` is a token of `generate` at batch 1, 8 and 32,
with 16 and 128 states; `compress` is a whole `compress` to half the states. A ratio is the time of a variant over that
of fast: below 1 fast is the slower one, and the last line counts such cases. After `--budget` seconds of a case no more
steps of a variant are taken, but one at least. `--cpu-time` takes processor time, for machines on which other programs
run. `--quick` takes three shapes and one size. The whole table takes about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import largest_difference, machine, machine_line, write_json
from models import VOCABULARY, loss_and_gradients, training_step
from stock_families import BY_SELECTIVE_SCAN, FAMILIES, stock_model
from training import forced

from hf_compressm import compress, from_stock, use_fast_ops

SHAPES = {
    True: (
        *((64, 128, 16), (64, 2048, 1), (128, 512, 2), (256, 256, 2)),
        *((256, 512, 1), (512, 128, 2), (512, 256, 1), (1024, 128, 1)),
    ),
    False: (
        *((64, 128, 16), (64, 2048, 1), (128, 512, 4), (256, 256, 4)),
        *((256, 1024, 2), (512, 256, 2), (512, 1024, 1), (1024, 128, 2)),
    ),
}
"""Hidden size, tokens, batch: for Mamba's kind, of which transformers takes seconds for each step, and Mamba-2's."""
STATES = 16
DECODED = tuple((hidden, states, batch) for hidden in (64, 256) for states in (16, 128) for batch in (1, 8, 32))
"""Hidden size, states, batch."""
PROMPT, NEW = 16, 32
TOLERANCE = 1e-3
"""Of logits and gradients, relative to the largest entry: float32 sums over hundreds of tokens."""
MARGIN = 1.03
"""A fast variant counts as slower from here on: what repeated runs of one and the same differ by."""

Works = dict[str, Callable[[], Any]]


def variants(family: str, hidden: int, states: int) -> dict[str, Any]:
    """The models by variant."""
    stock = stock_model(family, hidden, states)
    fast = copy.deepcopy(stock)
    use_fast_ops(fast)
    found = {"stock": stock, "fast": fast}
    return found | ({"own": from_stock(stock).train()} if family in ("mamba", "mamba2") else {})


def check(family: str, models: dict[str, Any]) -> float:
    """Largest difference of any variant from the stock model on a short piece; ends the program if it is too large."""
    tokens = torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
    expected = loss_and_gradients(models["stock"], tokens)
    worst = max(largest_difference(loss_and_gradients(models[name], tokens), expected) for name in models)
    if not worst < TOLERANCE:
        raise SystemExit(f"{family}: logits or gradients differ by {worst:.1e} of the largest entry; nothing is timed")
    return worst


def measured(works: Works, repeats: int, budget: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each work, in turns and in another order each turn; a slow one is not even warmed up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    order = random.Random(0)
    for turn in range(repeats + 1):
        for name in order.sample(list(works), len(works)):
            if sum(seconds[name]) > budget:
                continue
            begin = clock()
            works[name]()
            taken = clock() - begin
            if turn > 0 or taken > budget:
                seconds[name].append(taken)
    return seconds


def training(family: str, options: argparse.Namespace) -> Iterator[tuple[str, float, Works]]:
    shapes = SHAPES[family in BY_SELECTIVE_SCAN]
    for hidden, length, batch in shapes[::3] if options.quick else shapes:
        models = variants(family, hidden, STATES)
        difference = check(family, models)
        tokens = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
        models["plain"] = copy.deepcopy(models["fast"])
        works = {name: training_step(model, tokens) for name, model in models.items()}
        ops = ("causal_conv",) if family in BY_SELECTIVE_SCAN else ("causal_conv", "ssd_scan")
        works["plain"] = by_plain_code(works["plain"], ops)
        yield f"hidden {hidden:4} tokens {length:4} batch {batch:2}", difference, works


def by_plain_code(work: Callable[[], Any], ops: tuple[str, ...]) -> Callable[[], None]:
    def plain() -> None:
        with forced("naive", *ops):
            work()

    return plain


def decoding(family: str, options: argparse.Namespace) -> Iterator[tuple[str, float, Works]]:
    for hidden, states, batch in DECODED[:3] if options.quick else DECODED:
        models = {name: model.eval() for name, model in variants(family, hidden, states).items()}
        difference = check(family, models)
        tokens = torch.randint(1, VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
        works = {name: generation(model, tokens) for name, model in models.items()}
        yield f"hidden {hidden:4} states {states:4} batch {batch:2}", difference, works


def generation(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def generate() -> None:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)

    return generate


def compression(family: str, options: argparse.Namespace) -> Iterator[tuple[str, float, Works]]:
    hidden = 64 if options.quick else 128
    models = variants(family, hidden, 32)
    difference = check(family, models)
    batches = [{"input_ids": torch.randint(1, VOCABULARY, (4, 128))} for _ in range(2)]

    def cut(fast_ops: bool) -> Callable[[], Any]:
        return lambda: compress(copy.deepcopy(models["stock"]), batches, target=16, refit_steps=10, fast_ops=fast_ops)

    yield f"hidden {hidden:4} states 32 to 16", difference, {"stock": cut(False), "fast": cut(True)}


WHAT = {"train": (training, 1e3, "ms a step"), "decode": (decoding, 1e3 / NEW, "ms a token")}
WHAT["compress"] = (compression, 1.0, "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of one variant in one case")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--cpu-time", action="store_true", help="processor time in place of the clock on the wall")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    description = machine()
    print(machine_line())
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = []
    for what in options.what:
        make, scale, unit = WHAT[what]
        for family in options.families:
            for case, difference, works in make(family, options):
                seconds = measured(works, options.repeats, options.budget, clock)
                medians = {name: statistics.median(values) * scale for name, values in seconds.items()}
                ratios = {name: value / medians["fast"] for name, value in medians.items() if name != "fast"}
                row = {"what": what, "family": family, "case": case, "difference": difference, "unit": unit}
                rows.append(row | {"medians": medians, "ratios": ratios})
                beside = "  ".join(f"{name} {value:7.2f} x" for name, value in ratios.items())
                print(f"{what:8} {family:16} {case:32} fast {medians['fast']:9.3f} {unit}  {beside}", flush=True)
    slower = [row for row in rows if row["ratios"]["stock"] * MARGIN < 1]
    print(f"fast is slower than stock in {len(slower)} of {len(rows)} cases")
    if options.json:
        write_json(options.json, {"machine": description, "rows": rows})


if __name__ == "__main__":
    main()
