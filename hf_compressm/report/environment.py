"""Describe the hardware and the versions that a run used, without the machine's name or paths."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("hf-compressm", "torch", "transformers", "accelerate", "datasets", "numpy", "numba", "triton", "mamba-ssm")
"""Packages whose versions are recorded where they are installed."""


def describe_environment(processes: int = 1, threads: int | None = None) -> dict[str, Any]:
    """Return `versions` (name -> version, of Python and of the installed `PACKAGES`) and `hardware`, ready for JSON.

    Args:
        processes: number of training processes, >= 1.
        threads: torch threads of each process, >= 1. Default: what torch says here.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {"processes": processes, "machine": platform.machine()}
    hardware |= {"cpu": _cpu_name(), "cpu_cores": os.cpu_count(), "threads": threads or torch.get_num_threads()}
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"versions": versions, "hardware": {key: value for key, value in hardware.items() if value}}


def hardware_line(hardware: dict[str, Any]) -> str:
    """Return the hardware as one line of text, for example "2 processes on 2 x NVIDIA H100"."""
    processes = hardware.get("processes", 1)
    if gpus := hardware.get("gpus"):
        kinds = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
        place = ", ".join(kinds)
    else:
        place = " ".join(str(hardware[key]) for key in ("machine", "cpu") if key in hardware)
        place += f", {hardware['cpu_cores']} cores" if "cpu_cores" in hardware else ""
        place += f", {_count(hardware['threads'], 'torch thread')}" if "threads" in hardware else ""
    return f"{_count(processes, 'process')} on {place}"


def environment_line(environment: dict[str, Any]) -> str:
    """Return what `describe_environment` returned as one line of text."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{hardware_line(environment['hardware'])}; {versions}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}{'es' if word.endswith('s') else 's'}"


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or None
