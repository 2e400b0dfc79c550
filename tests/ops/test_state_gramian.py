"""State Gramians accumulated in passing against those of stored states."""

import pytest
import torch

from hf_compressm.ops.state_gramian import state_gramian


def draws(batch=2, length=37, channels=6, groups=2, size=5, shared=False):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, channels, generator=generator)
    dt = torch.rand(batch, length, channels, generator=generator)
    A = -torch.rand(channels, 1 if shared else size, generator=generator)
    B = torch.randn(batch, length, groups, size, generator=generator)
    looked = torch.rand(batch, length, generator=generator) > 0.3
    return u, dt, A, B, looked * torch.rand(batch, length, generator=generator) * 8


def stored(u, dt, A, B):
    """All states (B, L, I, N)."""
    B = B.double().repeat_interleave(u.shape[2] // B.shape[2], 2)
    state, states = torch.zeros(*u[:, 0].shape, B.shape[-1], dtype=torch.float64), []
    for t in range(u.shape[1]):
        state = (dt[:, t, :, None] * A).double().exp() * state + (dt * u)[:, t, :, None].double() * B[:, t]
        states.append(state)
    return torch.stack(states, 1)


def expected_gramian(u, dt, A, B, weights=None):
    states = stored(u, dt, A, B).unflatten(2, (B.shape[2], -1))
    weights = torch.ones(u.shape[:2]) if weights is None else weights
    return torch.einsum("bl,blgin,blgim->gnm", weights.double(), states, states)


def every(stride, batch=2, length=37):
    """Weights that look at every so many steps."""
    return (torch.arange(1, length + 1) % stride == 0).expand(batch, -1)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["none", "random", "every", "last", "one row"])
def test_sums_over_tokens_channels_and_groups(shared, kind, backend):
    *given, random = draws(shared=shared)
    one_row = random.where(torch.tensor([[False], [True]]), 0)
    weights = {"none": None, "random": random, "every": every(4), "last": every(37), "one row": one_row}[kind]
    found = state_gramian(*given, weights, backend=backend)
    expected = expected_gramian(*given, weights)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_nothing_looked_at(backend):
    found = state_gramian(*draws()[:-1], torch.zeros(2, 37), backend=backend)
    assert torch.equal(found, torch.zeros(2, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 70, 34, 2, 33), (1, 9, 48, 3, 100)])
@pytest.mark.parametrize("stretch", [1, 5000, 1 << 22])
def test_kernels_at_awkward_sizes_and_stretches(sizes, stretch, monkeypatch):
    from hf_compressm.ops.state_gramian import cpu

    monkeypatch.setattr(cpu, "STRETCH_BYTES", stretch)
    given = draws(*sizes)
    found = state_gramian(*given, backend="cpu")
    expected = expected_gramian(*given)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(found, found.mT)


def test_views_and_half_precision():
    u, dt, A, B, _ = draws(3, 20, 32, 2, 5)
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
    for weights in (None, draws()[-1]):
        given = (*draws()[:-1], weights)
        for backend in ("naive", "cpu"):
            torch.library.opcheck(torch.ops.hf_compressm.state_gramian, (*given, backend), test_utils=checks)


def test_nan_is_not_swallowed():
    u, *rest = draws()
    u[1, 3, 2] = float("nan")
    assert state_gramian(u, *rest[:-1], backend="cpu").isnan().any()


def test_shapes_are_checked():
    u, dt, A, B, weights = draws()
    with pytest.raises(ValueError, match="G a divisor of 6"):
        state_gramian(u, dt, A, torch.randn(2, 37, 4, 5))
    with pytest.raises(ValueError, match="A must be"):
        state_gramian(u, dt, A[:, :2], B)
    with pytest.raises(ValueError, match="weights must be"):
        state_gramian(u, dt, A, B, weights[:, :5])
    with pytest.raises(ValueError, match="each >= 1"):
        state_gramian(u[:0], dt[:0], A, B[:0])
    with pytest.raises(ValueError, match="G a divisor of 6"):
        state_gramian(u, dt, A[:, :0], B[..., :0])
