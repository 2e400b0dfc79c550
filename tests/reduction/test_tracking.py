"""Following balanced states through small changes of a system."""

import pytest
import torch
from random_systems import random_system

from hf_compressm.reduction import (
    DiagonalSystem,
    average_overlap,
    balance,
    match_directions,
    match_states,
    rank_stability,
)


def two_modes(first: float, second: float) -> DiagonalSystem:
    """Two decoupled modes with Hankel singular values in proportion to the arguments."""
    poles = torch.tensor([0.5, 0.5j], dtype=torch.complex128)
    B = torch.eye(2, dtype=torch.complex128)
    return DiagonalSystem(poles, B, torch.diag(torch.tensor([first, second], dtype=torch.complex128)))


def test_states_keep_their_identity_when_their_values_cross():
    partner = match_states(balance(two_modes(2.0, 1.0)), balance(two_modes(1.0, 2.0)))
    assert partner.tolist() == [1, 0]
    assert rank_stability(partner, 2) == pytest.approx(0.5)


def test_a_small_change_keeps_the_ranking():
    system = random_system("plain", 24, 4, 0.95, torch.Generator().manual_seed(0))
    moved = system._replace(B=system.B * (1 + 1e-6 * torch.randn(24, 1)))
    partner = match_states(balance(system), balance(moved))
    assert partner.tolist() == list(range(24)) and rank_stability(partner, 24) == 1.0


def test_shuffled_states_are_given_back():
    found = balance(random_system("plain", 24, 4, 0.95, torch.Generator().manual_seed(0)))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    partner = match_directions(found.right, found.left, found.right[:, order], found.left[:, order])
    assert torch.equal(order[partner], torch.arange(24))


@pytest.mark.parametrize("gain", [1e-4, 1e4])
def test_matching_does_not_depend_on_the_read_outs_scale(gain):
    generator = torch.Generator().manual_seed(0)
    system = random_system("plain", 24, 4, 0.95, generator)
    moved = system._replace(B=system.B * (1 + 0.3 * torch.randn(24, 1, generator=generator)))
    expected = match_states(balance(system), balance(moved))
    assert expected.tolist() != list(range(24))
    assert torch.equal(match_states(balance(system), balance(moved._replace(C=gain * moved.C))), expected)


def test_unrelated_systems_do_not_agree():
    first, second = (random_system("plain", 40, 1, 0.99, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert rank_stability(match_states(balance(first), balance(second)), 4) < 0.9


def test_a_change_of_order_and_a_bad_depth_are_refused():
    first = random_system("plain", 4, 1, 0.9, torch.Generator().manual_seed(0))
    second = random_system("plain", 5, 1, 0.9, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="from 4 to 5"):
        match_states(balance(first), balance(second))
    with pytest.raises(ValueError, match="depth"):
        rank_stability(torch.arange(3), 0)


def test_average_overlap():
    assert average_overlap([0, 1, 2], [0, 1, 2]) == 1 and average_overlap([0, 1], [2, 3]) == 0
    assert average_overlap([0, 1, 2], [1, 0, 2]) == pytest.approx((0 + 1 + 1) / 3)
