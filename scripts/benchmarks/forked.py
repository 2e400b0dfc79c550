"""Start ranks as forks of this process, as torchrun starts programs: in a moment, where those import for half a minute.

Import first what the ranks need, and compute nothing: a fork has one thread only, whatever its parent had.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")
GRACE = 30.0
"""Seconds that the other ranks have to end, once one has failed, before they are killed."""
IMPORTS = (
    *("hf_compressm.runs.pretraining", "transformers", "datasets", "sklearn.datasets", "torch._dynamo"),
    *("torch.distributed.fsdp", "torch.distributed.checkpoint", "accelerate.utils.fsdp_utils"),
    "torch.distributed.checkpoint.state_dict",
)
"""What a training needs."""


def import_all() -> None:
    """Import it, for all forks."""
    for name in IMPORTS:
        importlib.import_module(name)


def start_ranks(
    processes: int, work: Callable[[], None], log: Path, prepare: Callable[[], None] = lambda: None
) -> BaseProcess:
    """Start a process that starts so many ranks, each of which calls `work`, and ends like torchrun.

    It passes SIGTERM on; as soon as a rank fails it ends the others, and itself with the code 1.

    Args:
        processes: how many ranks.
        work: what each does, with the environment variables of torchrun.
        log: where their output is added.
        prepare: called in the process before it starts the ranks.

    Returns:
        The process, of `multiprocessing`, with a session of its own, as each rank has.
    """
    process = FORK.Process(target=_agent, args=(processes, work, log, prepare))
    process.start()
    return process


def workers(pid: int) -> list[int]:
    """Process ids of the ranks that a process has started, also of torchrun."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill(process: Any) -> None:
    """Kill a process and its ranks, which have sessions of their own, and wait for it."""
    for pid in [process.pid, *workers(process.pid)] if running(process) else []:
        os.kill(pid, signal.SIGKILL)
    process.join() if isinstance(process, BaseProcess) else process.wait()


def running(process: Any) -> bool:
    """Whether a process, of `multiprocessing` or of `subprocess`, still runs."""
    return process.is_alive() if isinstance(process, BaseProcess) else process.poll() is None


def _agent(processes: int, work: Callable[[], None], log: Path, prepare: Callable[[], None]) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  for as long as the process lives
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    prepare()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORK.Process(target=_rank, args=(rank, processes, port, work)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    signal.signal(signal.SIGTERM, lambda *_: _end(ranks))
    running = list(ranks)
    while running:
        wait([rank.sentinel for rank in running])
        running = [rank for rank in running if rank.is_alive()]
        if any(rank.exitcode for rank in ranks):
            _end(ranks)
            for rank in running:
                rank.join(GRACE)
                rank.kill()
            sys.exit(1)


def _end(ranks: list) -> None:
    for rank in ranks:
        if rank.is_alive():
            rank.terminate()


def _rank(rank: int, processes: int, port: int, work: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {key: str(value) for key, value in found.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work()
