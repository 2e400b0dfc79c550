"""Adapter for `LRU` layers: balanced truncation of a time-invariant MIMO system, back in the stable parameterisation.

Shapes: N states before the cut, r after it, H features. Sources: Orvieto et al. 2023, arXiv 2303.06349, for the layer;
arXiv 2510.02823 for its reduction; `hf_compressm.reduction.balanced` for the method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layers.lru import LRU
from ...reduction import (
    Balancing,
    DiagonalSystem,
    Selection,
    Truncation,
    balance,
    difference,
    h2_norm,
    match_states,
    rank_stability,
    select_states,
    truncate,
    upper_half_plane,
)
from ..changes import ParameterChange, Term
from .base import MixerAdapter, MixerReduction, ReductionError, register_adapter

SMALLEST_MODULUS = 1e-12
"""|pole| given to a zero pole, whose nu_log would be infinite: it forgets within one step all the same."""
SMALLEST_PHASE = 1e-9
"""Phase in radians given to a positive real pole, whose theta_log would be minus infinity."""


@dataclass(frozen=True)
class LRUMeasurement:
    """Balanced realisation of a layer, and the modes, bool (N,), that were conjugated to lie above the real axis."""

    balancing: Balancing
    flipped: Tensor

    def spectrum(self) -> Tensor:
        """Hankel singular values, float64 (N,), descending."""
        return self.balancing.spectrum()

    def agreement(self, previous: LRUMeasurement, depth: int) -> float:
        """Agreement of the ranking of the leading states with an earlier one, in [0, 1]; see `rank_stability`."""
        return rank_stability(match_states(previous.balancing, self.balancing), depth)

    def state_dict(self) -> dict[str, Tensor]:
        """Poles (N,), B (N, H) and C (M, N), complex128, and flipped, bool (N,)."""
        poles, B, C = self.balancing.system
        return {"poles": poles, "B": B, "C": C, "flipped": self.flipped}


class LRUAdapter(MixerAdapter[LRU]):
    """Reduces `LRU` layers with the a-priori error bound of balanced truncation."""

    mixer_class = LRU
    dynamics = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im")

    def state_size(self, mixer: LRU) -> int:
        return mixer.state_size

    def parameter_shapes(self, mixer: LRU, order: int) -> dict[str, torch.Size]:
        H = mixer.D.shape[0]
        shapes = dict.fromkeys(("nu_log", "theta_log", "gamma_log"), torch.Size([order]))
        shapes |= dict.fromkeys(("B_re", "B_im"), torch.Size([order, H]))
        return shapes | dict.fromkeys(("C_re", "C_im"), torch.Size([H, order]))

    def order_of(self, mixer: LRU, shapes: Mapping[str, torch.Size]) -> int | None:
        for name in self.dynamics:
            axis = 1 if name in ("C_re", "C_im") else 0
            if name in shapes and len(shapes[name]) > axis:
                return shapes[name][axis]
        return None

    def measure(self, mixer: LRU, statistics: Any = None) -> LRUMeasurement:
        """Balance the layer's system, with all poles brought above the real axis.

        Raises:
            ReductionError: if an entry is not finite, or a pole is not inside the unit circle.
        """
        poles, B, C = (tensor.cpu() for tensor in mixer.system())
        system, flipped = upper_half_plane(DiagonalSystem(poles, B, C))
        try:
            return LRUMeasurement(balance(system), flipped)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise ReductionError(str(error)) from error

    def load_measurement(self, state: Mapping[str, Tensor]) -> LRUMeasurement:
        return LRUMeasurement(balance(DiagonalSystem(state["poles"], state["B"], state["C"])), state["flipped"])

    def reduce(
        self,
        mixer: LRU,
        measurement: LRUMeasurement,
        order: int,
        selection: Selection = "largest",
        generator: torch.Generator | None = None,
    ) -> MixerReduction:
        balancing = measurement.balancing
        kept = select_states(balancing.rank, order, selection, generator)
        truncation = truncate(balancing, kept, order)
        changes = _parameter_changes(mixer, measurement.flipped, truncation)
        _check_realised(mixer, changes, truncation.system)
        return MixerReduction(changes, truncation.bound)

    def keep(self, mixer: LRU, kept: Sequence[Sequence[int]]) -> dict[str, ParameterChange]:
        index = torch.tensor(list(kept[0]))
        columns = torch.eye(mixer.state_size, dtype=torch.float64)[:, index]
        changes = {}
        for name in self.parameter_shapes(mixer, len(index)):
            old = getattr(mixer, name).detach().cpu()
            picked = Term(name, right=columns) if name in ("C_re", "C_im") else Term(name, rows=index)
            changes[name] = ParameterChange(picked(old), (picked,))
        return changes


@dataclass(frozen=True)
class _Lifting:
    """The maps between the states before a cut and those after it, in the stable parameterisation, all float64.

    Attributes:
        parameters: the layer's, by name.
        truncation: the reduced system and its maps.
        sign_in: (N,), -1 where a mode was conjugated before the reduction.
        sign_out: (r,), -1 where the pole of a new mode lies below the real axis, so that it is conjugated after it.
        new_gamma: (r,), the new normalisation of inputs.
        scale: (r,), free scale of each new state.
    """

    parameters: Mapping[str, Tensor]
    truncation: Truncation
    sign_in: Tensor
    sign_out: Tensor
    new_gamma: Tensor
    scale: Tensor

    @classmethod
    def of(cls, mixer: LRU, flipped: Tensor, truncation: Truncation) -> _Lifting:
        parameters = {name: parameter.detach().to("cpu", torch.float64) for name, parameter in mixer.named_parameters()}
        poles, reduced_B, _ = truncation.system
        # Eigenvectors leave each state's scale open. Adam's steps have one size for all entries, so a row that comes
        # back much larger or smaller than it was would be trained at another relative rate.
        new_gamma = (1 - poles.abs().square()).sqrt()
        typical = torch.complex(parameters["B_re"], parameters["B_im"]).abs().square().sum(1).mean().sqrt()
        row = reduced_B.norm(dim=1) / new_gamma
        scale = torch.where((row > 0) & (typical > 0), typical / torch.where(row > 0, row, 1), 1)
        sign_in, sign_out = (torch.where(down, -1.0, 1.0).to(torch.float64) for down in (flipped, poles.imag < 0))
        return cls(parameters, truncation, sign_in, sign_out, new_gamma, scale)

    def B(self) -> dict[str, ParameterChange]:
        """Changes of B_re, B_im and gamma_log.

        Rows of the gradient of B are the real and imaginary parts of adjoint @ (g_re + i sign_in g_im), times sign_out
        where a new mode is conjugated.
        """
        gamma, sign_out = self.parameters["gamma_log"].exp(), self.sign_out[:, None]
        forward = (self.scale / self.new_gamma)[:, None] * self.truncation.left.mH * gamma
        adjoint = (self.new_gamma / self.scale)[:, None] * self.truncation.right.mH / gamma
        new = forward @ torch.complex(self.parameters["B_re"], self.sign_in[:, None] * self.parameters["B_im"])
        new = torch.complex(new.real, sign_out * new.imag)
        real = (Term("B_re", left=adjoint.real), Term("B_im", left=-adjoint.imag * self.sign_in))
        imaginary = (
            Term("B_re", left=sign_out * adjoint.imag),
            Term("B_im", left=sign_out * adjoint.real * self.sign_in),
        )
        # gamma scales a row of B, so its gradient is the inner product of that row with the row's gradient.
        of_gamma = tuple(Term(t.source, left=t.left, contract=new.real) for t in real) + tuple(
            Term(t.source, left=t.left, contract=new.imag) for t in imaginary
        )
        return {
            "gamma_log": ParameterChange(self.new_gamma.log(), of_gamma),
            "B_re": ParameterChange(new.real.contiguous(), real),
            "B_im": ParameterChange(new.imag.contiguous(), imaginary),
        }

    def C(self) -> dict[str, ParameterChange]:
        """Changes of C_re and C_im: as for B, with columns in place of rows, from the right."""
        adjoint, sign_in = self.truncation.left * self.scale, self.sign_in[:, None]
        new = torch.complex(self.parameters["C_re"], self.sign_in * self.parameters["C_im"])
        new = new @ (self.truncation.right / self.scale)
        real = (Term("C_re", right=adjoint.real), Term("C_im", right=-sign_in * adjoint.imag))
        imaginary = (
            Term("C_re", right=adjoint.imag * self.sign_out),
            Term("C_im", right=sign_in * adjoint.real * self.sign_out),
        )
        return {
            "C_re": ParameterChange(new.real.contiguous(), real),
            "C_im": ParameterChange((self.sign_out * new.imag).contiguous(), imaginary),
        }


def _parameter_changes(mixer: LRU, flipped: Tensor, truncation: Truncation) -> dict[str, ParameterChange]:
    """Parameters of the reduced layer, and the adjoint of the lifting h ~ right h_r for their gradients."""
    lifting = _Lifting.of(mixer, flipped, truncation)
    nu_log, theta_log = _polar_parameters(truncation.system.poles)
    nu_terms, theta_terms = _pole_terms(lifting, nu_log, theta_log)
    poles = {"nu_log": ParameterChange(nu_log, nu_terms), "theta_log": ParameterChange(theta_log, theta_terms)}
    return poles | lifting.B() | lifting.C()


def _polar_parameters(poles: Tensor) -> tuple[Tensor, Tensor]:
    """nu_log and theta_log of poles with pole = exp(-exp(nu_log) + i exp(theta_log)), phases in (0, pi]."""
    decay = -poles.abs().clamp(min=SMALLEST_MODULUS).log()
    phase = poles.angle().abs().clamp(min=SMALLEST_PHASE)
    return decay.log(), phase.log()


def _pole_terms(lifting: _Lifting, nu_log: Tensor, theta_log: Tensor) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """How gradients of the poles follow a reduction.

    With Gamma = sum_k p_k h_{k-1}^H (p the adjoint state), the gradient of the poles is diag(Gamma), and the reduced
    one is diag(right^H Gamma left). Only diag(Gamma) is on record, so its off-diagonal part, the correlation between
    different states, is left out. In terms of log poles, whose gradient is conj(pole) times that of the pole, the
    map is K_ij = conj(pole'_i right_ji) left_ji / conj(pole_j).
    """
    parameters, truncation, sign_in = lifting.parameters, lifting.truncation, lifting.sign_in
    old_poles = torch.exp(torch.complex(-parameters["nu_log"].exp(), sign_in * parameters["theta_log"].exp()))
    moving = old_poles.abs() > SMALLEST_MODULUS
    inverse = torch.where(moving, 1 / torch.where(moving, old_poles, 1).conj(), 0)
    weight = (truncation.right.conj() * truncation.left).mT
    K = truncation.system.poles.conj()[:, None] * weight * inverse

    nu_new, nu_old = nu_log.exp(), parameters["nu_log"].exp()
    theta_new, theta_old = lifting.sign_out * theta_log.exp(), sign_in * parameters["theta_log"].exp()
    theta_inverse = torch.where(theta_old != 0, 1 / torch.where(theta_old != 0, theta_old, 1), 0)
    # log pole = -nu + i theta with nu = exp(nu_log), theta = exp(theta_log): z = -g_nu / nu + i g_theta / theta.
    nu_terms = (
        Term("nu_log", left=nu_new[:, None] * K.real / nu_old),
        Term("theta_log", left=nu_new[:, None] * K.imag * theta_inverse),
    )
    theta_terms = (
        Term("nu_log", left=-theta_new[:, None] * K.imag / nu_old),
        Term("theta_log", left=theta_new[:, None] * K.real * theta_inverse),
    )
    return nu_terms, theta_terms


def _check_realised(mixer: LRU, changes: Mapping[str, ParameterChange], wanted: DiagonalSystem) -> None:
    """Raise ReductionError unless the parameters, each rounded to its dtype, still describe the wanted system."""
    rounded = {name: change.value.to(getattr(mixer, name).dtype).double() for name, change in changes.items()}
    realised = DiagonalSystem(
        torch.exp(torch.complex(-rounded["nu_log"].exp(), rounded["theta_log"].exp())),
        rounded["gamma_log"].exp()[:, None] * torch.complex(rounded["B_re"], rounded["B_im"]),
        torch.complex(rounded["C_re"], rounded["C_im"]),
    )
    try:
        realised.check()
    except ValueError as error:
        raise ReductionError(f"after the reduction {error}") from error
    error = h2_norm(difference(realised, upper_half_plane(wanted)[0]))
    # The norm of a difference is itself only known to about the root of float64's rounding, times a condition number.
    share = max(math.sqrt(torch.finfo(mixer.B_re.dtype).eps), 1e-4)
    allowed = share * max(h2_norm(wanted), 1e-30)
    if not error <= allowed:
        raise ReductionError(
            f"in {mixer.B_re.dtype} the reduced layer would differ from the computed one by {error:.3g} in the H2 "
            f"norm, more than the {allowed:.3g} that rounding explains"
        )


register_adapter(LRUAdapter())
