"""The Hankel operator and Weyl's bound on how far its eigenvalues move."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_systems import KINDS, random_system

from hf_compressm.reduction import (
    controllability_gramian,
    hankel_operator,
    hankel_singular_values,
    observability_gramian,
    spectral_move,
)

systems = st.builds(
    lambda kind, N, H, radius, seed: random_system(kind, N, H, radius, torch.Generator().manual_seed(seed)),
    st.sampled_from(KINDS),
    st.integers(1, 32),
    st.integers(1, 6),
    st.sampled_from([0.5, 0.9, 0.99]),
    st.integers(0, 10**6),
)
NOISE = 1e-7
"""Of the largest singular value: a root of a singular Gramian is accurate to sqrt(eps) = 1.5e-8 of its norm only."""


def operator(system):
    return hankel_operator(
        controllability_gramian(system.poles, system.B), observability_gramian(system.poles, system.C)
    )


def moved(system, size, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in (system.poles, system.B, system.C)]
    return type(system)(
        system.poles * (1 - size * noise[0].abs() / (1 + noise[0].abs())),
        system.B + size * noise[1],
        system.C + size * noise[2],
    )


@settings(max_examples=40, deadline=None)
@given(systems)
def test_eigenvalues_are_the_hankel_singular_values(system):
    H = operator(system)
    assert torch.equal(H, H.mH) or float((H - H.mH).abs().max()) <= 1e-12 * float(H.abs().max())
    values = torch.linalg.eigvalsh(H).flip(0)
    expected = hankel_singular_values(system)
    assert float((values - expected).abs().max()) <= NOISE * float(expected[0])


@settings(max_examples=40, deadline=None)
@given(systems)
def test_its_square_is_the_product_that_defines_it(system):
    P, Q = controllability_gramian(system.poles, system.B), observability_gramian(system.poles, system.C)
    values, vectors = torch.linalg.eigh(P)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mH
    H, square = hankel_operator(P, Q), root @ Q @ root
    assert float((H @ H - square).abs().max()) <= 1e-10 * max(float(square.abs().max()), 1e-30)


@settings(max_examples=60, deadline=None)
@given(systems, st.sampled_from([1e-4, 1e-2, 1.0]), st.integers(0, 10**6))
def test_singular_values_move_within_the_bound(system, size, seed):
    before, after = system, moved(system, size, seed)
    found = spectral_move(operator(before), operator(after))
    first, second = hankel_singular_values(before), hankel_singular_values(after)
    noise = NOISE * float(torch.maximum(first[0], second[0]))
    assert float((second - first).abs().max()) <= found.bound + noise
    assert found.move <= found.bound + noise and found.spread <= 2 * found.bound + noise


@settings(max_examples=40, deadline=None)
@given(systems, st.sampled_from([1e-3, 1e-1]), st.floats(0, 1), st.integers(0, 10**6))
def test_gaps_close_by_no_more_than_the_spread_anywhere_on_the_way(system, size, share, seed):
    before, after = operator(system), operator(moved(system, size, seed))
    spread, between = spectral_move(before, after).spread, before + share * (after - before)
    gaps = -spectral_move(before, between).values.diff()
    narrowed = gaps + torch.linalg.eigvalsh(between).flip(0).diff()
    assert (narrowed <= share * spread + 1e-10 * float(torch.linalg.matrix_norm(before, 2))).all()


def test_the_bound_is_sharp_for_a_shift_and_loose_for_a_rotation():
    H = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    shift = spectral_move(H, H + 0.5 * torch.eye(3, dtype=torch.float64))
    assert shift.values.tolist() == [3, 2, 1] and shift.move == shift.bound == 0.5 and shift.spread == 0
    swapped = spectral_move(H, H.flip(0).flip(1))
    assert swapped.move == pytest.approx(0) and swapped.bound == pytest.approx(2) and swapped.spread == pytest.approx(4)
