"""Subset selection, read-out correction and low-rank bases from empirical Gramians."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compressm.reduction import (
    empirical_singular_values,
    low_rank_basis,
    output_residual,
    pivoted_states,
    read_out_correction,
    select_subset,
)


def gramians(size=12, seed=0, decay=2.0, rank=None):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        samples = torch.randn(40, rank or size, generator=generator, dtype=torch.float64)
        mix = torch.randn(rank or size, size, generator=generator, dtype=torch.float64)
        samples = samples @ mix * torch.logspace(0, -decay, size, dtype=torch.float64)
        return samples.T @ samples

    return draw(), draw()


def subset_residual(G, W, kept):
    rows = torch.eye(len(G), dtype=G.dtype)[kept]
    return output_residual(G, W, rows, read_out_correction(G, kept))


def test_singular_values_are_roots_of_the_eigenvalues_of_the_product():
    G, W = gramians()
    expected = torch.linalg.eigvals(G @ W).real.sqrt().sort(descending=True).values
    assert torch.allclose(empirical_singular_values(G, W), expected, rtol=1e-6, atol=1e-9 * expected[0])


def test_singular_values_of_rank_deficient_gramians_are_padded_with_zeros():
    G, W = gramians(rank=3)
    values = empirical_singular_values(G, W)
    assert values.shape == (12,) and (values[3:] <= 1e-6 * values[0]).all() and (values[:3] > 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 16), st.integers(0, 999), st.floats(0, 4))
def test_low_rank_basis_reaches_the_tail_of_the_singular_values(size, seed, decay):
    G, W = gramians(size, seed, decay)
    squares = empirical_singular_values(G, W).square()
    for order in (1, max(size // 2, 1), size):
        L, R = low_rank_basis(G, W, order)
        expected = float(squares[order:].sum() / squares.sum())
        assert output_residual(G, W, L, R) == pytest.approx(expected, abs=1e-9)
        assert subset_residual(G, W, select_subset(G, W, order)) >= expected - 1e-6
        assert torch.allclose(L.norm(dim=1), R.norm(dim=1))


def test_greedy_choice_is_nearly_the_best_of_all_subsets():
    from itertools import combinations

    for seed in range(5):
        G, W = gramians(8, seed, decay=1.0)
        best = min(subset_residual(G, W, list(kept)) for kept in combinations(range(8), 3))
        assert subset_residual(G, W, sorted(select_subset(G, W, 3))) <= 1.6 * best


def test_choices_are_nested_and_the_residual_falls():
    G, W = gramians()
    chosen = select_subset(G, W, 12)
    assert sorted(chosen) == list(range(12)) and select_subset(G, W, 5) == chosen[:5]
    residuals = [subset_residual(G, W, chosen[:order]) for order in range(1, 13)]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(residuals, residuals[1:], strict=False))
    assert residuals[-1] == 0


def test_a_redundant_state_is_removed_at_no_loss():
    G, W = gramians()
    mix = torch.cat([torch.eye(12, dtype=torch.float64), torch.ones(1, 12, dtype=torch.float64)])  # h_12 = sum of all
    G, W = mix @ G @ mix.T, torch.block_diag(W, W[:1, :1])
    assert subset_residual(G, W, sorted(select_subset(G, W, 12))) < 1e-8


def test_dead_states_are_chosen_last():
    G, W = gramians()
    G[3] = G[:, 3] = 0
    W[7] = W[:, 7] = 0
    chosen = select_subset(G, W, 12)
    assert chosen[-1] == 3
    K = read_out_correction(G, sorted(chosen[:6]))
    assert K.isfinite().all() and torch.equal(K[:, sorted(chosen[:6])], torch.eye(6, dtype=torch.float64))


def test_orders_out_of_range_are_refused():
    G, W = gramians()
    for function in (select_subset, low_rank_basis):
        for order in (0, 13):
            with pytest.raises(ValueError, match="between 1 and the number of states 12"):
                function(G, W, order)


def test_states_without_a_reason_to_be_chosen_are_not_ranked():
    G, W = gramians(12, rank=3)
    chosen = pivoted_states(G, W, 12)
    assert 3 <= len(chosen) < 12 and select_subset(G, W, 12)[: len(chosen)] == chosen
    assert pivoted_states(G, W, 2) == chosen[:2]
    silent = torch.diag(torch.tensor([1.0, 0, 2, 0], dtype=torch.float64))
    assert pivoted_states(silent, torch.eye(4, dtype=torch.float64), 4) == [2, 0]
    with pytest.raises(ValueError, match="order"):
        pivoted_states(G, W, 13)
