"""Gramians, Hankel singular values and balanced truncation against equations and scipy."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_systems import KINDS, random_system

from hf_compressm.reduction import (
    DiagonalSystem,
    balance,
    controllability_gramian,
    difference,
    gramian_factor,
    h2_norm,
    hankel_singular_values,
    observability_gramian,
    truncate,
    upper_half_plane,
)

systems = st.builds(
    lambda kind, N, H, radius, seed: random_system(kind, N, H, radius, torch.Generator().manual_seed(seed)),
    st.sampled_from(KINDS),
    st.integers(1, 48),
    st.integers(1, 9),
    st.sampled_from([0.5, 0.9, 0.99, 0.9999]),
    st.integers(0, 10**6),
)


def frequencies(*some: DiagonalSystem) -> torch.Tensor:
    grid = torch.linspace(-math.pi, math.pi, 400, dtype=torch.float64)
    return torch.cat([grid, *(system.poles.angle() for system in some)])


def gain_of_difference(first: DiagonalSystem, second: DiagonalSystem) -> float:
    omega = frequencies(first, second)
    gap = first.frequency_response(omega) - second.frequency_response(omega)
    return float(torch.linalg.matrix_norm(gap, 2).max())


@settings(max_examples=40, deadline=None)
@given(systems)
def test_gramians_solve_their_lyapunov_equations(system):
    A = torch.diag(system.poles)
    P = controllability_gramian(system.poles, system.B)
    Q = observability_gramian(system.poles, system.C)
    input_term, output_term = system.B @ system.B.mH, system.C.mH @ system.C
    tolerance = 1e-12 * (P.abs().max() + Q.abs().max())
    assert torch.allclose(A @ P @ A.mH + input_term, P, rtol=0, atol=float(tolerance))
    assert torch.allclose(A.mH @ Q @ A + output_term, Q, rtol=0, atol=float(tolerance))


@settings(max_examples=40, deadline=None)
@given(systems)
def test_factor_reproduces_the_gramian(system):
    P = controllability_gramian(system.poles, system.B)
    L = gramian_factor(P)
    scale = P.diagonal().real.sqrt()
    assert ((L @ L.mH - P).abs() <= 1e-12 * (1 + scale[:, None] * scale)).all()


@settings(max_examples=40, deadline=None)
@given(systems)
def test_singular_values_agree_with_scipy(system):
    A, B, C = (np.diag(system.poles.numpy()), system.B.numpy(), system.C.numpy())
    P = scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T)
    Q = scipy.linalg.solve_discrete_lyapunov(A.conj().T, C.conj().T @ C)
    factors = [gramian_factor(torch.from_numpy((G + G.conj().T) / 2)) for G in (P, Q)]
    wanted = torch.linalg.svdvals(factors[1].mH @ factors[0])
    values = hankel_singular_values(system)
    wanted = torch.nn.functional.pad(wanted, (0, len(values) - len(wanted)))
    assert (values - wanted).abs().max() <= 1e-8 * values[0]
    assert (values.diff() <= 0).all() and (values >= 0).all()


@settings(max_examples=120, deadline=None)
@given(systems, st.floats(0, 1))
def test_error_stays_below_the_bound_and_poles_inside_the_circle(system, share):
    balancing = balance(system)
    order = round(share * balancing.rank)
    if order == 0:
        return
    truncation = truncate(balancing, range(order))
    assert all(torch.isfinite(torch.view_as_real(tensor)).all() for tensor in truncation.system)
    assert (truncation.system.poles.abs() < 1).all()
    rounding = 1e-10 * float(balancing.singular_values[0])
    assert gain_of_difference(system, truncation.system) <= truncation.bound + rounding


def test_bound_is_not_vacuous():
    """Dropping the leading state instead of the last breaks the bound of the last: the check above can fail."""
    balancing = balance(random_system("plain", 12, 2, 0.9, torch.Generator().manual_seed(3)))
    worst = truncate(balancing, range(1, 12))
    assert gain_of_difference(balancing.system, worst.system) > 2 * float(balancing.singular_values[-1])


@pytest.mark.parametrize("selection", [[0, 3, 5], [9, 10, 11], [2]])
def test_any_subset_of_balanced_states_is_stable_and_bounded(selection):
    balancing = balance(random_system("plain", 12, 3, 0.999, torch.Generator().manual_seed(1)))
    truncation = truncate(balancing, selection)
    assert truncation.system.order == len(selection) and (truncation.system.poles.abs() < 1).all()
    assert gain_of_difference(balancing.system, truncation.system) <= truncation.bound * (1 + 1e-9)


def test_maps_between_full_and_reduced_states():
    system = random_system("plain", 20, 3, 0.95, torch.Generator().manual_seed(0))
    truncation = truncate(balance(system), range(6))
    left, right, reduced = truncation.left, truncation.right, truncation.system
    assert torch.allclose(left.mH @ right, torch.eye(6, dtype=torch.complex128), atol=1e-9)
    assert torch.allclose(left.mH @ (system.poles[:, None] * right), torch.diag(reduced.poles), atol=1e-9)
    assert torch.allclose(left.mH @ system.B, reduced.B) and torch.allclose(system.C @ right, reduced.C)


def test_states_that_cannot_matter_leave_without_a_trace():
    generator = torch.Generator().manual_seed(5)
    for kind in ("zero_rows", "unobservable", "repeated_poles"):
        system = random_system(kind, 30, 2, 0.99, generator)
        balancing = balance(system)
        assert balancing.rank < 30
        minimal = truncate(balancing, range(balancing.rank))
        assert gain_of_difference(system, minimal.system) <= 1e-9 * float(balancing.singular_values[0])


def test_padding_changes_nothing_and_can_be_trained():
    system = random_system("zero_rows", 12, 2, 0.9, torch.Generator().manual_seed(2))
    balancing = balance(system)
    plain, padded = truncate(balancing, range(balancing.rank)), truncate(balancing, range(balancing.rank), 10)
    assert padded.system.order == 10 and gain_of_difference(plain.system, padded.system) < 1e-12
    assert (padded.system.C[:, balancing.rank :] == 0).all()
    assert (padded.system.B[balancing.rank : 10].norm(dim=1) >= 0).all() and padded.system.B[6].norm() > 0


def test_a_system_without_effect_has_rank_zero_and_can_be_padded_to_one_state():
    zero = torch.zeros(4, 2, dtype=torch.complex128)
    system = DiagonalSystem(torch.full((4,), 0.5, dtype=torch.complex128), zero, zero.mT)
    balancing = balance(system)
    assert balancing.rank == 0 and (balancing.spectrum() == 0).all()
    assert truncate(balancing, [], 1).system.order == 1


@settings(max_examples=30, deadline=None)
@given(systems)
def test_upper_half_plane_keeps_the_real_output(system):
    folded, flipped = upper_half_plane(system)
    assert (folded.poles.imag >= 0).all() and torch.equal(flipped, system.poles.imag < 0)
    for lag in (0, 1, 7):
        before = (system.C * system.poles**lag @ system.B).real
        after = (folded.C * folded.poles**lag @ folded.B).real
        assert torch.allclose(before, after, atol=1e-12)


def test_h2_norm_is_the_energy_of_the_impulse_response():
    first = random_system("plain", 7, 2, 0.8, torch.Generator().manual_seed(0))
    second = random_system("real_poles", 3, 2, 0.8, torch.Generator().manual_seed(1))
    gap = difference(first, second)
    energy = sum((gap.C * gap.poles**lag @ gap.B).abs().square().sum() for lag in range(300))
    assert h2_norm(gap) == pytest.approx(float(energy.sqrt()), rel=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(poles=s.poles * 2), "not stable"),
        (lambda s: s._replace(B=s.B * math.nan), "B holds NaN"),
        (lambda s: s._replace(C=s.C[:, :2]), "need B of shape"),
    ],
)
def test_bad_systems_are_refused(change, message):
    system = random_system("plain", 3, 2, 0.9, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        balance(change(system))


def test_bad_selections_are_refused():
    balancing = balance(random_system("plain", 4, 2, 0.9, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="distinct indices"):
        truncate(balancing, [0, 0])
    with pytest.raises(ValueError, match="distinct indices"):
        truncate(balancing, [4])
    with pytest.raises(ValueError, match="order must lie"):
        truncate(balancing, [0, 1], order=5)
