"""The state Gramian of selective layers, without storing all states."""

from .naive import naive_state_gramian
from .op import state_gramian

__all__ = ["naive_state_gramian", "state_gramian"]
