"""Each op alone on the CPU against plain PyTorch: at which shapes, layouts and thread counts is it slower?

    python scripts/benchmarks/op_sweep.py
    python scripts/benchmarks/op_sweep.py --quick
    python scripts/benchmarks/op_sweep.py --ops causal_conv ssd_scan --threads 2 --json op_sweep.json

`plain` is the op's backend "naive"; for a single step, one step of the plain scan from the same state. First, at the
op's smallest shape and in every layout, outputs and all gradients must be those of plain PyTorch in float64; else
nothing is timed. Then ours and plain are measured in turns. `forward` is without gradients, `training` forward and
backward.

`layout` is "contiguous"; "inputs" where all inputs of a sequence are transposed, so that neighbours in time are
neighbours in memory; or "gradients" where the gradient of the output is. A ratio is plain's median over ours: below 1
ours is slower, and the last line counts such cases. Cases with more than 2^28 states of all
steps and sequences together are left out. `--quick` takes the smallest shape, batch 1 and one thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import in_turns, largest_difference, machine, machine_line, write_json
from op_cases import CASES, Draws
from torch import Tensor

from hf_compressm.ops.causal_conv import causal_conv, causal_conv_step, naive_causal_conv
from hf_compressm.ops.diag_system import diag_system
from hf_compressm.ops.selective_scan import naive_selective_scan, selective_state_update
from hf_compressm.ops.ssd_scan import naive_ssd_scan, ssd_state_update

SHAPES = ((64, 64, 16), (512, 128, 16), (512, 256, 128), (2048, 64, 16))
"""Length, features and states."""
BATCHES = (1, 8, 32)
MOST_STATES = 2**28
"""Larger cases are left out, since plain PyTorch holds several copies of all states."""
LAYOUTS = ("contiguous", "inputs", "gradients")
TOLERANCE = 1e-4
"""Of outputs and gradients in float32, relative to the largest entry: sums over hundreds of steps."""
MARGIN = 1.03
"""Ours counts as slower from here on: what repeated runs of the same code differ by."""
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """Inputs of an op for (draws, (B, L, H), N), and its results for these by this package and by plain PyTorch."""

    inputs: Callable[[Draws, tuple[int, int, int], int], Tensors]
    ours: Callable[[Tensors], tuple[Tensor, ...]]
    plain: Callable[[Tensors], tuple[Tensor, ...]]
    single_step: bool = False


def _conv_inputs(draw: Draws, shape: tuple[int, int, int], size: int) -> Tensors:
    return {"x": draw(*shape), "weight": draw(shape[2], 4), "bias": draw(shape[2])}


def _system_inputs(draw: Draws, shape: tuple[int, int, int], size: int) -> Tensors:
    features = shape[2]
    lam = torch.polar(torch.sigmoid(draw(size) + 3), draw(size))
    weights = {"B": draw(2 * size, features), "C": draw(features, 2 * size), "D": draw(features)}
    return {"u": draw(*shape), "lam": lam, **weights}


def _step_inputs(scan: str, draw: Draws, shape: tuple[int, int, int], size: int) -> Tensors:
    """One step of a scan, from a state."""
    draw.states = True
    return CASES[scan].inputs(draw, (shape[0], 1, shape[2]), size)


def _one_step(update: Callable[..., Tensor], softplus: str, tensors: Tensors) -> tuple[Tensor]:
    """A step by `update`, on tensors (B, 1, ...) without their dimension of time; the state is left at the new one."""
    fixed = ("A", "D", "delta_bias", "dt_bias")
    given = {k: v if k in fixed else v[:, 0] for k, v in tensors.items() if k != "initial_state"}
    return (update(tensors["initial_state"], **given, **{softplus: True})[:, None],)


def _one_plain_step(scan: Callable[..., Any], softplus: str, tensors: Tensors) -> tuple[Tensor]:
    y, final = scan(**tensors, **{softplus: True})
    tensors["initial_state"].copy_(final)
    return (y,)


OPS = {
    "causal_conv": Op(
        _conv_inputs, lambda t: (causal_conv(**t, backend="cpu"),), lambda t: (causal_conv(**t, backend="naive"),)
    ),
    "diag_system": Op(
        _system_inputs, lambda t: diag_system(**t, backend="cpu"), lambda t: diag_system(**t, backend="naive")
    ),
    **{
        name: Op(case.inputs, partial(case.outputs, backend="cpu"), partial(case.outputs, backend="naive"))
        for name, case in CASES.items()
    },
    "causal_conv_step": Op(
        lambda draw, shape, size: _conv_inputs(draw, (shape[0], 4, shape[2]), size),
        lambda t: (causal_conv_step(t["x"].transpose(1, 2), t["weight"], t["bias"]),),
        lambda t: (naive_causal_conv(**t)[:, -1],),
        single_step=True,
    ),
    "selective_state_update": Op(
        partial(_step_inputs, "selective_scan"),
        partial(_one_step, selective_state_update, "delta_softplus"),
        partial(_one_plain_step, naive_selective_scan, "delta_softplus"),
        single_step=True,
    ),
    "ssd_state_update": Op(
        partial(_step_inputs, "ssd_scan"),
        partial(_one_step, ssd_state_update, "dt_softplus"),
        partial(_one_plain_step, naive_ssd_scan, "dt_softplus"),
        single_step=True,
    ),
}


def transposed(tensor: Tensor) -> Tensor:
    """The tensor (B, L, ...) with neighbours in time as neighbours in memory; one of fewer dimensions as it is."""
    return tensor if tensor.ndim < 3 else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def drawn(op: Op, shape: tuple[int, int, int], size: int, layout: str) -> Tensors:
    tensors = op.inputs(Draws(torch.float32, "cpu", states=False), shape, size)
    return {k: transposed(v) if layout == "inputs" else v for k, v in tensors.items()}


def slope(output: Tensor, layout: str) -> Tensor:
    """A gradient of an output."""
    found = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return transposed(found) if layout == "gradients" else found


def training(function: Callable, given: Tensors, dy: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of all tensors for that of the first output."""
    outputs = function(given)
    found = torch.autograd.grad(outputs[0], list(given.values()), dy, materialize_grads=True)
    return [*(output.detach() for output in outputs), *found]


def leaves(tensors: Tensors) -> Tensors:
    return {k: v.detach().requires_grad_() for k, v in tensors.items()}


def is_differentiable(op: Op, tensors: Tensors) -> bool:
    return op.ours(leaves(tensors))[0].requires_grad


def wide(tensors: Tensors) -> Tensors:
    return {k: v.to(torch.complex128 if v.is_complex() else torch.float64).clone() for k, v in tensors.items()}


def check(name: str, op: Op) -> float:
    """Largest difference from plain PyTorch in float64 at the smallest shape; exits if it exceeds the tolerance."""
    length, features, size = SHAPES[0]
    worst = 0.0
    for layout in LAYOUTS:
        tensors = drawn(op, (2, length, features), size, layout)
        output = op.ours({k: v.clone() for k, v in tensors.items()})[0]
        pair = ((op.plain, wide(tensors)), (op.ours, tensors))
        if op.single_step or not is_differentiable(op, tensors):
            exact, found = (function(given) for function, given in pair)
        else:
            dy = slope(output, layout)
            exact, found = (training(f, leaves(t), dy.to(f(t)[0].dtype)) for f, t in pair)
        difference = largest_difference(found, exact)
        if not difference < TOLERANCE:
            raise SystemExit(f"{name}, {layout}: differs from plain PyTorch by {difference:.1e}; nothing is timed")
        worst = max(worst, difference)
    return worst


def works(op: Op, shape: tuple[int, int, int], size: int) -> Iterator[tuple[str, str, dict[str, Callable[[], Any]]]]:
    """Pass, layout, and what is timed, by "ours" and "plain"."""
    both = {"ours": op.ours, "plain": op.plain}
    for layout in LAYOUTS[: 1 if op.single_step else 3]:
        tensors = drawn(op, shape, size, layout)
        if layout != "gradients":
            yield "forward", layout, {k: partial(torch.no_grad()(f), tensors) for k, f in both.items()}
        if not op.single_step and is_differentiable(op, tensors):
            dy = slope(op.ours(tensors)[0], layout)
            yield "training", layout, {k: partial(training, f, leaves(tensors), dy) for k, f in both.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of the CPU")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of a variant of a case, two runs at least")
    parser.add_argument("--quick", action="store_true", help="the smallest shape, batch 1, one thread, three runs")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    shapes, batches = (SHAPES[:1], BATCHES[:1]) if options.quick else (SHAPES, BATCHES)
    threads, repeats = ([1], 3) if options.quick else (options.threads, options.repeats)
    print(machine_line())
    print("largest differences:", ", ".join(f"{name} {check(name, OPS[name]):.1e}" for name in options.ops))
    print(
        f"{'op':22} {'pass':8} {'layout':10} {'B':>3} {'L':>5} {'H':>4} {'N':>4} threads    ours ms   plain ms  ratio"
    )
    rows = []
    for name, count, (length, features, size), batch in itertools.product(options.ops, threads, shapes, batches):
        if batch * length * features * size > MOST_STATES:
            continue
        torch.set_num_threads(count)
        for kind, layout, timed in works(OPS[name], (batch, length, features), size):
            seconds = in_turns(timed, repeats, options.budget)
            ours, plain = (1e3 * statistics.median(seconds[key]) for key in ("ours", "plain"))
            row = {"op": name, "pass": kind, "layout": layout, "B": batch, "L": length, "H": features, "N": size}
            rows.append(row | {"threads": count, "ours_ms": ours, "plain_ms": plain, "ratio": plain / ours})
            where = f"{batch:3} {length:5} {features:4} {size:4} {count:7}"
            print(f"{name:22} {kind:8} {layout:10} {where} {ours:10.3f} {plain:9.3f} {plain / ours:6.2f}", flush=True)
    if options.json:
        write_json(options.json, {"machine": machine(), "rows": rows})
    slower = sum(row["ratio"] * MARGIN < 1 for row in rows)
    print(f"slower than plain PyTorch by more than {MARGIN - 1:.0%}: {slower} of {len(rows)} cases")


if __name__ == "__main__":
    main()
