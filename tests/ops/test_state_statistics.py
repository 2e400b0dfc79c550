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


def expected_gramian(u, dt, A, B, mask, stride):
    states = stored(u, dt, A, B, mask, stride).unflatten(2, (B.shape[2], -1))
    return torch.einsum("blgin,blgim->gnm", states, states)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("stride", [1, 4, 37, 40])
def test_sums_over_tokens_channels_and_groups(shared, stride, backend):
    given = draws(shared=shared)
    found = state_gramian(*given, stride, backend=backend)
    assert torch.allclose(found, expected_gramian(*given, stride), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 70, 34, 2, 33), (1, 9, 48, 3, 100)])
@pytest.mark.parametrize("stretch", [1, 1 << 22])
def test_kernels_at_awkward_sizes_and_stretches(sizes, stretch, monkeypatch):
    from hf_compressm.ops.state_statistics import cpu

    monkeypatch.setattr(cpu, "STRETCH_BYTES", stretch)
    given = draws(*sizes)
    found = state_gramian(*given, backend="cpu")
    expected = expected_gramian(*given, 1)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(found, found.mT)


def test_views_and_half_precision():
    u, dt, A, B, mask = draws(3, 20, 32, 2, 5)
    views = u.mT.contiguous().mT, dt[..., :1].expand(-1, -1, 32), A.t().contiguous().t(), B[:1].expand(3, -1, -1, -1)
    assert torch.allclose(state_gramian(*views), state_gramian(*(view.contiguous() for view in views)))
    half = [tensor.bfloat16() for tensor in (u, dt, A, B)]
    exact = state_gramian(*(tensor.float() for tensor in half))
    assert torch.allclose(state_gramian(*half), exact) and exact.dtype == torch.float64


def test_number_of_threads_does_not_matter():
    given, threads, found = draws(3, 40, 80, 2, 9), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(state_gramian(*given, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_custom_op_obeys_its_contract():
    checks = ("test_schema", "test_faketensor")
    for mask in (None, draws()[-1]):
        given = (*draws()[:-1], mask, 4)
        for backend in ("naive", "cpu"):
            torch.library.opcheck(torch.ops.hf_compressm.state_gramian, (*given, backend), test_utils=checks)


def test_nan_is_not_swallowed():
    u, *rest = draws()
    u[1, 3, 2] = float("nan")
    assert state_gramian(u, *rest[:-1], backend="cpu").isnan().any()


def test_shapes_are_checked():
    u, dt, A, B, mask = draws()
    with pytest.raises(ValueError, match="G a divisor of 6"):
        state_gramian(u, dt, A, torch.randn(2, 37, 4, 5))
    with pytest.raises(ValueError, match="A must be"):
        state_gramian(u, dt, A[:, :2], B)
    with pytest.raises(ValueError, match="mask must be"):
        state_gramian(u, dt, A, B, mask[:, :5])
    with pytest.raises(ValueError, match="each >= 1"):
        state_gramian(u[:0], dt[:0], A, B[:0])
    with pytest.raises(ValueError, match="G a divisor of 6"):
        state_gramian(u, dt, A[:, :0], B[..., :0])
    with pytest.raises(ValueError, match="stride"):
        state_gramian(u, dt, A, B, stride=0)
