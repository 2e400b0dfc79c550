"""Model order reduction on tensors: Gramians, balanced truncation, orders, tracking. Knows no model."""

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
from .ranks import (
    Selection,
    SizeConstraints,
    energy_orders,
    numerical_rank,
    select_states,
    target_orders,
)
from .tracking import match_states, rank_stability

__all__ = [
    "Balancing",
    "DiagonalSystem",
    "Selection",
    "SizeConstraints",
    "Truncation",
    "balance",
    "controllability_gramian",
    "difference",
    "energy_orders",
    "error_bound",
    "gramian_factor",
    "h2_norm",
    "hankel_singular_values",
    "match_states",
    "numerical_rank",
    "observability_gramian",
    "rank_stability",
    "select_states",
    "target_orders",
    "truncate",
    "upper_half_plane",
]
