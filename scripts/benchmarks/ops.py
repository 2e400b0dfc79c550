"""Time of the scans, forward and with gradients, against the number of states N; next to another backend.

    python scripts/benchmarks/ops.py
    python scripts/benchmarks/ops.py --against none --repeats 50 --json ops.json --plot ops.png
    python scripts/benchmarks/ops.py --device cuda --dtype bfloat16 --ops selective_scan --against mamba_ssm
    python scripts/benchmarks/ops.py --device cuda --ops selective_scan --shape 8 4096 2048 --sizes 8 12 16 32 64 128

First, at a small shape and every N, outputs and all gradients must be those of the plain PyTorch reference in float64;
else nothing is timed. Then all sizes, both passes and both backends of an op are measured in turns. `forward` is
without gradients, as in inference; `training` is forward and backward. An alternative that has taken `--budget`
seconds in a case is measured no more there, but twice at least. A summary tells, for each op and pass, the time at
N = 12 relative to N = 128, and by how much a straight line through all sizes (for the Gramian, whose cost has a term
in N^2, a parabola) is missed at most, so that steps at powers of two show.

`share` is that of the bandwidth at which PyTorch copies a large tensor here, for the bytes that must move whatever the
algorithm: forward, inputs read and outputs written once; backward, inputs and gradients of outputs read and gradients
of inputs written once. So `in + out` and `3 in + 2 out`, in bytes, where, with B batch, L length, H channels,

    diag_scan       in = u (B, L, N) complex, lam (N)                              out = states (B, L, N) complex
    selective_scan  in = u, delta, z (B, L, H), B, C (B, L, N), A (H, N), D, bias  out = y (B, L, H)
    ssd_scan        in = x (B, L, H), dt (B, L, heads), B, C (B, L, N), A, D, bias  out = y (B, L, H)
    state_gramian   in = u, dt (B, L, H), B (B, L, N), A (H, N)                    out = G (N, N) float64; no gradients

`--dtype` is that of u, delta, z, x, dt, B, C and y; the rest, and diag_scan whatever the dtype, is in float32, for
float64 in float64. On a CPU the share can exceed 1 where all fits into caches, and time rises faster than N where
it no longer does. `--shape` is B L H; diag_scan has no channels and ssd_scan has heads of at most 64 of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Clock, copy_bandwidth, fitted, in_turns, machine, parse, shown, spread, warn_of_noise, write_json
from op_cases import CASES, TOLERANCE, Case, Draws, backends_of, check
from plotting import plot
from torch import Tensor

SIZES = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def works(case: Case, tensors: dict[str, Tensor], backends: list[str]) -> tuple[dict, dict[str, int]]:
    """What is timed, by pass and backend, and the bytes that must move, by pass."""
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    outputs = case.outputs(tensors, backends[0])
    read, written = bytes_of(tensors.values()), bytes_of(outputs)
    slope = torch.ones_like(outputs[0])

    def forward(backend: str) -> None:
        with torch.no_grad():
            case.outputs(tensors, backend)

    def training(backend: str) -> None:
        torch.autograd.grad(case.outputs(tensors, backend)[0], leaves, slope)

    passes = {"forward": forward, "training": training} if outputs[0].requires_grad else {"forward": forward}
    timed = {(name, backend): partial(work, backend) for name, work in passes.items() for backend in backends}
    return timed, {"forward": read + written, "training": 3 * read + 2 * written}


def measure(op: str, backends: list[str], options: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    """A row for each N and pass, all measured in turns."""
    case = CASES[op]
    timed: dict[tuple, Callable[[], None]] = {}
    moved: dict[int, dict[str, int]] = {}
    shape = tuple(options.shape or case.shapes[options.device])
    for size in options.sizes:
        draws = Draws(getattr(torch, options.dtype), options.device, states=False)
        found, moved[size] = works(case, case.inputs(draws, shape, size), backends)
        timed |= {(size, *key): work for key, work in found.items()}
    seconds = in_turns(timed, options.repeats, options.budget, Clock(options.device, flush=True))
    rows = []
    for size, name, backend in timed:
        if backend != backends[0]:
            continue
        if not seconds[size, name, backend]:
            raise SystemExit(f"{op}, N = {size}: out of memory; choose a smaller --shape than {shape}")
        rivals = [seconds[size, name, other] for other in backends[1:]]
        row = {"op": op, "backend": backend, "shape": shape, "N": size, "pass": name}
        row |= {"times": spread(seconds[size, name, backend]), "bytes": moved[size][name]}
        row["share"] = moved[size][name] / bandwidth / row["times"]["median_ms"] * 1e3
        row["against"] = backends[1] if rivals else None
        row["against_times"] = spread(rivals[0]) if rivals and rivals[0] else None
        row["ratio"] = row["against_times"] and row["against_times"]["median_ms"] / row["times"]["median_ms"]
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How time goes with N, for each op and pass; `curve` is what is fitted, in milliseconds."""
    found = []
    for op, name in dict.fromkeys((row["op"], row["pass"]) for row in rows):
        times = {r["N"]: r["times"]["median_ms"] for r in rows if (r["op"], r["pass"]) == (op, name)}
        curve, miss, where = fitted(list(times), list(times.values()), CASES[op].degree)
        ratio = times[12] / times[128] if {12, 128} <= set(times) else None
        found.append({"op": op, "pass": name, "ratio_12_128": ratio, "miss": miss, "miss_at": where, "curve": curve})
    return found


def panels(rows: list[dict[str, Any]], summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each op on linear axes with the fitted curve, then those with an alternative beside it on logarithmic ones."""
    straight, logarithmic = [], []
    for op in dict.fromkeys(row["op"] for row in rows):
        curves, others = [], []
        for line in (found for found in summaries if found["op"] == op):
            mine = [row for row in rows if (row["op"], row["pass"]) == (op, line["pass"])]
            own = {"N": [r["N"] for r in mine], "times": [r["times"] for r in mine]}
            curves.append(own | {"label": f"{line['pass']}, {mine[0]['backend']}", "line": line["curve"]})
            rivals = [row for row in mine if row["against_times"]]
            other = {"N": [r["N"] for r in rivals], "times": [r["against_times"] for r in rivals], "line": None}
            others.append(other | {"label": f"{line['pass']}, {mine[0]['against']}"})
        straight.append({"title": op, "curves": curves, "log": False})
        if any(other["N"] for other in others):
            beside = [curve | {"line": None} for curve in curves] + others
            logarithmic.append({"title": op, "curves": beside, "log": True})
    return straight + logarithmic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="states N")
    parser.add_argument("--against", choices=("naive", "cpu", "triton", "mamba_ssm", "none"), default="naive")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--shape", nargs=3, type=int, metavar=("B", "L", "H"), help="default: by op and device")
    options = parse(parser, repeats=20)
    description = machine(options.device)
    bandwidth = copy_bandwidth(options.device)
    print(", ".join(f"{key} {value}" for key, value in description.items()))
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    backends = {op: backends_of(op, options.against, options.device) for op in options.ops}
    differences = {
        f"{op}, {backend}": check(op, backend, options.sizes, options.dtype, options.device)
        for op, both in backends.items()
        for backend in both
    }
    print("largest differences:", ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    heads = f"{'ms':>10} {'(p10, p90)':>20}"
    print(f"{'op':15} {'N':>4} {'pass':9}{heads} {'share':>6} {'against ms':>10} {'(p10, p90)':>20} {'ratio':>7}")
    rows = []
    for op, both in backends.items():
        for row in measure(op, both, options, bandwidth):
            ratio = "" if row["ratio"] is None else f"{row['ratio']:7.2f}"
            times = f"{shown(row['times'])} {row['share']:6.2f} {shown(row['against_times'])} {ratio}"
            print(f"{op:15} {row['N']:4} {row['pass']:9}{times}", flush=True)
            rows.append(row)
    summaries = summary(rows)
    for found in summaries:
        ratio = found["ratio_12_128"]
        between = "" if ratio is None else f"N = 12 takes {ratio:.3f} of N = 128; "
        curve = "straight line" if CASES[found["op"]].degree == 1 else "parabola"
        missed = f"{curve} missed by at most {found['miss']:.0%}, at N = {found['miss_at']}"
        print(f"{found['op']}, {found['pass']}: {between}{missed}")
    warn_of_noise(rows)
    if options.json:
        record = {"machine": description, "dtype": options.dtype, "copy_bandwidth_gb_s": bandwidth / 1e9}
        write_json(options.json, record | {"differences": differences, "rows": rows, "summary": summaries})
    if options.plot:
        hardware = f"{description.get('gpu', description['processor'])}, {options.threads} threads, {options.dtype}"
        plot(options.plot, hardware, panels(rows, summaries))


if __name__ == "__main__":
    main()
