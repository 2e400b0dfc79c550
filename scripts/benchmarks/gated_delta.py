"""Time of the gated delta rule against the number of key channels, next to transformers' own functions.

    python scripts/benchmarks/gated_delta.py
    python scripts/benchmarks/gated_delta.py --sizes 128 32 --batches 1 --repeats 30 --json gated_delta.json

The shape is that of a mixer of Qwen3.5: 512 tokens, 16 value heads of 128 channels, 4 key heads. First outputs, final
states and all gradients must be those of transformers' functions; else nothing is timed. Then, with one thread and with
`--threads`, all sizes and variants are measured in turns:

    theirs  torch_chunk_gated_delta_rule, and torch_recurrent_gated_delta_rule for a single token
    plain   this package's op by PyTorch alone
    ours    this package's op as it is chosen for the device

`forward` is without gradients, `training` is forward and backward, `decode` is 32 single tokens, one after the other.
A ratio is the time of theirs over that of the variant: above 1 the variant is faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from common import (
    Clock,
    in_turns,
    largest_difference,
    machine,
    machine_line,
    parse,
    shown,
    spread,
    warn_of_noise,
    write_json,
)
from torch import Tensor
from torch.nn import functional as F
from training import forced
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from hf_compressm.ops.gated_delta_scan import gated_delta_scan, gated_delta_step

SIZES = [128, 64, 32]
VARIANTS = ("theirs", "plain", "ours")
TOKENS = 32
"""Of a `decode`."""
TOLERANCE = 1e-4
"""Of the largest entry: sums of some hundred terms in float32."""


def inputs(batch: int, length: int, size: int, options: argparse.Namespace) -> list[Tensor]:
    """q, k (B, L, G, K), normalised, v (B, L, H, V), g and beta (B, L, H)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads, groups = options.heads, options.key_heads
    keys = [F.normalize(draw(batch, length, groups, size), dim=-1) for _ in range(2)]
    v, g = draw(batch, length, heads, options.width), -0.1 * draw(batch, length, heads).exp()
    return [tensor.to(options.device) for tensor in (*keys, v, g, draw(batch, length, heads).sigmoid())]


def scan(variant: str, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    if variant == "theirs":
        return torch_chunk_gated_delta_rule(*tensors, output_final_state=True)
    return gated_delta_scan(*tensors, backend="naive" if variant == "plain" else None)


def train(variant: str, tensors: list[Tensor], slope: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all tensors."""
    return torch.autograd.grad(scan(variant, tensors)[0], tensors, slope)


def decode(variant: str, tensors: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Output and state of one token; the state may be updated in place."""
    if variant == "theirs":
        options: dict[str, Any] = {"initial_state": state, "output_final_state": True}
        return torch_recurrent_gated_delta_rule(*(tensor[:, None] for tensor in tensors), **options)
    return gated_delta_step(*tensors, state), state


def generate(variant: str, tensors: list[Tensor], state: Tensor) -> None:
    """Some tokens one after the other, as when text is generated."""
    with forced("naive", "gated_delta_step") if variant == "plain" else nullcontext():
        for _ in range(TOKENS):
            _, state = decode(variant, tensors, state)


def works(batch: int, size: int, options: argparse.Namespace) -> dict[tuple, Callable[[], Any]]:
    """What is timed, by pass and variant, after a check that all variants agree."""
    tensors = [tensor.requires_grad_() for tensor in inputs(batch, options.length, size, options)]
    detached = [tensor.detach() for tensor in tensors]
    token = [tensor[:, 0].contiguous() for tensor in detached]
    slope, (_, state) = torch.ones_like(detached[2]), scan("theirs", detached)
    results = {}
    for name in VARIANTS:
        with forced("naive", "gated_delta_step") if name == "plain" else nullcontext():
            stepped, after = decode(name, token, state.clone())
        results[name] = [*scan(name, detached), *train(name, tensors, slope), stepped.reshape(-1), after]
    for name in VARIANTS[1:]:
        difference = largest_difference(results[name], results["theirs"])
        if not difference < TOLERANCE:
            raise SystemExit(f"{name}: results differ by {difference:.1e} of the largest entry; nothing is timed")
    found: dict[tuple, Callable[[], Any]] = {}
    for name in VARIANTS:
        found["forward", name] = partial(scan, name, detached)
        found["training", name] = partial(train, name, tensors, slope)
        found["decode", name] = partial(generate, name, token, state.clone())
    return found


def measure(threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch, size, pass and variant."""
    torch.set_num_threads(threads)
    rows = []
    for batch in options.batches:
        timed = {(size, *key): work for size in options.sizes for key, work in works(batch, size, options).items()}
        seconds = in_turns(timed, options.repeats, options.budget, Clock(options.device, flush=True))
        for (size, name, variant), values in seconds.items():
            ratio = statistics.median(seconds[size, name, "theirs"]) / statistics.median(values)
            case = {"threads": threads, "batch": batch, "size": size, "pass": name, "variant": variant}
            rows.append(case | {"ratio": ratio, "times": spread(values)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="key channels of a head")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--length", type=int, default=512, help="tokens")
    parser.add_argument("--heads", type=int, default=16, help="value heads")
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="value channels of a head")
    options = parse(parser, repeats=20)
    print(machine_line(options.device))
    rows = [row for threads in sorted({1, options.threads}) for row in measure(threads, options)]
    for row in sorted(rows, key=lambda row: (row["pass"], row["threads"], row["batch"], -row["size"])):
        case = f"{row['pass']:8} threads {row['threads']} batch {row['batch']} K {row['size']:3} {row['variant']:6}"
        print(f"{case} ms {shown(row['times'])}  {row['ratio']:6.2f} x")
    warn_of_noise(rows)
    slower = [row for row in rows if row["variant"] == "ours" and row["ratio"] * 1.03 < 1]
    print(f"ours is slower than theirs in {len(slower)} of {len(rows) // len(VARIANTS)} cases")
    if options.json:
        write_json(options.json, {"machine": machine(options.device), "rows": rows})


if __name__ == "__main__":
    main()
