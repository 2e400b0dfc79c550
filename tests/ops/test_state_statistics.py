"""State Gramians accumulated in passing against those of stored states."""

import pytest
import torch

from hf_compressm.ops.state_statistics import state_gramian


def draws(batch=2, length=37, channels=6, groups=2, size=5, shared=False):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, channels, generator=generator)
    dt = torch.rand(batch, length, channels, generator=generator)
    A = -torch.rand(channels, 1 if shared else size, generator=generator)
    B = torch.randn(batch, length, groups, size, generator=generator)
    mask = (torch.rand(batch, length, generator=generator) > 0.3).long()
    return u, dt, A, B, mask


def stored(u, dt, A, B, mask, stride):
    """All states (B, L, I, N), then their second moments."""
    B = B.double().repeat_interleave(u.shape[2] // B.shape[2], 2)
    state, states = torch.zeros(*u[:, 0].shape, B.shape[-1], dtype=torch.float64), []
    for t in range(u.shape[1]):
        state = (dt[:, t, :, None] * A).double().exp() * state + (dt * u)[:, t, :, None].double() * B[:, t]
        states.append(state * mask[:, t, None, None])
    return torch.stack(states, 1)[:, stride - 1 :: stride]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("stride", [1, 4, 37])
def test_sums_over_tokens_channels_and_groups(shared, stride):
    u, dt, A, B, mask = draws(shared=shared)
    states = stored(u, dt, A, B, mask, stride).unflatten(2, (2, 3))
    expected = torch.einsum("blgin,blgim->gnm", states, states)
    assert torch.allclose(state_gramian(u, dt, A, B, mask, stride), expected, rtol=1e-4, atol=1e-5)


def test_shapes_are_checked():
    u, dt, A, B, mask = draws()
    with pytest.raises(ValueError, match="G a divisor of 6"):
        state_gramian(u, dt, A, torch.randn(2, 37, 4, 5))
    with pytest.raises(ValueError, match="A must be"):
        state_gramian(u, dt, A[:, :2], B)
    with pytest.raises(ValueError, match="mask must be"):
        state_gramian(u, dt, A, B, mask[:, :5])
    with pytest.raises(ValueError, match="stride"):
        state_gramian(u, dt, A, B, stride=0)
