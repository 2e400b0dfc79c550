"""Order policies and constraints."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm.reduction import SizeConstraints, energy_orders, select_states, target_orders

spectrum = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@given(st.lists(spectrum, min_size=1, max_size=5), st.floats(0.001, 0.999))
def test_energy_keeps_the_fewest_states_that_suffice(spectra, tau):
    for values, order in zip(spectra, energy_orders(spectra, tau), strict=True):
        total = values.sum()
        assert values[:order].sum() >= (1 - tau) * total * (1 - 1e-12)
        assert order == 1 or values[: order - 1].sum() < (1 - tau) * total


@pytest.mark.parametrize("tau", [0, 1, -0.1, 1.5])
def test_energy_refuses_tau_outside_the_open_interval(tau):
    with pytest.raises(ValueError, match="tau must lie strictly between 0 and 1"):
        energy_orders([torch.ones(3)], tau)


@given(st.lists(spectrum, min_size=1, max_size=5), st.floats(0, 1), st.integers(1, 4))
def test_target_meets_the_budget_and_fills_to_one_level(spectra, share, block):
    constraints = SizeConstraints(multiple_of=block)
    present = sum(map(len, spectra)) / len(spectra)
    mean = 1 + share * (present - 1)
    orders = target_orders(spectra, mean, constraints)
    first = sum(min(block, len(values)) for values in spectra)
    assert all(1 <= order <= len(values) for order, values in zip(orders, spectra, strict=True))
    assert sum(orders) <= max(round(mean * len(spectra)), first)
    if block == 1:
        assert sum(orders) == round(mean * len(spectra))
        normalised = [values / values.sum() for values in spectra]
        kept = [v[order - 1] for v, order in zip(normalised, orders, strict=True) if order > 1]
        left = [v[order] for v, order in zip(normalised, orders, strict=True) if order < len(v)]
        assert not kept or not left or min(kept) >= max(left) - 1e-15


def test_target_gives_more_states_to_a_flat_spectrum():
    flat, steep = torch.ones(16), 0.5 ** torch.arange(16.0)
    assert target_orders([flat.double(), steep.double()], 8) == [12, 4]


def test_target_above_the_present_size_is_refused():
    with pytest.raises(ValueError, match="present mean 3"):
        target_orders([torch.ones(3), torch.ones(3)], 4)


def test_constraints_round_up_hold_minima_and_leave_small_changes():
    constraints = SizeConstraints(minimum=4, multiple_of=8, minimum_change=0.05)
    assert constraints.apply([1, 9, 60, 63], [64, 64, 64, 64]) == [8, 16, 64, 64]
    assert SizeConstraints(minimum_change=0.05).apply([95, 96], [100, 100]) == [95, 100]
    assert SizeConstraints(uniform=True).apply([3, 9, 5], [20, 20, 20]) == [9, 9, 9]
    with pytest.raises(ValueError, match="uniform"):
        SizeConstraints(uniform=True).apply([3, 9], [20, 21])
    with pytest.raises(ValueError, match=">= 1"):
        SizeConstraints(minimum=0)
    with pytest.raises(ValueError, match="minimum_change"):
        SizeConstraints(minimum_change=1)


def test_selections():
    assert select_states(6, 2, "largest") == [0, 1]
    assert select_states(6, 2, "smallest") == [4, 5]
    draws = {tuple(select_states(6, 2, "random", torch.Generator().manual_seed(seed))) for seed in range(30)}
    assert len(draws) > 5 and all(len(set(draw)) == 2 for draw in draws)
    with pytest.raises(ValueError, match="generator"):
        select_states(6, 2, "random")
    with pytest.raises(ValueError, match="largest, smallest, random"):
        select_states(6, 2, "best")


def test_layers_that_share_a_size_are_cut_together():
    constraints = SizeConstraints(tied=((0, 2), (1, 3)))
    assert constraints.apply([3, 9, 5, 30], [16, 64, 16, 64]) == [5, 30, 5, 30]
    assert constraints.groups(5) == [(0, 2), (1, 3), (4,)]
    with pytest.raises(ValueError, match=r"one size for several layers needs .* got sizes \[16, 20\]"):
        constraints.apply([3, 9, 5, 30], [16, 64, 20, 64])
    falls = [0.5 ** torch.arange(16.0, dtype=torch.float64), 0.9 ** torch.arange(64.0, dtype=torch.float64)] * 2
    orders = target_orders(falls, 12, constraints)
    assert orders[0] == orders[2] and orders[1] == orders[3] and sum(orders) == 48
    # By hand: the two pairs share 24 states a layer, given out by share of the sum, of which 0.9^n has (1 - 0.9) 0.9^n.
    shares = sorted([(0.5 * 0.5**n, 0) for n in range(16)] + [(0.1 * 0.9**n, 1) for n in range(64)], reverse=True)
    first = sum(pair == 0 for _, pair in shares[:24])
    assert orders == [first, 24 - first] * 2
