"""Gramians of diagonal, discrete-time, linear time-invariant systems.

Shapes: N states, H inputs, M outputs. Time convention: h_k = diag(poles) h_{k-1} + B u_k and y_k = C h_k, so the
transfer function is G(z) = C (I - diag(poles) / z)^{-1} B and its Gramians are those of the triple (A, B, C).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DiagonalSystem(NamedTuple):
    """A diagonal system h_k = poles * h_{k-1} + B u_k, y_k = C h_k.

    Attributes:
        poles: complex (N,), |poles| < 1.
        B: complex (N, H), input matrix.
        C: complex (M, N), read-out matrix.
    """

    poles: Tensor
    B: Tensor
    C: Tensor

    @property
    def order(self) -> int:
        """Number of states N."""
        return self.poles.shape[0]

    def check(self) -> None:
        """Check shapes and entries.

        Raises:
            ValueError: if a shape disagrees, an entry is not finite, or a pole is not inside the unit circle.
        """
        N = self.order
        if self.B.shape[0] != N or self.C.shape[1] != N:
            raise ValueError(
                f"{N} poles need B of shape ({N}, H) and C of shape (M, {N}); "
                f"got B {tuple(self.B.shape)} and C {tuple(self.C.shape)}"
            )
        for name, tensor in zip(self._fields, self, strict=True):
            if not torch.isfinite(torch.view_as_real(tensor.resolve_conj())).all():
                raise ValueError(f"{name} holds NaN or infinite values")
        if (radius := self.poles.abs().max()) >= 1:
            raise ValueError(f"the system is not stable: largest |pole| is {radius:.17g}, allowed is < 1")

    def frequency_response(self, omega: Tensor) -> Tensor:
        """G(e^{i omega}) = C diag(1 / (1 - poles e^{-i omega})) B.

        Args:
            omega: real (F,), angular frequency in radians per step.

        Returns:
            complex (F, M, H).
        """
        shift = torch.exp(-1j * omega.to(self.poles.dtype))
        resolvent = 1 / (1 - shift[:, None] * self.poles)
        return (self.C * resolvent[:, None, :]) @ self.B


def upper_half_plane(system: DiagonalSystem) -> tuple[DiagonalSystem, Tensor]:
    """Conjugate every mode whose pole lies below the real axis.

    A layer with real input that reads out y = Re(C h) cannot tell a mode (pole, b, c) from its conjugate. With all
    poles in the upper half plane, modes that do the same job become close, and fewer singular values are large.

    Returns:
        The equivalent system, and a bool tensor (N,) that is True where a mode was conjugated.
    """
    flipped = system.poles.imag < 0
    poles = torch.where(flipped, system.poles.conj(), system.poles)
    B = torch.where(flipped[:, None], system.B.conj(), system.B)
    C = torch.where(flipped, system.C.conj(), system.C)
    return DiagonalSystem(poles, B, C), flipped


def controllability_gramian(poles: Tensor, B: Tensor) -> Tensor:
    """P = sum_k A^k B B^H (A^H)^k for A = diag(poles), in closed form.

    P solves P = A P A^H + B B^H; entrywise P_ij = (B B^H)_ij / (1 - poles_i conj(poles_j)).

    Args:
        poles: complex (N,), |poles| < 1; any batch dimensions may stand in front.
        B: complex (N, H).

    Returns:
        complex (N, N), Hermitian and positive semidefinite. Work and memory grow as N^2, the time with N^2 H.

    Source: Antoulas, Approximation of Large-Scale Dynamical Systems (SIAM 2005), section 4.3.
    """
    return (B @ B.mH) / (1 - poles[..., :, None] * poles.conj()[..., None, :])


def observability_gramian(poles: Tensor, C: Tensor) -> Tensor:
    """Q = sum_k (A^H)^k C^H C A^k for A = diag(poles), in closed form.

    Q solves Q = A^H Q A + C^H C; entrywise Q_ij = (C^H C)_ij / (1 - conj(poles_i) poles_j).

    Args:
        poles: complex (N,), |poles| < 1.
        C: complex (M, N).

    Returns:
        complex (N, N), Hermitian and positive semidefinite.
    """
    return controllability_gramian(poles.conj(), C.mH)


def gramian_factor(gramian: Tensor) -> Tensor:
    """A factor L with gramian = L L^H, for a Gramian that may be rank-deficient to working precision.

    Close to the unit circle a Gramian is numerically singular, so Cholesky breaks down. The Gramian is first scaled
    to unit diagonal, which brings states of very different size to one scale, then `eigh` gives the factor;
    eigenvalues at rounding level are clamped to zero and their columns dropped.

    Args:
        gramian: complex128 or float64 (N, N), Hermitian positive semidefinite.

    Returns:
        (N, k) with k <= N, the numerical rank. A zero Gramian gives k = 0.
    """
    diagonal = gramian.diagonal().real.clamp(min=0)
    scale = diagonal.sqrt()
    inverse = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1), 0)
    values, vectors = torch.linalg.eigh(gramian * inverse[:, None] * inverse)
    floor = values[-1].clamp(min=0) * torch.finfo(values.dtype).eps
    kept = values > floor
    return scale[:, None] * vectors[:, kept] * values[kept].sqrt()
