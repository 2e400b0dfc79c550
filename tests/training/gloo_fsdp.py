"""FSDP2 over CPUs for the tests: the patch of Accelerate's state that the benchmarks use. All behind it is real."""

import runpy
from pathlib import Path

LAUNCHER = Path(__file__).resolve().parents[2] / "scripts/benchmarks/cpu_fsdp.py"
"""A program that runs a script with its arguments, and FSDP2 over CPUs."""
grant_fsdp = runpy.run_path(str(LAUNCHER))["grant_fsdp"]
