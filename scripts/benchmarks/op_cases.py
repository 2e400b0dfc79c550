"""The ops that ops.py measures: how each is called, on what, at which shape, and whether it is right.

Shapes: B batch, L length, H channels, N states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import largest_difference
from torch import Tensor
from torch.nn import functional as F

from hf_compressm.ops.backends import BACKENDS, choose_backend
from hf_compressm.ops.diag_scan import diag_scan
from hf_compressm.ops.selective_scan import selective_scan
from hf_compressm.ops.ssd_scan import ssd_scan
from hf_compressm.ops.state_gramian import state_gramian
from hf_compressm.surgery.adapters.selective import look_weights

SMALL = (2, 67, 24)
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""Of outputs and gradients, relative to each one's largest entry: sums of up to 256 products, and, in half precision,
a rounding of what comes in and one of what goes out."""
Shape = tuple[int, int, int]


class Draws:
    """Normal numbers on a device: `draw(*sizes)` at full precision, `draw.narrow(*sizes)` in the measured dtype."""

    def __init__(self, dtype: torch.dtype, device: str, states: bool) -> None:
        self.dtype, self.device, self.states = dtype, device, states
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=self.wide)

    def narrow(self, *sizes: int) -> Tensor:
        return self(*sizes).to(self.dtype)

    def initial(self, *sizes: int) -> dict[str, Tensor]:
        """An initial state where states at the ends are looked at, else nothing."""
        return {"initial_state": self(*sizes)} if self.states else {}


@dataclass(frozen=True)
class Case:
    """An op: its tensors at a shape and N, its outputs for these and a backend, and its default shape by device.

    `degree`: that of the op's cost as a polynomial in N. `exact`: outputs in float64, where that is not what the
    backend "naive" makes of inputs in float64.
    """

    inputs: Callable[[Draws, Shape, int], dict[str, Tensor]]
    outputs: Callable[[dict[str, Tensor], str | None], tuple[Tensor, ...]]
    shapes: dict[str, Shape]
    degree: int = 1
    exact: Callable[[dict[str, Tensor]], tuple[Tensor, ...]] | None = None


def _diag_inputs(draw: Draws, shape: Shape, size: int) -> dict[str, Tensor]:
    batch, length, _ = shape
    lam = torch.polar(torch.sigmoid(draw(size) + 3), draw(size))
    initial = {name: torch.complex(state, draw(batch, size)) for name, state in draw.initial(batch, size).items()}
    return {"lam": lam, "u": torch.complex(draw(batch, length, size), draw(batch, length, size)), **initial}


def _selective_inputs(draw: Draws, shape: Shape, size: int) -> dict[str, Tensor]:
    batch, length, channels = shape
    moving = {name: draw.narrow(batch, length, channels) for name in ("u", "delta", "z")}
    moving |= {name: draw.narrow(batch, length, size) for name in ("B", "C")}
    # Poles and time steps as Mamba starts with: with others the states would decay to nothing.
    rates = -torch.arange(1.0, size + 1, device=draw.device, dtype=draw.wide).expand(channels, -1).contiguous()
    fixed = {"A": rates, "D": draw(channels), "delta_bias": draw(channels) - 4}
    return moving | fixed | draw.initial(batch, channels, size)


def _ssd_inputs(draw: Draws, shape: Shape, size: int) -> dict[str, Tensor]:
    batch, length, channels = shape
    width = math.gcd(channels, 64)
    heads = channels // width
    moving = {"x": draw.narrow(batch, length, heads, width), "dt": draw.narrow(batch, length, heads)}
    moving |= {name: draw.narrow(batch, length, 1, size) for name in ("B", "C")}
    fixed = {"A": -1 - draw(heads).abs(), "D": draw(heads), "dt_bias": draw(heads) - 4}
    return moving | fixed | draw.initial(batch, heads, width, size)


def _gramian_inputs(draw: Draws, shape: Shape, size: int) -> dict[str, Tensor]:
    batch, length, channels = shape
    selective = _selective_inputs(draw, shape, size)
    step = F.softplus(selective["delta"] + selective["delta_bias"]).to(draw.dtype)
    return {"u": selective["u"], "dt": step, "A": selective["A"], "B": selective["B"][:, :, None]}


def _selective_outputs(tensors: dict[str, Tensor], backend: str | None) -> tuple[Tensor, ...]:
    final = "initial_state" in tensors
    found = selective_scan(**tensors, delta_softplus=True, return_final_state=final, backend=backend)
    return found if final else (found,)


def _ssd_outputs(tensors: dict[str, Any], backend: str | None) -> tuple[Tensor, ...]:
    final = "initial_state" in tensors
    found = ssd_scan(**tensors, dt_softplus=True, return_final_state=final, backend=backend)
    return found if final else (found,)


def _gramian_outputs(tensors: dict[str, Any], backend: str | None) -> tuple[Tensor, ...]:
    return (state_gramian(**tensors, weights=_weights(tensors["u"]), backend=backend),)


def _weights(u: Tensor) -> Tensor:
    return look_weights(torch.ones(u.shape[:2], dtype=torch.bool, device=u.device))


def _exact_gramian(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    u, dt, A, B = tensors.values()
    state, total = u.new_zeros(len(u), *A.shape), u.new_zeros(1, A.shape[1], A.shape[1])
    weights = _weights(u).to(u.dtype)
    for step in range(u.shape[1]):
        drive = (dt[:, step] * u[:, step])[..., None] * B[:, step]
        state = (dt[:, step, :, None] * A).exp() * state + drive
        if weights[0, step]:
            total += torch.einsum("b,bin,bim->nm", weights[:, step], state, state)
    return (total,)


CASES = {
    "diag_scan": Case(
        _diag_inputs,
        lambda tensors, backend: diag_scan(**tensors, backend=backend),
        # On CPUs no tensor of up to 256 states reaches 32 MiB, from where on glibc maps fresh pages at every call.
        {"cpu": (8, 2000, 1), "cuda": (64, 4096, 1)},
    ),
    "selective_scan": Case(_selective_inputs, _selective_outputs, {"cpu": (4, 512, 128), "cuda": (8, 2048, 1024)}),
    "ssd_scan": Case(_ssd_inputs, _ssd_outputs, {"cpu": (4, 1024, 256), "cuda": (8, 4096, 2048)}),
    "state_gramian": Case(
        _gramian_inputs,
        _gramian_outputs,
        {"cpu": (4, 512, 128), "cuda": (8, 2048, 1024)},
        degree=2,
        exact=_exact_gramian,
    ),
}


def backends_of(op: str, against: str, device: str) -> list[str]:
    """The backend that an op runs with by default, and the alternative unless that is "none", the same, or cannot run,
    which is printed."""
    available = (*BACKENDS, "mamba_ssm") if op in ("selective_scan", "ssd_scan") else BACKENDS
    own = choose_backend(op, None, device, available)
    if against in ("none", own):
        return [own]
    try:
        return [own, choose_backend(op, against, device, available)]
    except ValueError as error:
        print(f"{op} is measured alone: {error}")
        return [own]


def results(case: Case, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Outputs and the gradients of all tensors for output gradients of +-1."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors.values()]
    outputs = case.outputs(dict(zip(tensors, leaves, strict=True)), backend)
    found = [output.detach() for output in outputs]
    if not outputs[0].requires_grad:
        return found
    coins = torch.Generator().manual_seed(1)
    signs = [torch.randint(0, 2, out.shape, generator=coins).mul(2).sub(1).to(out) for out in outputs]
    return [*found, *torch.autograd.grad(outputs, leaves, signs)]


def check(op: str, backend: str, sizes: list[int], dtype: str, device: str) -> float:
    """Largest difference from the reference in float64 over all sizes; exits if it exceeds the tolerance."""
    # The Gramian is accumulated in float32 whatever comes in, and the diagonal scan is never in half precision.
    limit = {"state_gramian": max, "diag_scan": min}.get(op, lambda own, _: own)
    case, tolerance, worst = CASES[op], limit(TOLERANCE[dtype], TOLERANCE["float32"]), 0.0
    for size in sizes:
        draws = Draws(getattr(torch, dtype), device, states=backend != "mamba_ssm")
        tensors = case.inputs(draws, SMALL, size)
        wide = {
            name: tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
            for name, tensor in tensors.items()
        }
        expected = case.exact(wide) if case.exact else results(case, wide, "naive")
        difference = largest_difference(results(case, tensors, backend), expected)
        if not difference < tolerance:
            raise SystemExit(
                f"{op}, N = {size}: outputs or gradients of the backend {backend!r} in {dtype} differ from the "
                f"reference in float64 by {difference:.1e} of the largest entry, "
                f"more than {tolerance:.0e}; nothing is timed"
            )
        worst = max(worst, difference)
    return worst
