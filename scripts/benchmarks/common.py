"""Functions that the benchmark scripts share: the machine's description, timing in turns, fitted curves, options."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_compressm.report import describe_environment

Key = TypeVar("Key", bound=Hashable)
FLUSH_BYTES = 1 << 28
"""Written between two measurements on a GPU: more than the second-level cache of any."""


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return hardware, threads and versions, all in one mapping."""
    described = describe_environment()
    hardware = described["hardware"]
    found = {"processor": hardware.get("cpu", hardware["machine"]), "threads": hardware["threads"]}
    return found | ({"gpu": hardware["gpus"][0]} if device == "cuda" else {}) | described["versions"]


def machine_line(device: str = "cpu") -> str:
    """Return what `machine` does as one line of text."""
    return ", ".join(f"{name} {value}" for name, value in machine(device).items())


class Clock:
    """Measures the seconds that a call takes on a device.

    On a GPU: between two events, after which the host waits. With `flush` a large buffer is written before, so that
    nothing is left in the cache and the host has time to queue the call's kernels.
    """

    def __init__(self, device: str = "cpu", flush: bool = False) -> None:
        self.on_gpu = device == "cuda"
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.on_gpu and flush else None

    def __call__(self, work: Callable[[], Any]) -> float:
        if not self.on_gpu:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if self.buffer is not None:
            self.buffer.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def in_turns(
    works: dict[Key, Callable[[], Any]], repeats: int, budget: float, clock: Clock | None = None
) -> dict[Key, list[float]]:
    """Return the seconds of each work, measured in turns after one call to warm up, in another order each turn.

    The order changes because the state of allocator and caches after one work affects the time of the next.

    Once a work has had `budget` seconds it is measured no more, but twice at least. One that runs out of memory has no
    seconds.
    """
    clock = clock or Clock()
    seconds: dict[Key, list[float]] = {key: [] for key in works}
    waiting, order = dict(works), random.Random(0)
    for turn in tqdm(range(repeats + 1), leave=False, disable=None):
        for key in order.sample(list(waiting), len(waiting)):
            if len(seconds[key]) > 1 and sum(seconds[key]) > budget:
                del waiting[key]
                continue
            try:
                taken = clock(works[key])
            except torch.OutOfMemoryError:
                del waiting[key]
            else:
                seconds[key] += [taken] * (turn > 0)
            if key not in waiting:
                torch.cuda.empty_cache()
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Return number, median, and 10th and 90th percentile in milliseconds."""
    ordered = sorted(seconds)
    tenth = (len(ordered) - 1) // 10
    return {
        "steps": len(ordered),
        "median_ms": 1e3 * statistics.median(ordered),
        "p10_ms": 1e3 * ordered[tenth],
        "p90_ms": 1e3 * ordered[-1 - tenth],
    }


def shown(times: dict[str, float] | None) -> str:
    """Return median and percentiles as columns of a table."""
    if times is None:
        return f"{'-':>10} {'':>20}"
    between = f"({times['p10_ms']:.2f}, {times['p90_ms']:.2f})"
    return f"{times['median_ms']:10.2f} {between:>20}"


def warn_of_noise(rows: list[dict[str, Any]]) -> None:
    """Print a warning if percentiles lie so far apart that other programs must have run."""
    wide = sum(row["times"]["p90_ms"] > 1.5 * row["times"]["p10_ms"] for row in rows)
    if 4 * wide > len(rows):
        print(f"noisy: in {wide} of {len(rows)} rows the 90th percentile is more than 1.5 times the 10th")


def copy_bandwidth(device: str) -> float:
    """Return the bytes per second that copying a large tensor reads and writes."""
    source = torch.zeros(1 << (30 if device == "cuda" else 28), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = in_turns({"copy": lambda: target.copy_(source)}, 10, 10.0, Clock(device))["copy"]
    return 2 * source.numel() / statistics.median(seconds)


def largest_difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Return the largest difference of any pair of tensors over the pair's largest entry; NaN if any entry is NaN."""
    worst = [
        (a.to(b.dtype) - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack([value.double() for value in worst]).max())


def fitted(sizes: list[int], times: list[float], degree: int = 1) -> tuple[list[float], float, int]:
    """The curve through times at state sizes that errs least in proportion: its values, its largest relative miss and
    the size where that is. A line for degree 1."""
    curve = np.polyval(np.polyfit(sizes, times, min(degree, len(sizes) - 1), w=1 / np.array(times)), sizes)
    misses = np.abs(np.array(times) / curve - 1)
    return curve.tolist(), float(misses.max()), sizes[int(misses.argmax())]


def parse(parser: argparse.ArgumentParser, repeats: int) -> argparse.Namespace:
    """Add the options that the scripts share, parse, and refuse what could not run before anything is measured."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument(
        "--budget", type=float, default=10.0, help="seconds, after which a slow case is repeated no more"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="file for a picture of time against N, .png or .svg")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib, or this package with its extra [plots]")
    for path in filter(None, (options.json, options.plot)):
        if not path.resolve().parent.is_dir():
            parser.error(f"there is no folder for {path}")
    if min(options.sizes) < 1 or options.repeats < 1:
        parser.error("--sizes and --repeats must be at least 1")
    options.sizes = sorted(set(options.sizes))
    torch.set_num_threads(options.threads)
    return options


def write_json(path: Path | str, record: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(record, indent=2) + "\n")
