"""The gated delta rule: linear attention with a matrix-valued state that erases before it writes."""

from .gramian import delta_state_gramian
from .naive import naive_delta_state_gramian, naive_gated_delta_scan, naive_gated_delta_step
from .op import gated_delta_scan
from .step import gated_delta_step

__all__ = [
    "delta_state_gramian",
    "gated_delta_scan",
    "gated_delta_step",
    "naive_delta_state_gramian",
    "naive_gated_delta_scan",
    "naive_gated_delta_step",
]
