"""Chooses the implementation of an op by device, or as an argument or an environment variable says."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("naive", "cpu", "triton")
"""naive: plain PyTorch, anywhere. cpu: Numba. triton: CUDA devices, or anywhere with TRITON_INTERPRET=1."""


@torch.compiler.assume_constant_result
def choose_backend(op: str, wanted: str | None, device: str, available: tuple[str, ...] = BACKENDS) -> str:
    """The backend that an op runs with; logged once per op, backend and device.

    Args:
        op: name of the op, for messages and for the environment variable `HF_COMPRESSM_<OP>`.
        wanted: one of `available`, or None. It has priority over the environment variable.
        device: device type of the op's tensors.
        available: the backends that the op has. A name that is not in `BACKENDS` is that of a package for CUDA devices,
            which runs only if it is asked for.

    Returns:
        `wanted`, or else what the environment variable says. If neither is given: "triton" on CUDA devices, "cpu" on
        the CPU, or "naive", with one warning, where that cannot run; and "naive" while torch.export traces, since its
        graphs have to run without this package.

    Raises:
        ValueError: if the backend that is asked for is unknown or cannot run; the message says why.
    """
    variable = f"HF_COMPRESSM_{op.upper()}"
    forced = wanted or os.environ.get(variable)
    if not forced and torch.compiler.is_exporting():
        return "naive"
    if forced and forced not in available:
        raise ValueError(f"unknown backend {forced!r} of {op}; allowed are {', '.join(available)}")
    chosen = forced or {"cpu": "cpu", "cuda": "triton"}.get(device, "naive")
    obstacle = find_obstacle(chosen, device) if chosen in available else f"there is no kernel of {chosen}"
    if obstacle and forced:
        raise ValueError(f"the backend {chosen!r} of {op} cannot run: {obstacle}")
    announce(op, "naive" if obstacle else chosen, device, obstacle)
    return "naive" if obstacle else chosen


def kernels(package: str | None, backend: str) -> ModuleType:
    """The module of an op that holds a backend: `ops/<op>/<backend>.py`, with functions `forward` and `backward`.

    Args:
        package: `__package__` of the op's modules.
        backend: "cpu" or "triton".
    """
    return importlib.import_module(f".{backend}", package)


def find_obstacle(backend: str, device: str) -> str | None:
    """Why a backend cannot run on a device; None if it can."""
    if backend == "cpu" and device != "cpu":
        return f"the tensors are on {device}"
    if backend == "cpu" and not importlib.util.find_spec("numba"):
        return "numba is not installed"
    if backend == "triton" and not importlib.util.find_spec("triton"):
        return "triton is not installed"
    if backend == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, where Triton runs only with TRITON_INTERPRET=1"
    if backend not in BACKENDS and device != "cuda":
        return f"the tensors are on {device}, and {backend} runs on CUDA devices only"
    if backend not in BACKENDS and not importlib.util.find_spec(backend):
        return f"{backend} is not installed"
    return None


@cache
def announce(op: str, backend: str, device: str, obstacle: str | None) -> None:
    """Log which backend an op runs with, once; a warning if an obstacle keeps the faster one from running."""
    if obstacle:
        logger.warning("%s on %s: %s, so the slower backend %r is used", op, device, obstacle, backend)
    else:
        logger.info("%s on %s: backend %r", op, device, backend)
