"""Time a whole training step (forward, backward, AdamW) at several numbers of states N, and compare the speed-ups.

    python scripts/benchmarks/training.py
    python scripts/benchmarks/training.py --models mamba --sizes 128 12 1 --json training.json --plot training.png
    python scripts/benchmarks/training.py --against naive --repeats 5
    python scripts/benchmarks/training.py --device cuda --hidden 1024 --layers 4 --length 2048 --batch 8

Models: this package's, the language models over 256 tokens, and transformers' Mamba and Mamba-2 with `use_fast_ops`.
`compressm_mamba2` at N is the model of the largest size cut to N states in every layer, whose projections and
convolutions keep their size. AdamW is the fused one, as in the Trainer.

First, at every N, loss, logits and all gradients must be those of the same model with HF_COMPRESSM_<OP>=naive; else
nothing is timed. Then all sizes of a model take steps in turns; with `--against` so does each model with its scan by
another backend. With t(N) the median, the table tells for each N

    speed-up  t(128) / t(N)
    saved     (t(128) - t(N)) / (t(128) - t(1)), to be compared with the share of states that is gone, (128 - N) / 127
    possible  t(128) / (t(1) + (t(128) - t(1)) (N - 1) / 127): the speed-up if what depends on N shrank with N
    reached   speed-up / possible

where 128 and 1 are the largest and the smallest of `--sizes`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from models import OPS, VOCABULARY, build, loss_and_gradients, training_step
from op_cases import backends_of
from plotting import plot
from torch import Tensor, nn

from hf_compressm import use_fast_ops

SIZES = [128, 64, 32, 16, 12, 8, 4, 1]
TOLERANCE = 1e-3
"""Of loss, logits and gradients, relative to each one's largest entry: float32 sums over hundreds of tokens."""
CHECKED_LENGTH = 256


@contextmanager
def forced(backend: str, *ops: str) -> Iterator[None]:
    """Makes ops run with a backend, by their environment variables."""
    names = [f"HF_COMPRESSM_{op.upper()}" for op in ops]
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, backend))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)


def check(name: str, model: nn.Module, tokens: Tensor) -> float:
    """Largest difference from the same model by plain PyTorch code, on one sequence; exits if it is too large."""
    some = tokens[:1, :CHECKED_LENGTH]
    found = loss_and_gradients(model, some)
    with forced("naive", OPS[name], "causal_conv"):
        expected = loss_and_gradients(model, some)
    difference = largest_difference(found, expected)
    if not difference < TOLERANCE:
        raise SystemExit(
            f"{name}: loss, logits or gradients differ by {difference:.1e} of the largest entry from those with "
            f"HF_COMPRESSM_{OPS[name].upper()}=naive, more than {TOLERANCE:.0e}; nothing is timed"
        )
    return difference


def by(backend: str, op: str, step: Callable[[], None]) -> Callable[[], None]:
    def other() -> None:
        with forced(backend, op):
            step()

    return other


def measure(name: str, tokens: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each N, all measured in turns, from the largest N to the smallest."""
    sizes, others = options.sizes[::-1], backends_of(OPS[name], options.against, options.device)[1:]
    steps: dict[tuple[int, str], Callable[[], None]] = {}
    differences: dict[int, float] = {}
    for size in sizes:
        model = build(name, size, options.hidden, options.layers, uncut=sizes[0]).to(options.device)
        if name in ("mamba", "mamba2"):
            use_fast_ops(model)
        differences[size] = check(name, model, tokens)
        step = training_step(model, tokens)
        steps[size, "own"] = step
        for other in others:
            steps[size, "against"] = by(other, OPS[name], step)
    seconds = in_turns(steps, options.repeats, options.budget, Clock(options.device))
    if empty := [size for size in sizes if not seconds[size, "own"]]:
        raise SystemExit(f"{name}, N = {empty[0]}: out of memory; choose smaller --hidden, --length or --batch")
    times = {size: spread(seconds[size, "own"]) for size in sizes}
    first, last = (times[size]["median_ms"] for size in (sizes[0], sizes[-1]))
    rows = []
    for size in sizes:
        middle = times[size]["median_ms"]
        gone = (sizes[0] - size) / (sizes[0] - sizes[-1])
        row = {"model": name, "N": size, "difference": differences[size], "times": times[size]}
        row |= {"speed_up": first / middle, "possible": first / (last + (first - last) * (1 - gone))}
        row |= {"saved": (first - middle) / (first - last), "states_gone": gone}
        row["reached"] = row["speed_up"] / row["possible"]
        rivals = seconds.get((size, "against"))
        row["against_times"] = spread(rivals) if rivals else None
        rows.append(row)
    return rows


def panel(name: str, rows: list[dict[str, Any]], against: str) -> dict[str, Any]:
    """Time against N with the line from the smallest to the largest: what removing states allows."""
    sizes = [row["N"] for row in rows]
    line = [rows[0]["times"]["median_ms"] / row["possible"] for row in rows]
    curves: list[dict[str, Any]] = [
        {"label": "step", "N": sizes, "times": [row["times"] for row in rows], "line": line}
    ]
    rivals = [row for row in rows if row["against_times"]]
    if rivals:
        other = {"N": [row["N"] for row in rivals], "times": [row["against_times"] for row in rivals], "line": None}
        curves.append(other | {"label": f"by {against}"})
    return {"title": name, "curves": curves, "log": bool(rivals)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="states N, two at least")
    parser.add_argument("--against", choices=("naive", "cpu", "triton", "mamba_ssm", "none"), default="none")
    for name, value in (("hidden", 64), ("layers", 2), ("length", 256), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parse(parser, repeats=20)
    if len(options.sizes) < 2:
        parser.error("--sizes must name two at least: the speed-up is relative to the largest and the smallest")
    description = machine(options.device)
    print(machine_line(options.device))
    tokens = torch.randint(0, VOCABULARY, (options.batch, options.length), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(options.device)
    heads = f"{'ms':>10} {'(p10, p90)':>20} {'speed-up':>8} {'saved':>6} {'gone':>5} {'possible':>8} {'reached':>7}"
    print(f"{'model':17} {'N':>4}{heads} {'against ms':>11}")
    rows, panels = [], []
    for name in options.models:
        found = measure(name, tokens, options)
        for row in found:
            figures = f"{row['speed_up']:8.2f} {row['saved']:6.3f} {row['states_gone']:5.3f} {row['possible']:8.2f}"
            other = "" if options.against == "none" else f" {shown(row['against_times'])}"
            print(f"{name:17} {row['N']:4}{shown(row['times'])} {figures} {row['reached']:7.2f}{other}", flush=True)
        least = min(found, key=lambda row: row["reached"])
        print(f"{name}: at least {least['reached']:.0%} of the possible speed-up, at N = {least['N']}")
        rows += found
        panels.append(panel(name, found, options.against))
    warn_of_noise(rows)
    settings = {name: getattr(options, name) for name in ("hidden", "layers", "length", "batch", "against")}
    if options.json:
        write_json(options.json, {"machine": description, "settings": settings, "rows": rows})
    if options.plot:
        hardware = f"{description.get('gpu', description['processor'])}, {options.threads} threads"
        plot(options.plot, ", ".join([hardware, *(f"{key} {value}" for key, value in settings.items())]), panels)


if __name__ == "__main__":
    main()
