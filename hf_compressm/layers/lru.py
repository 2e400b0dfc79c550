"""Linear recurrent unit: a diagonal, stable, time-invariant system with many inputs and outputs.

Shapes: B batch, L length, H features, N states.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.diag_system import diag_system, diag_system_of_pairs, multiply_pairs
from .padding import RealFirst

SMALLEST_DECAY = 1e-6
"""-log|lambda| at initialisation is at least this: float32 tells |lambda| from 1 down to about 6e-8."""
SMALLEST_MODULUS = 1e-6
"""|lambda| at initialisation is at least this, since nu_log of a zero pole is infinite."""
SMALLEST_PHASE = 1e-6
"""Phase in radians at initialisation is at least this, since theta_log of a real pole is minus infinity."""


class LRU(nn.Module):
    """Linear recurrent unit.

    h_k = diag(lambda) h_{k-1} + exp(gamma_log) * (B_re + i B_im) u_k,
    y_k = Re((C_re + i C_im) h_k) + D * u_k,
    lambda = exp(-exp(nu_log) + i exp(theta_log)), so |lambda| < 1 for all parameter values.

    Parameters, real: nu_log, theta_log, gamma_log (N,); B_re, B_im (N, H); C_re, C_im (H, N); D (H,). They
    may be replaced by parameters with another N at any time between two calls.

    Args:
        hidden_size: features H >= 1 of input and output.
        state_size: states N >= 1 at construction.
        r_min: least |lambda| at initialisation, 0 <= r_min < r_max.
        r_max: greatest |lambda| at initialisation, at most 1.
        max_phase: greatest phase of lambda at initialisation in radians, in (0, 2 pi].

    Raises:
        ValueError: if an argument is out of its range.

    Source: Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences, section 3,
    arXiv 2303.06349.
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or state_size < 1:
            raise ValueError(f"hidden_size and state_size must be at least 1, got {hidden_size} and {state_size}")
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"0 <= r_min < r_max <= 1 must hold, got r_min={r_min} and r_max={r_max}")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase must be in (0, 2 pi], got {max_phase}")
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        # In half precision poles would move by about 1 % of their decay and 0.02 rad.
        precise = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.nu_log = nn.Parameter(torch.empty(state_size, dtype=precise))
        self.theta_log = nn.Parameter(torch.empty(state_size, dtype=precise))
        self.gamma_log = nn.Parameter(torch.empty(state_size))
        self.B_re = nn.Parameter(torch.empty(state_size, hidden_size))
        self.B_im = nn.Parameter(torch.empty(state_size, hidden_size))
        self.C_re = nn.Parameter(torch.empty(hidden_size, state_size))
        self.C_im = nn.Parameter(torch.empty(hidden_size, state_size))
        self.D = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    @property
    def state_size(self) -> int:
        """Number of states N, read from the live parameters."""
        return self.nu_log.shape[0]

    @property
    def hidden_size(self) -> int:
        """Number of features H."""
        return self.D.shape[0]

    def initial_values(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """New random values for every parameter, by name, with the parameter's shape, dtype and device.

        |lambda|^2 uniform in [r_min^2, r_max^2], phase uniform in (0, max_phase), gamma^2 = 1 - |lambda|^2;
        B_re and B_im normal with variance 1 / (2 H), C_re and C_im with 1 / N, D with 1. Phases are kept 1e-6
        away from 0, moduli from 0 and 1, where the logarithms would be infinite.
        """
        N, H = self.state_size, self.hidden_size
        like: dict[str, Any] = {"dtype": self._real_dtype, "device": self.nu_log.device}
        low, high = max(self.r_min, SMALLEST_MODULUS) ** 2, self.r_max**2
        squared_modulus = torch.rand(N, generator=generator, **like) * (high - low) + low
        decay = (-0.5 * squared_modulus.log()).clamp(min=SMALLEST_DECAY)
        phase = (torch.rand(N, generator=generator, **like) * self.max_phase).clamp(min=SMALLEST_PHASE)

        def normal(*shape: int, variance: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, **like) * math.sqrt(variance)

        values = {
            "nu_log": decay.log(),
            "theta_log": phase.log(),
            "gamma_log": 0.5 * (-torch.expm1(-2 * decay)).log(),
            "B_re": normal(N, H, variance=1 / (2 * H)),
            "B_im": normal(N, H, variance=1 / (2 * H)),
            "C_re": normal(H, N, variance=1 / N),
            "C_im": normal(H, N, variance=1 / N),
            "D": normal(H),
        }
        return {name: value.to(getattr(self, name).dtype) for name, value in values.items()}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new values of all parameters, see `initial_values`."""
        for name, value in self.initial_values(generator).items():
            getattr(self, name).copy_(value)

    def forward(
        self, u: Tensor, initial_state: Tensor | None = None, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the system over a sequence, or over one step of it (L = 1) from a state.

        The poles and the recurrence are computed in float32 (float64 if the parameters are), whatever dtype
        `u` has; the products with B and C follow autocast.

        Args:
            u: (B, L, H), any floating dtype, L >= 1.
            initial_state: h_{-1}, (B, N) complex64 (complex128 if the parameters are float64); zero if None. Where
                torch.export traces also (B, N, 2) floats, real and imaginary parts; then the last state is so, too.
            real: (B, L) bool, None if all steps are real. Steps where it is False are left out: outputs at real
                steps are as without them, and outputs at the others mean nothing. With an initial state this takes two
                scans.

        Returns:
            y (B, L, H) in the dtype of `u`, and the state after the last real step (B, N), complex.

        Raises:
            ValueError: if a shape or the state's dtype does not fit.
        """
        if u.ndim != 3 or u.shape[2] != self.hidden_size:
            raise ValueError(f"u must have shape (B, L, H) with H = {self.hidden_size}, got {tuple(u.shape)}")
        dtype = torch.promote_types(u.dtype, self.B_re.dtype)
        B, C, D = (weight.to(dtype) for weight in (self._input_weight(), self._output_weight(), self.D))
        tokens, maps = RealFirst.of(real, u), (B, C, D)
        run = self._run_in_pairs if torch.compiler.is_exporting() else self._run
        y, final_state = run(u.to(dtype), maps, initial_state, tokens)
        return y.to(u.dtype), final_state

    def _run(
        self,
        u: Tensor,
        maps: tuple[Tensor, Tensor, Tensor],
        state: Tensor | None,
        tokens: RealFirst | None,
        pairs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """y (B, L, H) and the last state; with `pairs` the given state is (B, N, 2), and this one too."""
        powers, system, times = self._poles, diag_system, torch.mul
        if pairs:
            powers, system, times = self._pole_pairs, diag_system_of_pairs, multiply_pairs
        if tokens is None:
            return system(u, powers(), *maps, state)
        # Behind the last real step the state would decay: that at it is the end of a scan with the padding in front.
        first = tokens.bring(u)
        y, final_state = system(tokens.to_end(first), powers(), *maps, None)
        if state is None:
            y = tokens.from_end(y)
        else:
            y, _ = system(first, powers(), *maps, state)
            final_state = final_state + times(powers(tokens.counts[:, None]), state)
        return tokens.take_back(y), final_state

    def _run_in_pairs(
        self, u: Tensor, maps: tuple[Tensor, Tensor, Tensor], state: Tensor | None, tokens: RealFirst | None
    ) -> tuple[Tensor, Tensor]:
        """As `_run`, in real arithmetic, whichever form the state has."""
        real = state is not None and not state.is_complex()
        given = state if state is None or real else torch.view_as_real(state)
        y, last = self._run(u, maps, given, tokens, pairs=True)
        return y, last if real else torch.view_as_complex(last)

    @torch.no_grad()
    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """The system, detached, in complex128: lambda (N,), B (N, H) with gamma in it, C (H, N)."""
        nu, theta, gamma, B_re, B_im, C_re, C_im = (
            parameter.detach().double()
            for parameter in (
                self.nu_log,
                self.theta_log,
                self.gamma_log,
                self.B_re,
                self.B_im,
                self.C_re,
                self.C_im,
            )
        )
        poles = torch.exp(torch.complex(-nu.exp(), theta.exp()))
        return poles, gamma.exp()[:, None] * torch.complex(B_re, B_im), torch.complex(C_re, C_im)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"hidden_size={self.hidden_size}, state_size={self.state_size}"

    @property
    def _real_dtype(self) -> torch.dtype:
        return torch.float64 if self.nu_log.dtype == torch.float64 else torch.float32

    def _poles(self, steps: Tensor | int = 1) -> Tensor:
        """lambda to the power of a number of steps, which broadcasts with (N,)."""
        decay = self.nu_log.to(self._real_dtype).exp()
        phase = self.theta_log.to(self._real_dtype).exp()
        return torch.exp(torch.complex(-decay, phase) * steps)

    def _pole_pairs(self, steps: Tensor | int = 1) -> Tensor:
        """As `_poles`, as pairs (N, 2)."""
        decay, phase = (name.to(self._real_dtype).exp() * steps for name in (self.nu_log, self.theta_log))
        return (-decay).exp()[..., None] * torch.stack([phase.cos(), phase.sin()], -1)

    def _input_weight(self) -> Tensor:
        """(2 N, H): the rows of gamma B, real and imaginary parts alternating."""
        # gamma goes into the weight: N * H products where scaling the result would take B * L * N.
        gamma = self.gamma_log.to(self._real_dtype).exp()
        return (torch.stack([self.B_re, self.B_im], 1) * gamma[:, None, None]).flatten(0, 1)

    def _output_weight(self) -> Tensor:
        """(H, 2 N): the columns of C such that the product with alternating parts of h is Re(C h)."""
        return torch.stack([self.C_re, -self.C_im], 2).flatten(1)
