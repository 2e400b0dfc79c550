"""Compiles Triton kernels ahead of time, without a GPU, and reads what they need from the cubin.

    resources = aot.compile_kernel(
        scan_fwd_kernel, {"u_ptr": "*bf16", "length": "i32", "stride": "i64"}, {"BLOCK": 64, "HAS_Z": True}, cc=90
    )
    assert resources.spills == 0

Only outside the interpreter: with TRITON_INTERPRET=1 there is nothing to compile (see `interpreter.compiled`).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPILED = ((80, "fp32"), (90, "bf16"), (100, "fp16"))
"""Compute capabilities of A100, H100 and B200, each with the dtype that kernels are compiled for there: a capability
changes registers in all dtypes alike, and each compilation takes seconds."""


@dataclass(frozen=True)
class Resources:
    """What a thread needs (registers, bytes spilled or kept in local memory) and what a block needs (shared bytes).

    And whether it multiplies in tensor cores, where float32 operands keep ten bits unless they are split ("tf32x3").
    """

    registers: int
    spills: int
    shared: int
    tensor_cores: bool


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    cc: int,
    aligned: bool = True,
    **options: Any,
) -> Resources:
    """The resources of a kernel compiled for compute capability `cc`.

    Args:
        kernel: a function with `triton.jit`.
        signature: Triton type of every argument that is not a constexpr, such as "*bf16", "i32", "i64" or "fp32".
        constexprs: value of every constexpr. A pointer that may be None and is None belongs here.
        cc: 80, 90, 100, ...
        aligned: whether pointers are multiples of 16 bytes, as torch's allocations are.
        options: `num_warps`, `num_stages` and whatever else the backend takes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given, wanted = set(signature) | set(constexprs), set(kernel.arg_names)
    if given != wanted:
        raise ValueError(f"{kernel.__name__}: missing {sorted(wanted - given)}, unknown {sorted(given - wanted)}")
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [place for place, name in enumerate(kernel.arg_names) if types[name].startswith("*")]
    attributes = {(place,): [["tt.divisibility", 16]] for place in pointers} if aligned else {}
    source = ASTSource(kernel, types, constexprs=dict(constexprs), attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    registers, stack, local = _usage(compiled.asm["cubin"])
    tensor_cores = re.search(r"tc_gen5_mma|warp_group_dot|nvidia_mma<", compiled.asm["ttgir"]) is not None
    return Resources(registers, stack + local, compiled.metadata.shared, tensor_cores)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory of the one kernel of a cubin. What ptxas spills goes to the stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", listing)
    assert found, listing
    return int(found[1]), int(found[2]), int(found[3])
