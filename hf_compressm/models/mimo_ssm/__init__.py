"""MimoSSM: a stack of time-invariant MIMO state-space layers."""

from .configuration_mimo_ssm import *  # noqa: F403
from .modeling_mimo_ssm import *  # noqa: F403
