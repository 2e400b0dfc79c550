"""Units of work of a compiled kernel, divided among as many threads as PyTorch's operations use.

Python's threads: Numba's would be a second OpenMP pool beside PyTorch's, and each spins while the other works.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


def run_units(kernel: Any, units: int, *arguments: Any) -> None:
    """Calls kernel(begin, end, *arguments), which must not hold the GIL, so that all of 0 .. units - 1 are done."""
    threads = min(torch.get_num_threads(), units)
    bounds = [units * k // threads for k in range(threads + 1)]
    others = [_pool().submit(kernel, bounds[k], bounds[k + 1], *arguments) for k in range(1, threads)]
    kernel(0, bounds[1], *arguments)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "hf_compressm")


# Threads do not survive a fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
