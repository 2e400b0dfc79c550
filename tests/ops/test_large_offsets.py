"""Offsets within one tensor that 32-bit integers do not hold: sequences that lie far apart in memory never touched."""

import interpreter
import pytest
import torch

from hf_compressm.ops.diag_scan import diag_scan
from hf_compressm.ops.selective_scan import selective_scan
from hf_compressm.ops.ssd_scan import ssd_scan
from hf_compressm.ops.state_gramian import state_gramian

FAR = 2**31 + 64


@pytest.fixture
def apart(monkeypatch):
    """Function that gives a copy of a tensor whose first dimension has a stride of more than 2^31 numbers."""
    # As in the interpreter's other tests, but memory must not be filled here.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)

    def place(tensor):
        items = FAR // 2 if tensor.is_complex() else FAR
        try:
            storage = torch.empty(items + tensor[0].numel(), dtype=tensor.dtype)
        except RuntimeError as error:
            pytest.skip(f"the system does not give that much address space: {error}")
        copy = storage.as_strided(tensor.shape, (items, *tensor.stride()[1:]))
        assert tensor.shape[0] == 2
        return copy.copy_(tensor).requires_grad_(tensor.requires_grad)

    return place


def draw(*shape, dtype=torch.float16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32).to(dtype)


def cases():
    u, B, A = draw(2, 5, 16), draw(2, 5, 3), -draw(16, 3, dtype=torch.float32).exp()
    yield "selective_scan", u, lambda u, **kw: selective_scan(u, draw(2, 5, 16), A, B, B, delta_softplus=True, **kw)
    heads = u.view(2, 5, 2, 8)
    dt, groups = draw(2, 5, 2), B[:, :, None]
    yield "ssd_scan", heads, lambda x, **kw: ssd_scan(x, dt, A[:2, 0], groups, groups, dt_softplus=True, **kw)
    lam = torch.polar(torch.rand(3) * 0.9, torch.rand(3))
    yield (
        "diag_scan",
        torch.view_as_complex(draw(2, 5, 3, 2, dtype=torch.float32)),
        lambda x, **kw: diag_scan(lam, x, **kw)[0],
    )
    yield "state_gramian", u, lambda x, **kw: state_gramian(x, dt[..., :1].abs().expand(-1, -1, 16), A, groups, **kw)


BACKENDS = ["triton"] if interpreter.INTERPRETED else ["cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, given, op", list(cases()), ids=lambda value: value if isinstance(value, str) else "")
def test_sequences_may_lie_far_apart(apart, backend, name, given, op):
    near, far = given.clone().requires_grad_(), apart(given).requires_grad_()
    expected, found = op(near, backend=backend), op(far, backend=backend)
    assert torch.equal(found, expected)
    if expected.requires_grad:
        weights = torch.randn_like(expected)
        assert torch.equal(*(torch.autograd.grad(y, x, weights)[0] for y, x in ((found, far), (expected, near))))
