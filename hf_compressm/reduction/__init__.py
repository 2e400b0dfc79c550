"""Model order reduction on tensors: Gramians, balanced truncation, orders, tracking. Knows no model.

Source: arXiv 2510.02823; each module names its own.
"""

from .balanced import (
    Balancing,
    Truncation,
    balance,
    difference,
    error_bound,
    h2_norm,
    hankel_singular_values,
    truncate,
)
from .gramians import (
    DiagonalSystem,
    controllability_gramian,
    gramian_factor,
    observability_gramian,
    upper_half_plane,
)
from .interpolative import (
    empirical_singular_values,
    low_rank_basis,
    output_residual,
    pivoted_states,
    read_out_correction,
    select_subset,
)
from .ranks import (
    Selection,
    SizeConstraints,
    energy_orders,
    numerical_rank,
    select_states,
    target_orders,
)
from .tracking import average_overlap, match_directions, match_states, rank_stability
from .weyl import SpectralMove, hankel_operator, spectral_move

__all__ = [
    "Balancing",
    "DiagonalSystem",
    "Selection",
    "SizeConstraints",
    "SpectralMove",
    "Truncation",
    "average_overlap",
    "balance",
    "controllability_gramian",
    "difference",
    "empirical_singular_values",
    "energy_orders",
    "error_bound",
    "gramian_factor",
    "h2_norm",
    "hankel_operator",
    "hankel_singular_values",
    "low_rank_basis",
    "match_directions",
    "match_states",
    "numerical_rank",
    "observability_gramian",
    "output_residual",
    "pivoted_states",
    "rank_stability",
    "read_out_correction",
    "select_states",
    "select_subset",
    "spectral_move",
    "target_orders",
    "truncate",
    "upper_half_plane",
]
