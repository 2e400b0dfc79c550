"""Small MimoSSM models for tests."""

import torch

from hf_compressm.models import MimoSSMConfig

V, B, L = 19, 3, 11
"""Vocabulary, batch, tokens."""


def config(**kwargs):
    # With the usual small initial scale all logits of an untrained model would be near zero.
    defaults = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "state_sizes": [5, 3]}
    return MimoSSMConfig(**{**defaults, "initializer_range": 1.0, **kwargs})


def token_ids(*shape):
    return torch.randint(0, V - 1, shape or (B, L))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
