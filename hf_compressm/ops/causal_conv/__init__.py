"""Depthwise causal convolution with SiLU, channels last: the convolution in front of a selective scan."""

from .naive import naive_causal_conv
from .op import causal_conv
from .step import causal_conv_step

__all__ = ["causal_conv", "causal_conv_step", "naive_causal_conv"]
