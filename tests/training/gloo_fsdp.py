"""FSDP2 over CPUs for the tests: the patch of Accelerate's state that the benchmarks use. All behind it is real."""

import runpy
from pathlib import Path

grant_fsdp = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts/benchmarks/cpu_fsdp.py"))["grant_fsdp"]
