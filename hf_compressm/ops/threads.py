"""Divides work among as many threads as PyTorch's operations use: units of a compiled kernel, or whole calls.

The threads are Python's. Numba's would be a second OpenMP pool beside PyTorch's, and the threads of one pool spin while
those of the other work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any

import torch


def run_units(kernel: Any, units: int, *arguments: Any) -> None:
    """Call kernel(begin, end, *arguments) on several threads, so that units 0 to units - 1 are done once each.

    Args:
        kernel: a compiled function that releases the GIL.
        units: number of units of work, >= 1.
        *arguments: arrays and numbers for the kernel.
    """
    threads = min(torch.get_num_threads(), units)
    bounds = [units * k // threads for k in range(threads + 1)]
    others = [thread_pool().submit(kernel, bounds[k], bounds[k + 1], *arguments) for k in range(1, threads)]
    kernel(0, bounds[1], *arguments)
    for other in others:
        other.result()


@cache
def thread_pool() -> ThreadPoolExecutor:
    """The threads that run units of kernels beside the calling one."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "hf_compressm")


def map_calls(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yield function(item) for all items, in their order, computed without gradients.

    With at least two items per thread, or as many items as threads, each thread takes an item and the operations in
    `function` run on one thread; with fewer items, one item after the other is computed on all threads. If all threads
    shared each operation, each would wait for the slowest thread, which takes long where other programs run.
    """
    threads = torch.get_num_threads()
    if threads > 1 and (len(items) == threads or len(items) >= 2 * threads):
        return _callers(threads).map(torch.no_grad()(function), items)
    return map(torch.no_grad()(function), items)


@cache
def _callers(threads: int) -> ThreadPoolExecutor:
    """Threads whose operations have one thread each. PyTorch keeps that number per thread, and one for new threads."""
    pool = ThreadPoolExecutor(threads, "hf_compressm", torch.set_num_threads, (1,))
    started = Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(threads)
    return pool


# Threads do not survive a fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=thread_pool.cache_clear)
    os.register_at_fork(after_in_child=_callers.cache_clear)
