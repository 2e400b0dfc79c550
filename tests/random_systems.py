"""Random diagonal systems, ordinary and degenerate, for testing reductions."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compressm.reduction import DiagonalSystem

KINDS = (
    "plain",
    "repeated_poles",
    "nearly_repeated_poles",
    "real_poles",
    "zero_poles",
    "zero_rows",
    "unobservable",
    "low_rank",
)
"""plain: distinct complex poles. The others: each pole three times on average; pairs 1e-9 apart; poles on the real
axis; half of the poles zero; every second row of B zero; every third column of C zero; B and C of rank one."""


def random_system(
    kind: str, N: int, H: int, radius: float, generator: torch.Generator, M: int | None = None
) -> DiagonalSystem:
    """A random stable system in complex128.

    Args:
        kind: one of `KINDS`.
        N: states, >= 1.
        H: inputs, >= 1.
        radius: largest |pole|, in (0, 1); |pole| is distributed as for poles uniform on the disc.
        generator: CPU generator.
        M: outputs, H by default.

    Raises:
        ValueError: on an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; allowed are {', '.join(KINDS)}")
    M = H if M is None else M

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    modulus, phase = radius * uniform(N).sqrt(), 2 * torch.pi * uniform(N)
    poles, B, C = torch.polar(modulus, phase), normal(N, H), normal(M, N)
    if kind == "repeated_poles":
        poles = poles[torch.randint(0, max(1, N // 3), (N,), generator=generator)]
    elif kind == "nearly_repeated_poles":
        poles = poles[torch.arange(N) // 2] * (1 - 1e-9 * uniform(N))
    elif kind == "real_poles":
        poles = torch.complex(modulus * torch.where(uniform(N) > 0.5, 1.0, -1.0), torch.zeros_like(modulus))
    elif kind == "zero_poles":
        poles[: (N + 1) // 2] = 0
    elif kind == "zero_rows":
        B[::2] = 0
    elif kind == "unobservable":
        C[:, ::3] = 0
    elif kind == "low_rank":
        B, C = normal(N, 1) @ normal(1, H), normal(M, 1) @ normal(1, N)
    return DiagonalSystem(poles, B, C)
